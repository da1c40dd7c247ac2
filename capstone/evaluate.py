"""What a model is worth: held-out perplexity, bits a byte, samples, multiple choice by likelihood. Days 12, 18, 25.

    python -m capstone.evaluate runs/capstone/tiny/model --config capstone/configs/tiny.yaml
    python -m capstone.evaluate runs/day18/mine/checkpoints --config capstone/configs/tiny.yaml
    deepspeed --num_accelerators 2 --module capstone.evaluate runs/capstone/tiny/model

Takes a folder that `transformers` loads, or one of day 17's checkpoints. Expect three lines, the samples and a report.
Sources: Gao et al. 2020 (arXiv:2101.00027), section 3.1, on bits a byte; Brown et al. 2020 (arXiv:2005.14165),
section 2.4, on choosing by likelihood; Wilson 1927 on the interval of a share.
"""

import argparse
import json
import math
import os
from pathlib import Path

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from capstone.config import Config, add_config_flags, load_config
from capstone.data import Blocks, Tokens, load_blocks, spread
from capstone.model import as_transformers, build
from capstone.ranks import from_rank_0
from common.cpu import start_without_compiler
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.ranks import over_ranks, print0
from common.run_log import show_path
from day17.checkpoints import newest_good, rank_and_world, write_whole
from day18.export import fp32_weights
from day18.loading import load_safely


