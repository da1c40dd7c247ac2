"""Day 14: which config is faster on my model? By turns in random order; the ratio with its interval, and a verdict.

From the repository root (this one starts the launcher itself, on all accelerators or on two CPU ranks):

    python day14/labs/compare.py day14/ds_config.json day14/ds_config_zero2.json
    python day14/labs/compare.py a.json b.json c.json --model my_model.py:build --difference 0.02 --turns 60
    deepspeed --num_accelerators 2 day14/labs/compare.py day14/ds_config.json day14/ds_config_micro4.json

Expect what each takes; then for each config after the first its tokens/s, the ratio to the first with a 99 % interval,
the largest difference of their losses, and the verdict: faster, slower, or cannot tell (needs n more). compare.json and
compare.png have the same.
All engines stay in memory and take turns; when they do not fit together, --one_at_a_time builds them anew each turn.
Checked with deepspeed 0.19.8. Source: day14/stats.py, which explains the verdict; --model takes also: day14/cases.py.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensor_bytes, live_tensors
from bench.memory import free
from bench.table import Table
from bench.timing import losses_apart, time_step
from bench.world import default_ranks, join_world, launch_command
from common.errors import UserError, clear_errors
from common.plots import save_plot
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.read import read_config
from day12.resources import peak_flops
from day14.cases import Case, Workload, load_workload, mean_over_ranks, per_million_tokens, refuse_unequal_batches
from day14.stats import CONFIDENCE, MIN_TURNS, judge, turn_orders

COLUMNS = {
    "ZeRO": "zero_stage:d", "micro": "micro_batch:d", "accum": "accumulation:d", "peak MB": "peak_bytes:MB",
    "TFLOP/step": "tflop:.4f", "first loss": "losses.0:.4f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG.json", help="two or more; the first is the baseline")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--turns", type=int, default=30, help="turns of all configs that are counted")
    parser.add_argument("--window", type=int, default=2, help="optimizer steps that a config takes in its turn")
    parser.add_argument("--warm_up", type=int, default=3, help="optimizer steps before its first turn")
    parser.add_argument("--difference", type=float, default=0.05, help="the difference that matters, 0.05 for 5 %%")
    parser.add_argument("--one_at_a_time", action="store_true", help="build each config anew in each turn: less memory")
    parser.add_argument("--price", type=float, help="dollars per device and hour, for the cost")
    parser.add_argument("--seq_len", type=int, help="tokens of a sequence (default: what the model takes)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day14"), help="folder for compare.json and compare.png")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    args = parser.parse_args()
    if len(args.configs) < 2:
        raise UserError(f"one config, {args.configs[0]}: name the one to compare it with as well")
    if args.turns < MIN_TURNS:
        raise UserError(f"--turns {args.turns}: {MIN_TURNS} or more, from fewer nothing can be concluded")
    return args


def configs_by_name(paths: list[str]) -> dict[str, dict]:
    """The configs, each under its file's name; twice the same file is a config against itself."""
    configs = {}
    for path in paths:
        name = Path(path).stem
        while name in configs:
            name += "'"
        configs[name] = read_config(path, needs=["optimizer.type"])
    return configs


def first_steps(case: Case, row: dict, warm_up: int) -> None:
    """Warm up, count the model's FLOPs, and see what the rank with most has at its peak. Collective."""
    engine, device = case.engine, case.device
    row |= {"zero_stage": engine.zero_optimization_stage(), "micro_batch": engine.train_micro_batch_size_per_gpu()}
    row["accumulation"] = engine.gradient_accumulation_steps()
    loss, flops = case.counted_step()
    losses = [loss, *case.window(warm_up)]
    row |= {"flops": flops, "tflop": flops / 1e12, "losses": mean_over_ranks(losses, device)}


def build(name: str, config: dict, workload: Workload, table: Table, device: torch.device, args) -> Case | None:
    """Build a case and fill its row; None when it does not fit into memory."""
    kept, case = live_tensors(device), None
    held = live_tensor_bytes(device) if device.type == "cpu" else get_accelerator().memory_allocated()
    with table.row(name) as row:
        case = Case(name, config, workload, device, args.seed)
        first_steps(case, row, args.warm_up)
        row["peak_bytes"] = over_ranks(case.peak_bytes(held), device, "max")
        row |= {"samples": case.engine.train_batch_size(), "tokens": case.tokens_per_step}
    if "error" in row or args.one_at_a_time:
        if case:
            case.close()
        del case
        free(device, kept)
        return None
    return case


