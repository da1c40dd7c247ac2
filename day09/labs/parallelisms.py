"""Day 09: parallelisms - one model, one batch a step, six ways to cut it over the ranks, and one loss curve.

From the repository root, on four CPU processes or four GPUs:

    deepspeed --num_accelerators 4 day09/labs/parallelisms.py

Expect a row for each way: how far its losses are from those of the whole model in one process, parameters and bytes
sent on the rank with most; parallelisms.json, and parallelisms.png with all curves on top of each other.
Checked with deepspeed 0.19.8. Source: days 05 to 07 (DP, ZeRO), 15 (PP), this day (TP, EP, SP).
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import deepspeed
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.timing import losses_apart
from bench.traffic import count_traffic
from bench.world import join_world
from common.data import load_corpus, load_tokenizer
from common.errors import UserError, clear_errors
from common.plots import save_plot
from common.ranks import over_ranks
from common.run_log import default_run_dir
from day09.messages import sent_bytes
from day09.models import as_layers, build_model, next_token_loss
from day09.sequence import piece_of, weighted_loss

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
# AutoTP does not know how to cut a Mixtral's experts: named matrices only, the experts stay whole on each rank.
ATTENTION = [
    {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"},
    {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"},
]
COLUMNS = {
    "from whole": "from_whole:.1e", "parameters": "parameters:,", "sent MB": "sent_bytes:MB",
    "last loss": "losses.-1:.4f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps (not micro-batches)")
    parser.add_argument("--global_batch", type=int, default=8, help="sequences per step, over all ranks")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day09"), help="folder for parallelisms.json and the plot")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def config_for(micro_batch: int, stage: int, accumulation: int = 1, **more: object) -> dict:
    sizes = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation}
    optimizer = {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}}
    return {**sizes, "gradient_clipping": 1.0, "optimizer": optimizer, "zero_optimization": {"stage": stage}, **more}


def by_rows(model, config: dict, part: int, parts: int) -> tuple:
    """DP, ZeRO, TP and EP: the usual loop; this rank takes rows `part` of `parts` of the batch."""
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(ids: torch.Tensor) -> float:
        mine = ids.chunk(parts)[part]
        loss = engine(input_ids=mine, labels=mine).loss
        engine.backward(loss)
        engine.step()
        return over_ranks(loss.item(), ids.device)

    return engine, step


def by_layers(model, config: dict) -> tuple:
    """PP: a stage on each rank; all read all rows, the first the tokens, the last the labels."""
    ranks, layers = dist.get_world_size(), as_layers(model)
    if ranks > len(layers):
        raise UserError(f"{ranks} ranks are more than the {len(layers)} layers of this model: fewer ranks")
    pipeline = PipelineModule(layers, num_stages=ranks, loss_fn=next_token_loss, partition_method="uniform")
    engine, *_ = deepspeed.initialize(model=pipeline, model_parameters=pipeline.parameters(), config=config)
    return engine, lambda ids: engine.train_batch(iter([(x, x) for x in ids.chunk(engine.micro_batches)])).item()


def by_tokens(model, config: dict, tokens: int) -> tuple:
    """SP: every rank reads its piece of each row. The last case: attention stays Ulysses' in this process."""
    ranks, batch = dist.get_world_size(), config["train_micro_batch_size_per_gpu"]
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", ranks, batch, seq_length=tokens, seq_length_is_variable=False
    )
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, mpu=mpu)

    def step(ids: torch.Tensor) -> float:
        inputs, labels = piece_of(ids, dist.get_rank(), ranks)
        loss = weighted_loss(engine(**inputs).logits, labels, mpu.get_sequence_parallel_group())
        engine.backward(loss)
        engine.step()
        return over_ranks(loss.item(), ids.device, "sum")  # each rank has its share

    return engine, step


