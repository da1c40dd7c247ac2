"""Day 14: time to a target loss - which config is there first? For configs whose batches differ, the fair question.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day14/labs/target.py
    deepspeed --num_accelerators 2 day14/labs/target.py --configs a.json b.json --target_loss 5.5 --seeds 0 1 2

Expect a line for each run, then for each config tokens/s, and the tokens and seconds until the held-out loss was at the
target: the median over the seeds, with the smallest and the largest. target.json and target.png have the same. The
seconds are those of training, without evaluation.
Checked with deepspeed 0.19.8. Source: MLPerf Training, arXiv:1910.01500 (time to quality, runs with several seeds).
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.timing import time_step
from bench.world import join_world
from common.data import held_out_loss
from common.errors import UserError, clear_errors
from common.plots import save_plot
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.read import read_config
from day14.cases import Case, load_workload, per_million_tokens
from day14.stats import turn_orders

COLUMNS = {
    "batch": "batch:d", "tok/s": "tokens_per_s:,.0f", "steps": "steps:d", "tokens": "tokens:,d",
    "seconds": "seconds:.1f", "loss": "held_out_loss:.4f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = [str(HERE / f"ds_config{name}.json") for name in ("", "_batch32")]
    parser.add_argument("--configs", nargs="+", default=configs, help="DeepSpeed JSON configs to compare")
    parser.add_argument("--target_loss", type=float, default=6.3, help="held-out loss to be reached, nats a token")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of weights and data order")
    parser.add_argument("--sequences", type=int, default=1600, help="give up after so many sequences of all ranks")
    parser.add_argument("--eval_every", type=int, default=32, help="sequences between two looks at the held-out loss")
    parser.add_argument("--price", type=float, help="dollars per device and hour, for the cost")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day14"), help="folder for target.json and target.png")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--seq_len", type=int, help="tokens of a sequence (default: what the model takes)")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def train_to_target(row: dict, config: dict, seed: int, device: torch.device, args: argparse.Namespace) -> None:
    """Train until the held-out loss is at the target or the sequences are used up; fill the row. Collective."""
    workload = load_workload(args.model, args.corpus, args.seq_len, seed, device)
    case = Case(row["case"], config, workload, device, seed)
    batch = case.engine.train_batch_size()
    if args.eval_every % batch:
        raise UserError(f"--eval_every {args.eval_every} is no multiple of {row['config']}'s batch of {batch}")
    steps, seconds, curve = 0, 0.0, []
    while steps * batch < args.sequences and (not curve or curve[-1][1] > args.target_loss):
        spent, _ = time_step(lambda: case.window(args.eval_every // batch))
        seconds += over_ranks(spent, device, "max")
        steps = case.engine.global_steps
        curve.append((seconds, held_out_loss(case.engine, workload.held_out, device, max_blocks=64)))
    tokens = steps * case.tokens_per_step
    row |= {"batch": batch, "steps": steps, "tokens": tokens, "tokens_per_s": tokens / seconds, "curve": curve}
    row |= {"seconds": seconds, "held_out_loss": curve[-1][1], "reached": curve[-1][1] <= args.target_loss}
    case.close()


def summary(rows: list[dict], ranks: int, args: argparse.Namespace) -> list[dict]:
    """A row a config: medians over the seeds, the extremes of the seconds, and the cost."""
    found = []
    for config in dict.fromkeys(row["config"] for row in rows):
        runs = [row for row in rows if row["config"] == config and "error" not in row]
        if not runs or not all(row["reached"] for row in runs):
            found.append({"config": config, "reached": False})
            print0(f"{config:24} not reached on every seed: a higher --target_loss, or more --sequences")
            continue
        mine = {key: median(row[key] for row in runs) for key in ("tokens_per_s", "steps", "tokens", "seconds")}
        mine |= {"low_s": min(row["seconds"] for row in runs), "high_s": max(row["seconds"] for row in runs)}
        cost = per_million_tokens(mine["tokens_per_s"], ranks, args.price)
        mine |= {key.replace("_per_mtoken", ""): value * mine["tokens"] / 1e6 for key, value in cost.items()}
        found.append({"config": config, "reached": True, **mine})
        print0(
            f"{config:24} {mine['tokens_per_s']:10,.0f} tok/s | {mine['tokens']:,.0f} tokens | {mine['seconds']:.1f} s"
            f" ({mine['low_s']:.1f} to {mine['high_s']:.1f}) | {mine['device_hours']:.5f} device hours"
        )
    return found


def draw(rows: list[dict], path: Path, args: argparse.Namespace) -> None:
    """Held-out loss against seconds of training, a colour for each config, a line for each seed."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for at, config in enumerate(dict.fromkeys(row["config"] for row in rows)):
        for row in (row for row in rows if row["config"] == config and "error" not in row):
            label = f"{config}, batch {row['batch']}" if row["seed"] == args.seeds[0] else None
            axes.plot(*zip(*row["curve"], strict=True), "o-", markersize=3, color=f"C{at}", label=label)
    axes.axhline(args.target_loss, color="black", linewidth=1)
    axes.set(xlabel="seconds of training", ylabel="held-out loss (nats a token)", title="time to a target loss")
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    configs = {Path(path).stem: read_config(path, needs=["optimizer.type"]) for path in args.configs}
    device = join_world()
    facts = {"model": args.model, "target_loss": args.target_loss}
    table = Table(Path(args.run_dir) / "target.json", COLUMNS, width=28, **facts)
    orders = turn_orders(list(configs), len(args.seeds))
    for seed, order in zip(args.seeds, orders, strict=True):  # a seed is a turn
        for name in order:
            kept = live_tensors(device)
            with table.row(f"{name}, seed {seed}", config=name, seed=seed) as row:
                train_to_target(row, configs[name], seed, device, args)
            free(device, kept)
    table.save(summary=summary(table.rows, dist.get_world_size(), args))
    if dist.get_rank() == 0:
        draw(table.rows, Path(args.run_dir) / "target.png", args)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