def take_random_turns(cases: dict[str, Case | None], make: Callable, device: torch.device, args) -> dict[str, tuple]:
    """{case: (seconds per optimizer step, of the slowest rank, turn by turn; losses)}. Collective.

    The first turn's seconds are not counted. A case that is None is made for its turn and given back after it.
    """
    seconds = {name: [] for name in cases}
    losses = {name: [] for name in cases}
    for order in turn_orders(list(cases), args.turns + 1, args.seed):
        for name in order:
            kept = live_tensors(device) if cases[name] is None else None
            case = cases[name] or make(name)
            spent, found = time_step(lambda case=case: case.window(args.window))
            seconds[name].append(over_ranks(spent, device, "max") / args.window)
            losses[name] += mean_over_ranks(found, device)
            if kept is not None:
                case.close()
                del case
                free(device, kept)
    return {name: (seconds[name][1:], losses[name]) for name in cases}


def conclude(rows: list[dict], runs: dict, device: torch.device, args: argparse.Namespace) -> None:
    """Fill each row with speed, cost, and what may be said of it beside the first; print it."""
    ranks, peak = dist.get_world_size(), peak_flops(device)
    baseline_s, baseline_losses = runs[rows[0]["case"]]
    unit = "tok/s" if rows[0]["tokens"] > rows[0]["samples"] else "samples/s"
    for row in rows:
        step_s, losses = runs[row["case"]]
        median_s = median(step_s)
        row |= {"step_s": step_s, "losses": losses, "tokens_per_s": row["tokens"] / median_s}
        row |= {"losses_apart": losses_apart(losses, baseline_losses), "mfu": peak and row["flops"] / median_s / peak}
        row |= per_million_tokens(row["tokens_per_s"], ranks, args.price)
        speed = f"{row['case']:24}{row['tokens_per_s']:12,.0f} {unit}"
        speed += f" | MFU {row['mfu']:.1%}" if peak else ""
        speed += f" | {row['dollars_per_mtoken']:.4f} $ per million" if args.price is not None else ""
        if row is rows[0]:
            print0(f"{speed} | the others are compared with this one")
            continue
        verdict = judge(baseline_s, step_s, args.difference, comparisons=len(rows) - 1)
        row |= vars(verdict) | {"verdict": verdict.text}
        print0(
            f"{speed} | {verdict.ratio:.3f} ({verdict.low:.3f} to {verdict.high:.3f}) | losses apart"
            f" {row['losses_apart']:.1e} | {verdict.text}"
        )


def plot_intervals(rows: list[dict], path: Path, title: str) -> None:
    """A line for each config: its ratio to the first, and between which bounds that lies."""
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.5 * len(rows)))
    for at, row in enumerate(rows):
        axes.plot([row["low"], row["high"]], [at, at], "-", linewidth=3, color=f"C{at}")
        axes.plot(row["ratio"], at, "o", color=f"C{at}")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['case']}\n{row['verdict']}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel="speed, the first config = 1 (right: faster)", title=title)
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    configs = configs_by_name(args.configs)
    if "RANK" not in os.environ:  # started with plain python: begin anew under the launcher
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks on one CPU share its cores
        command = launch_command(default_ranks(), *sys.argv)
        os.execv(command[0], command)
    device = join_world()
    batch = refuse_unequal_batches(configs)
    workload = load_workload(args.model, args.corpus, args.seq_len, args.seed, device)
    print0(f"{args.model} | {dist.get_world_size()} ranks | batch {batch} samples of {workload.tokens:,} tokens")
    table = Table(Path(args.run_dir) / "compare.json", COLUMNS, width=24, model=args.model, batch=batch)
    cases = {name: build(name, config, workload, table, device, args) for name, config in configs.items()}
    rows = [row for row in table.rows if "error" not in row]
    if len(rows) < 2:
        raise UserError("fewer than two configs fit into memory together: --one_at_a_time, or a smaller micro-batch")

    def make(name: str) -> Case:
        case = Case(name, configs[name], workload, device, args.seed)
        case.window(args.warm_up)
        return case

    print0(f"{args.turns} turns of {args.window} steps, in random order; ratios with {CONFIDENCE:.0%} intervals")
    runs = take_random_turns({row["case"]: cases[row["case"]] for row in rows}, make, device, args)
    conclude(rows, runs, device, args)
    table.save(turns=args.turns, window=args.window, difference=args.difference)
    if dist.get_rank() == 0:
        title = f"{args.model}, {dist.get_world_size()} ranks, {args.turns} turns"
        plot_intervals(rows[1:], Path(args.run_dir) / "compare.png", title)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
