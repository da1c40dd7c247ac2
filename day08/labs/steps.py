"""Day 08: how long is a step of how many tokens? Without communication, with DDP, with ZeRO-0, 1 and 2.

From the repository root, on two CPU processes or two GPUs (knee.py and scaling.py start it on other worlds):

    deepspeed --num_accelerators 2 day08/labs/steps.py --models tiny --tokens 128 512
    deepspeed --num_accelerators 2 day08/labs/steps.py --models gpt2 --block 1024 --tokens 1024 8192 --bucket_mib 25

Expect a row for each model and number of tokens per rank, then where the all-reduce takes as long as the backward
pass: predicted from the fitted link and one timed backward pass, and measured. Written as steps.json.
Checked with deepspeed 0.19.8 and torch 2.13.0. Source: day08/cost.py, day08/ways.py.
"""

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.timing import take_turns, time_step
from bench.world import join_world
from common.data import TokenBlocks, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from day08.cost import MIB, SIZES, Cost, fit, measure_all_reduce
from day08.ways import WAYS, build_step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "mini"], help="presets of common/model.py")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[w for w in WAYS if w != "hand"], help="of ways.py")
    parser.add_argument("--tokens", nargs="+", type=int, default=None, help="tokens per rank; else around the knee")
    parser.add_argument("--around", nargs="+", type=float, default=[0.4, 0.8, 1.6], help="times predicted knee")
    parser.add_argument("--block", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--turns", type=int, default=6, help="steps of each way, the first of them to warm up")
    parser.add_argument("--bucket_mib", type=int, default=1, help="MiB of gradients in a bucket")
    parser.add_argument("--sizes_mib", nargs="+", type=int, default=[1, 2, 4, 8], help="all-reduces to fit, MiB")
    parser.add_argument("--rate", default=None, help="set for the ranks on a link: its speed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day08"), help="folder for steps.json")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def batch_of(blocks: TokenBlocks, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`tokens` of the corpus as whole sequences, other ones on each rank."""
    count = max(1, tokens // blocks.block_size)
    first = dist.get_rank() * count
    ids = torch.stack([blocks[(first + i) % len(blocks)]["input_ids"] for i in range(count)])
    return to_device({"input_ids": ids, "labels": ids}, device)


def backward_s(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one backward pass alone."""
    loss = model(**batch).loss
    seconds, _ = time_step(loss.backward)
    model.zero_grad()
    return seconds


def fastest_ms(seconds: list[float], device: torch.device) -> float:
    """The shortest of `seconds` in ms, on the rank where it is longest: what else a machine does only adds. Collective.

    A sum of ranks that wait for each other needs it: they meet the delays of both, which a median would count in.
    """
    return 1e3 * over_ranks(min(seconds), device, "max")


def crossing(rows: list[dict]) -> float | None:
    """Tokens at which the time that ZeRO-0 shows is that of the backward pass; None when no two rows enclose it."""
    points = [(math.log(row["tokens"]), math.log(row["backward_ms"] / max(row["exposed_ms"], 1e-3))) for row in rows]
    points.sort()
    for (x, y), (next_x, next_y) in zip(points, points[1:], strict=False):
        if y <= 0 < next_y:
            return math.exp(x + (next_x - x) * -y / (next_y - y))
    return None


def measure_row(steps: dict, model: torch.nn.Module, batch: dict, turns: int) -> dict:
    """Milliseconds of a step of each way, and of a backward pass alone. Collective."""
    device = batch["input_ids"].device
    cases = {}
    for way, step in steps.items():
        cases |= {f"before {way}": dist.barrier, way: partial(step, batch)}  # or one rank's delay is the next way's
    cases |= {"before": dist.barrier, "backward": partial(backward_s, model, batch)}
    runs = take_turns(cases, turns)
    row = {f"{way}_ms": fastest_ms([seconds for seconds, _ in runs[way][1:]], device) for way in steps}
    if {"none", "zero0"} <= set(steps):
        row["exposed_ms"] = row["zero0_ms"] - row["none_ms"]
    return row | {"backward_ms": fastest_ms([found for _, found in runs["backward"][1:]], device)}


def measure_model(name: str, cost: Cost | None, table: Table, args: argparse.Namespace, device: torch.device) -> dict:
    """A row for each number of tokens; return the model's knee, predicted and measured. Collective."""
    kept = live_tensors(device)
    tokenizer = load_tokenizer(get_preset(name).tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, args.block)
    ranks = dist.get_world_size()

    def new_model() -> torch.nn.Module:
        torch.manual_seed(args.seed)
        return build_model(name, len(tokenizer)).to(device)

    model = new_model()
    num_params = sum(parameter.numel() for parameter in model.parameters())
    tokens = max(args.tokens or [16 * args.block])
    batch = batch_of(blocks, tokens, device)
    spent = fastest_ms([backward_s(model, batch) for _ in range(5)], device) / 1e3
    flops_per_s = 4 * num_params * batch["input_ids"].numel() / spent
    knee = {"model": name, "num_params": num_params, "flops_per_s": flops_per_s, "predicted": None, "measured": None}
    if cost:
        knee["predicted"] = cost.knee_tokens(flops_per_s, ranks)
        knee["all_reduce_ms"] = 1e3 * cost.all_reduce_s(4 * num_params, ranks)
    around = (
        [max(1, round(knee["predicted"] * times / args.block)) * args.block for times in args.around] if cost else []
    )
    steps = {way: build_step(way, new_model(), args.bucket_mib) for way in args.ways}
    rows = []
    for tokens in args.tokens or sorted(set(around)):
        row = {"case": f"{name}, {tokens:,}", "model": name, "tokens": tokens}
        row |= measure_row(steps, model, batch_of(blocks, tokens, device), args.turns)
        rows.append(row)
        table.add(row)
    if cost and all("exposed_ms" in row for row in rows):
        knee["measured"] = crossing(rows)
    for step in steps.values():
        if hasattr(step, "engine"):
            step.engine.destroy()
    steps.clear()
    free(device, kept)
    return knee


def main() -> None:
    args = parse_args()
    if args.turns < 2:
        raise UserError(f"--turns {args.turns}: at least 2, as the first is not timed")
    device = join_world()
    ranks = dist.get_world_size()
    if device.type == "cpu":
        torch.set_num_threads(max(1, os.cpu_count() // ranks))  # the ranks share the cores
    else:
        torch.set_float32_matmul_precision("high")  # TF32
    cost = None
    if ranks > 1:
        sizes = SIZES[:1] + [size * MIB for size in args.sizes_mib]
        cost = fit(measure_all_reduce(sizes, device), ranks)
    columns = {f"{way} ms": f"{way}_ms:,.1f" for way in [*args.ways, "backward"]}
    table = Table(Path(args.run_dir) / "steps.json", columns, ranks=ranks)
    knees = []
    for name in args.models:
        knees.append(measure_model(name, cost, table, args, device))
        table.save(knees=knees, alpha_s=cost and cost.alpha_s, bytes_per_s=cost and cost.bytes_per_s)
    for knee in knees if cost else []:
        shown = f"{knee['measured']:,.0f}" if knee["measured"] else "outside"
        print0(f"knee of {knee['model']}: predicted {knee['predicted']:,.0f} tokens per rank | measured {shown}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
