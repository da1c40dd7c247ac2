"""Day 22: fine-tuning - a pretrained model under ZeRO-3 from its first byte on, loss on answers only, saved for all.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day22/train.py
    deepspeed --num_accelerators 2 day22/train.py --dataset moby_dick
    deepspeed --num_accelerators 2 day22/train.py --pretrained tiny-llama --lr 0.001 --packing

Expect the share that each rank loaded, answers before and after, a held-out loss that falls, and the saved folder.
Checked with deepspeed 0.19.8. Source: https://huggingface.co/docs/transformers/deepspeed, non-Trainer integration.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from math import exp
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers.integrations import HfDeepSpeedConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Take pretrained.py, dialogues.py, chat_data.py and packing.py along, and replace what is common.
from common.cpu import start_without_compiler
from common.data import to_device
from common.errors import UserError, clear_errors
from common.ranks import over_ranks, print0, require_launcher
from common.run_log import RunLog, default_run_dir, show_path
from config.read import read_config
from day22.chat_data import answers, collate, endless_order, held_out_loss, load_chat
from day22.dialogues import questions_of
from day22.packing import packed_batches, samples_of, seen_across_borders, tokens_of
from day22.pretrained import grow_vocabulary, load_model, load_tokenizer

QUESTIONS = ["What is a chat robot?", "Who wrote Hamlet?"]  # the first is held out, the second is in no data


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=4, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day22"), help="folder for metrics.jsonl and plots")
    parser.add_argument(
        "--pretrained", default="smollm2", help="smollm2, a preset of pretrained.py, a folder, a hub name"
    )
    parser.add_argument(
        "--dataset", default="chat", help="chat, texts, texts-zh, a file, a hub data set, or a corpus of plain text"
    )
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sample")
    parser.add_argument(
        "--too_long", default="drop", choices=["drop", "truncate"], help="what becomes of longer samples"
    )
    parser.add_argument("--packing", action="store_true", help="several samples a row of --max_length tokens")
    parser.add_argument("--attention", help="transformers' attn_implementation: sdpa, flex_attention, ...")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the config's)")
    parser.add_argument("--freeze", type=int, default=0, help="freeze the embedding and the first N layers")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing of every layer")
    parser.add_argument("--new_tokens", type=int, default=16, help="length of the sample answers; 0 leaves them out")
    parser.add_argument("--questions", help="file of questions for the sample answers, one a line, or of dialogues")
    parser.add_argument("--naive", action="store_true", help="load the whole model on every rank, then partition")
    return parser.parse_args()


def freeze(model: torch.nn.Module, num_layers: int) -> None:
    """Freeze the embedding and the first layers. With tied weights the output projection is frozen as well."""
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    if not 0 < num_layers < len(layers):
        raise UserError(f"--freeze {num_layers}: the model has {len(layers)} layers, freeze 1 to {len(layers) - 1}")
    for part in (model.get_input_embeddings(), *layers[:num_layers]):
        part.requires_grad_(False)


def parameter_groups(model: torch.nn.Module) -> list[dict]:
    """What is trained, in two groups: matrices decay as the JSON says, norms and biases do not."""
    groups = {True: [], False: []}
    for parameter in (p for p in model.parameters() if p.requires_grad):  # AdamW's states are made for these alone
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the parameter itself is empty
        groups[len(shape) > 1].append(parameter)
    groups = [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_engine(args: argparse.Namespace, tokenizer) -> deepspeed.DeepSpeedEngine:
    """Load the model in parts, choose what is trained, hand it to DeepSpeed, show what this rank has. Collective."""
    config = read_config(args.deepspeed_config, needs=["optimizer"])
    if "total_num_steps" in config.get("scheduler", {}).get("params", {}):
        config["scheduler"]["params"]["total_num_steps"] = args.steps  # the cosine ends where the run ends
    if args.lr is not None:
        config["optimizer"].setdefault("params", {})["lr"] = args.lr

    # (1) from_pretrained looks for a live HfDeepSpeedConfig: at stage 3 it then builds and fills the model in parts.
    partitioned = None if args.naive else HfDeepSpeedConfig(config)  # noqa: F841 - lives as long as this function
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    model = load_model(args.pretrained, dtype, args.attention)
    grow_vocabulary(model, tokenizer)  # for tokens that were added to it
    if args.freeze:
        freeze(model, args.freeze)
    if args.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    groups = parameter_groups(model)
    trained = sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group["params"])
    loaded = sum(getattr(p, "ds_tensor", p).numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    print0(
        f"zero stage {engine.zero_optimization_stage()} | {args.pretrained}: {total:,} parameters, {trained:,} trained"
        f" | this rank loaded {loaded:,} = 1/{total / loaded:.2f} | {next(model.parameters()).dtype}"
        f" | {engine.device.type}"
    )
    return engine


def micro_batches(args: argparse.Namespace, engine: deepspeed.DeepSpeedEngine, items: list, pad: int) -> Iterator[dict]:
    """This rank's micro-batches, for ever: a sample a row, or packed. Collective: it looks whether borders hold."""
    size = engine.train_micro_batch_size_per_gpu()
    if not args.packing:
        return (collate([items[i] for i in chosen], pad) for chosen in endless_order(items, size, args.seed))
    flat = (args.attention or "").startswith("flash")
    first = next(packed_batches(items, size, args.max_length, pad, args.seed, flat))
    seen, places = seen_across_borders(engine, to_device(first, engine.device)), first["input_ids"].numel()
    print0(
        f"packing | {size} rows of {args.max_length} tokens a rank | {samples_of(first)} samples and"
        f" {1 - tokens_of(first) / places:.1%} padding in the first of them | seen across borders: {seen:.0e}"
    )
    if seen > 1e-3:
        raise UserError("--packing: with this model and --attention the samples of a row see each other, leave one out")
    return packed_batches(items, size, args.max_length, pad, args.seed, flat)