def load_model(folder: Path, config: Config) -> torch.nn.Module:
    """The model in a `transformers` folder, or the fp32 weights of the newest good checkpoint in a folder of them."""
    logging.disable_progress_bar()  # bars of milliseconds, one a rank
    if (folder / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    found, _ = newest_good(folder) if folder.is_dir() else (None, [])
    if found is None:
        raise UserError(
            f"{show_path(folder)} has neither a config.json nor a checkpoint that verifies (step000123, ...)"
        )
    load_safely()
    tokenizer = load_tokenizer(config.tokenizer.name)
    model = build(config, len(tokenizer), tokenizer.eos_token_id)
    model.load_state_dict(fp32_weights(found))
    return as_transformers(model, tokenizer.eos_token_id)


@torch.no_grad()
def token_nats(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """-log p of each token after the first, given those before it: (sequences, tokens) -> (sequences, tokens - 1)."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        len(ids), -1
    )


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Nats a token -> bits a byte: x tokens / bytes, / ln 2. Comparable between tokenizers, which perplexity is not."""
    return nats_per_token * tokens / text_bytes / math.log(2)


def perplexity(model: torch.nn.Module, blocks: Blocks, device: torch.device, max_blocks: int, micro_batch: int) -> dict:
    """Mean nats a token over `max_blocks` blocks spread evenly, and what follows. Collective: ranks share blocks."""
    rank, world = rank_and_world()
    mine = spread(blocks, max_blocks)[rank::world]
    nats = tokens = 0.0
    for at in range(0, len(mine), micro_batch):
        batch = torch.stack([blocks[index]["input_ids"] for index in mine[at : at + micro_batch]]).to(device)
        found = token_nats(model, batch)
        nats, tokens = nats + found.double().sum().item(), tokens + found.numel()
    tokens = over_ranks(tokens, device, "sum")
    mean, facts = over_ranks(nats, device, "sum") / tokens, blocks.tokens.facts
    return {
        "tokens": int(tokens), "nats_per_token": mean, "perplexity": math.exp(min(mean, 700)),
        "bits_per_byte": bits_per_byte(mean, facts["tokens"], facts["text_bytes"]),
        "bytes_per_token": facts["text_bytes"] / facts["tokens"],
    }  # fmt: skip


@torch.no_grad()
def held_out_loss(
    engine: torch.nn.Module, blocks: Blocks, device: torch.device, max_blocks: int = 64, micro_batch: int = 16
) -> float:
    """Mean loss (nats a token) of a model in training over the sample that `perplexity` takes. Collective.

    Every rank runs as many forward passes, as ZeRO-3 needs: one that has no block left takes the first, for nothing.
    """
    rank, world = rank_and_world()
    sample, total = spread(blocks, max_blocks), 0.0
    mine = sample[rank::world]
    engine.eval()
    for at in range(0, -(-len(sample) // world), micro_batch):
        rows = mine[at : at + micro_batch]
        ids = torch.stack([blocks[index]["input_ids"] for index in rows or sample[:1]]).to(device)
        total += engine(input_ids=ids, labels=ids).loss.item() * len(rows)
    engine.train()
    return over_ranks(total, device, "sum") / len(sample)


# --- multiple choice: which of these pieces of text goes on here? ---


def make_items(tokens: Tokens, number: int, choices: int, context_tokens: int, choice_tokens: int, seed: int) -> list:
    """Items by rule: (context ids, [true continuation, distractors...]); distractors come from other documents."""
    need, random = context_tokens + choice_tokens, np.random.default_rng(seed)
    documents = [document for document in tokens.documents() if len(document) >= need]
    if len(documents) < choices:
        raise UserError(
            f"multiple choice with {choices} choices needs as many held-out documents of {need} tokens or more;"
            f" there are {len(documents)}: evaluate.choices, evaluate.context_tokens or data.held_out_share"
        )
    items = []
    for _ in range(number):
        own, *others = random.choice(len(documents), choices, replace=False)
        at = random.integers(0, len(documents[own]) - need + 1)
        pieces = [documents[own][at + context_tokens : at + need]]
        for other in others:
            start = random.integers(0, len(documents[other]) - choice_tokens + 1)
            pieces.append(documents[other][start : start + choice_tokens])
        items.append((documents[own][at : at + context_tokens], pieces))
    return items


def wilson(right: int, number: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of which `right` of `number` were seen."""
    share, spread = right / number, z * z / number
    half = z * math.sqrt(share * (1 - share) / number + spread / number / 4)
    return tuple((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))


def piece_nats(
    model: torch.nn.Module, before: np.ndarray, pieces: list[np.ndarray], device: torch.device
) -> torch.Tensor:
    """-log p of each piece after the ids `before`."""
    rows = np.stack([np.concatenate([before, piece]) for piece in pieces]).astype(np.int64)
    return token_nats(model, torch.from_numpy(rows).to(device))[:, len(before) - 1 :].sum(dim=1).cpu()


def multiple_choice(model: torch.nn.Module, items: list, tokenizer, device: torch.device) -> list[dict]:
    """How often the true continuation scores best, for two scores. Collective: ranks share the items.

    "a byte" is the log-likelihood divided by the length, which prefers text that is likely anywhere; "gain" is how much
    likelier the context makes the piece than the start of a document does, which leaves only what the context says.
    """
    (rank, world), right = rank_and_world(), {"a byte": 0, "gain": 0}
    for context, pieces in items[rank::world]:
        nats = piece_nats(model, context, pieces, device)
        start = piece_nats(model, np.array([tokenizer.eos_token_id]), pieces, device)
        num_bytes = torch.tensor([max(1, len(tokenizer.decode(piece.tolist()).encode())) for piece in pieces])
        right["a byte"] += int((nats / num_bytes).argmin() == 0)
        right["gain"] += int((nats - start).argmin() == 0)
    rows, choices = [], len(items[0][1])
    for score, count in right.items():
        count = round(over_ranks(count, device, "sum"))
        low, high = wilson(count, len(items))
        rows.append({
            "score": score, "items": len(items), "choices": choices, "right": count, "accuracy": count / len(items),
            "interval_95": [low, high], "chance": 1 / choices, "beats_chance": low > 1 / choices,
        })  # fmt: skip
    return rows


@torch.no_grad()
def samples(model: torch.nn.Module, tokenizer, prompts: list[str], settings, device: torch.device) -> list[dict]:
    found = []
    for number, prompt in enumerate(prompts):
        torch.manual_seed(number)  # the same text on every machine of a kind
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings.sample_tokens, do_sample=True, top_k=50,
            temperature=settings.temperature, pad_token_id=tokenizer.eos_token_id, use_cache=True,
        )  # fmt: skip
        found.append({"prompt": prompt, "text": tokenizer.decode(made[0])})
    return found


def evaluate(model: torch.nn.Module, config: Config, device: torch.device) -> dict:
    """All four, as one report. Collective."""
    settings, tokenizer = config.evaluate, load_tokenizer(config.tokenizer.name)
    model = model.to(device).eval()
    blocks = load_blocks(config, "held_out", get_preset(config.model.preset).block_size)
    need = settings.context_tokens + settings.choice_tokens
    if need > blocks.block_size:
        raise UserError(
            f"evaluate.context_tokens + evaluate.choice_tokens is {need}, the model has {blocks.block_size}"
        )
    items = make_items(
        blocks.tokens,
        settings.items,
        settings.choices,
        settings.context_tokens,
        settings.choice_tokens,
        config.train.seed,
    )
    return {
        "data_manifest_sha256": json.loads((config.data_path / "manifest.json").read_text())["manifest_sha256"],
        "held_out": perplexity(model, blocks, device, settings.max_blocks, settings.micro_batch),
        "multiple_choice": multiple_choice(model, items, tokenizer, device),
        "samples": samples(model, tokenizer, settings.prompts if settings.sample_tokens else [], settings, device),
    }


def evaluate_run(config: Config) -> dict:
    """The last stage of a run: the report on its model/, read where these settings have been measured. Collective."""
    path, settings = config.run_path / "evaluation.json", config.evaluate.model_dump()
    report = from_rank_0(lambda: json.loads(path.read_text()) if path.exists() else None)
    if report and report["settings"] == settings:
        print0(f"evaluate: done already | {show_path(path)}")
        return report
    device = torch.device(get_accelerator().current_device_name())
    report = {"settings": settings, **evaluate(load_model(config.run_path / "model", config), config, device)}
    if rank_and_world()[0] == 0:
        write_whole(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def print_report(report: dict) -> None:
    held_out = report["held_out"]
    print0(
        f"held out: {held_out['nats_per_token']:.4f} nats a token over {held_out['tokens']:,} tokens"
        f" | perplexity {held_out['perplexity']:.2f} | {held_out['bits_per_byte']:.4f} bits a byte"
    )
    for row in report["multiple_choice"]:
        low, high = row["interval_95"]
        print0(
            f"multiple choice by likelihood {row['score']}: {row['right']} of {row['items']} = {row['accuracy']:.1%},"
            f" 95 % interval {low:.1%} to {high:.1%}, chance {row['chance']:.1%}"
            f" | {'beats chance' if row['beats_chance'] else 'not told apart from chance'}"
        )
    for sample in report["samples"]:
        print0(f"sample: {sample['text']!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--report", type=Path, help="JSON report (default: beside the model)")
    parser.add_argument("model", type=Path, help="folder of a transformers model, or of checkpoints")
    add_config_flags(parser)
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before the first collective
    if "RANK" in os.environ:
        start_without_compiler()
        deepspeed.init_distributed()
    device = torch.device(get_accelerator().current_device_name())
    report = {"model": show_path(args.model), "settings": config.evaluate.model_dump()}
    report |= evaluate(load_model(args.model, config), config, device)
    print_report(report)
    # A run's own model/ leaves what its last stage would have left; anything else must not be taken for that.
    own = "evaluation.json" if args.model.name == "model" else f"evaluation_{args.model.name}.json"
    path = args.report or args.model.parent / own
    if rank_and_world()[0] == 0:
        write_whole(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print0(f"report: {show_path(path)}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