def all_cases(batch: int, tokens: int) -> dict[str, Callable]:
    """{way: a function of the whole model that returns (engine, train step)}.

    First the ways without groups of their own: those of PP, TP and SP stay in the process for every later engine.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    each = batch // ranks
    tensor = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": ATTENTION}}
    experts = {"enabled": True, "autoep_size": ranks, "preset_model": "mixtral", "use_grouped_mm": False}  # fp32
    rows, pairs = {"part": rank, "parts": ranks}, {"part": rank // 2, "parts": ranks // 2}
    return {
        f"DP {ranks}": partial(by_rows, config=config_for(each, 0), **rows),
        f"ZeRO-3 {ranks}": partial(by_rows, config=config_for(each, 3), **rows),
        f"EP {ranks}": partial(by_rows, config=config_for(each, 1, expert_parallel=experts), **rows),
        f"PP {ranks}": partial(by_layers, config=config_for(each, 1, accumulation=ranks)),
        f"TP 2 x DP {ranks // 2}": partial(by_rows, config=config_for(2 * each, 1, tensor_parallel=tensor), **pairs),
        f"SP {ranks}": partial(by_tokens, config=config_for(batch, 1, sequence_parallel_size=ranks), tokens=tokens),
    }


def train_whole(model, batches: list[torch.Tensor], device: torch.device) -> list[float]:
    """Plain PyTorch, one process: rank 0 trains the whole model on the whole batch, and tells the others its losses."""
    losses = [None]
    if dist.get_rank() == 0:
        optimizer, losses = torch.optim.AdamW(model.parameters(), **ADAMW), [[]]
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[0].append(loss.item())
    dist.broadcast_object_list(losses, 0)
    return losses[0]


def draw(rows: list[dict], path: Path) -> None:
    """All losses in one pair of axes, each later curve thinner than those below it; under it how far they are apart."""
    figure, (above, below) = plt.subplots(2, figsize=(7, 6), sharex=True, height_ratios=[3, 1])
    for number, row in enumerate(rows):
        steps = range(1, len(row["losses"]) + 1)
        width = 2 * (len(rows) - number)
        above.plot(steps, row["losses"], linewidth=width, label=row["case"], solid_capstyle="butt")
        if number:
            apart = [abs(a - b) for a, b in zip(row["losses"], rows[0]["losses"], strict=True)]
            below.plot(steps, apart, color=above.lines[-1].get_color())
    above.set(ylabel="loss (nats a token)", title="One model, one batch a step, six ways to cut it")
    above.grid(alpha=0.3)
    above.legend()
    below.set(xlabel="optimizer step", ylabel="from the whole", yscale="symlog")
    below.set_yscale("symlog", linthresh=1e-6)
    save_plot(figure, below, path)


def main() -> None:
    args = parse_args()
    device = join_world()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks % 2 or args.global_batch % ranks or args.tokens % ranks:
        sizes = f"--global_batch {args.global_batch} --tokens {args.tokens}"
        raise UserError(f"{ranks} ranks, {sizes}: an even number of ranks, which divides both")
    blocks, _ = load_corpus(args.corpus, load_tokenizer("bpe4096"), args.tokens)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(args.seed)).tolist()
    rows = [blocks[order[i % len(order)]]["input_ids"] for i in range(args.steps * args.global_batch)]
    batches = list(torch.stack(rows).to(device).split(args.global_batch))

    def fresh():
        torch.manual_seed(args.seed)
        return build_model("mixtral", args.model, 4096).to(device)

    table = Table(Path(args.run_dir) / "parallelisms.json", COLUMNS, ranks=ranks)
    whole = {"losses": train_whole(fresh(), batches, device), "from_whole": 0.0, "sent_bytes": 0}
    table.add({"case": "whole", **whole, "parameters": sum(p.numel() for p in fresh().parameters())})
    for case, build in all_cases(args.global_batch, args.tokens).items():
        kept, losses = live_tensors(device), []
        engine, step = build(fresh())
        for number, ids in enumerate(batches):
            with count_traffic(enabled=number == 1) as traffic:
                losses.append(step(ids))
            if number == 1:
                sent, calls = sent_bytes(traffic.calls, 2 if case.startswith("TP") else ranks), traffic.calls
        held = sum(getattr(p, "ds_tensor", p).numel() for p in engine.module.parameters())
        row = {"case": case, "losses": losses, "from_whole": losses_apart(losses, whole["losses"])}
        row |= {"parameters": int(over_ranks(held, device, "max")), "sent_bytes": over_ranks(sent, device, "max")}
        table.add(row | {"messages_of_rank_0": calls})
        engine.destroy()
        free(device, kept)
    if rank == 0:
        draw(table.rows, Path(args.run_dir) / "parallelisms.png")
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