@torch.no_grad()
def show_answers(engine: deepspeed.DeepSpeedEngine, tokenizer, questions: list, new_tokens: int) -> None:
    """Print answers to `questions`, in one batch. Collective: at stage 3 each forward pass gathers every layer."""
    model = engine.module
    texts = [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in questions]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    length = batch["input_ids"].shape[1]
    model.eval()
    out = model.generate(
        **to_device(batch, engine.device), max_new_tokens=new_tokens, do_sample=False, use_cache=True,
        # A rank whose answers have ended goes on until all have, or the others wait for it at the next layer for ever.
        # Left out, `transformers` sets this while a HfDeepSpeedConfig of stage 3 lives, and none lives any more.
        synced_gpus=engine.zero_optimization_stage() == 3,
    )  # fmt: skip
    model.train()
    for turns, ids in zip(questions, out, strict=True):
        asked, answer = turns[-1].get("content", ""), tokenizer.decode(ids[length:], skip_special_tokens=True)
        print0(f"{' '.join(asked.split())} -> {answer.strip()!r}")


def save(engine: deepspeed.DeepSpeedEngine, tokenizer, folder: Path) -> None:
    """Write what `from_pretrained` loads, at every stage. Collective: one parameter after the other is made whole.

    Plain `save_pretrained` at stage 3 writes tensors of shape [0], as `state_dict()` has them.
    """
    engine.empty_partition_cache()  # stage 3: `generate` leaves parameters half gathered, the next gather would raise
    model, weights = engine.module, {}
    for name, parameter in model.named_parameters():  # tied weights once: save_pretrained knows what is tied
        with deepspeed.zero.GatheredParameters([parameter]):
            if engine.global_rank == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    if engine.global_rank == 0:
        model.config.use_cache = True
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    dist.barrier()


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    tokenizer = load_tokenizer(args.pretrained)
    train_items, held_out_items = load_chat(args.dataset, tokenizer, args.max_length, args.too_long)
    given = [[{"role": "user", "content": question}] for question in QUESTIONS]
    questions = questions_of(args.questions) if args.questions else given
    engine = build_engine(args, tokenizer)
    device, pad = engine.device, tokenizer.pad_token_id

    chats = args.new_tokens > 0 and tokenizer.chat_template is not None
    if chats:
        show_answers(engine, tokenizer, questions, args.new_tokens)
    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    log.held_out(0, before := held_out_loss(engine, held_out_items, pad, device))
    stream, accumulation = micro_batches(args, engine, train_items, pad), engine.gradient_accumulation_steps()
    for step in range(1, args.steps + 1):
        batches = [next(stream) for _ in range(accumulation)]
        # (2) Every answer token of the step counts the same, whichever micro-batch or rank it lies in. The engine takes
        # the mean over micro-batches and ranks, so each loss is a sum divided by the mean number of tokens of them.
        count = over_ranks(sum(map(answers, batches)), device, "mean") / accumulation
        local_loss = 0.0
        for batch in batches:
            loss = engine(**to_device(batch, device), num_items_in_batch=count).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=sum(map(tokens_of, batches)))
    log.held_out(args.steps, after := held_out_loss(engine, held_out_items, pad, device))
    log.close()
    print0(f"held-out perplexity {exp(before):.2f} -> {exp(after):.2f}, {before - after:+.4f} nats a token gained")
    if chats:
        show_answers(engine, tokenizer, questions, args.new_tokens)
    save(engine, tokenizer, Path(args.run_dir) / "model")  # (3)
    print0(f"saved: {show_path(args.run_dir)}/model, for AutoModelForCausalLM.from_pretrained")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
