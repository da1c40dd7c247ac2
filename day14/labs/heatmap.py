"""Day 14: heat map - configs x micro-batch at one global batch: tokens/s in each cell, and which cells do not fit.

From the repository root, on two CPU processes or on GPUs:

    deepspeed --num_accelerators 2 day14/labs/heatmap.py
    deepspeed --num_accelerators 1 day14/labs/heatmap.py --model gpt2 --global_batch 64 --micro_batches 8 16 32 64 \
        --configs day14/ds_config_bf16.json day14/ds_config_fp32.json --limit_gib 40

Expect a line for each cell, in random order, then the table, heatmap.json and heatmap.png. Every cell trains the same
global batch: the accumulation makes up for a small micro-batch. --limit_gib lets a rank take that much and no more, as
a smaller card would; a cell that needs more says "out of memory" and the next one runs.
Checked with deepspeed 0.19.8. Source: bench/memory.py (limits); day 10 (micro-batch, accumulation, global batch).
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
from bench.memory import free, limit_memory
from bench.table import Table
from bench.timing import time_step
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.read import read_config
from day14.cases import Case, Workload, load_workload
from day14.stats import turn_orders

COLUMNS = {"accum": "accumulation:d", "tok/s": "tokens_per_s:,.0f"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = [str(HERE / f"ds_config{name}.json") for name in ("", "_zero2", "_zero3")]
    parser.add_argument("--configs", nargs="+", default=configs, help="DeepSpeed JSON configs to compare")
    parser.add_argument("--micro_batches", nargs="+", type=int, default=[1, 2, 4, 8], help="sequences a rank, columns")
    parser.add_argument("--global_batch", type=int, default=16, help="sequences of all ranks in an optimizer step")
    parser.add_argument("--limit_gib", type=float, help="memory of a rank in GiB (default: all there is)")
    parser.add_argument("--passes", type=int, default=2, help="times that every cell is built and timed")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (not micro-batches)")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--seq_len", type=int, help="tokens of a sequence (default: what the model takes)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day14"), help="folder for heatmap.json and heatmap.png")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def cell_config(config: dict, micro_batch: int, global_batch: int, ranks: int) -> dict:
    """`config` with this micro-batch and global batch; the accumulation follows."""
    if global_batch % (micro_batch * ranks):
        raise UserError(
            f"--global_batch {global_batch} is no multiple of a micro-batch of {micro_batch} on {ranks} ranks: no"
            " accumulation makes up the difference, and cells with other batches are another training"
        )
    config = {key: value for key, value in config.items() if key != "gradient_accumulation_steps"}
    return config | {"train_batch_size": global_batch, "train_micro_batch_size_per_gpu": micro_batch}


def time_cell(row: dict, config: dict, workload: Workload, device: torch.device, args: argparse.Namespace) -> None:
    """Build the cell, warm up, and fill the row with its speed. Collective."""
    limit_memory(args.limit_gib and int(args.limit_gib * 2**30), device)
    try:
        case = Case(row["case"], config, workload, device, args.seed)
        case.window(1)
        seconds, _ = time_step(lambda: case.window(args.steps))
        row["step_s"] = over_ranks(seconds, device, "max") / args.steps
        row["accumulation"] = case.engine.gradient_accumulation_steps()
        row["tokens_per_s"] = case.tokens_per_step / row["step_s"]
        case.close()
    finally:
        limit_memory(None, device)


def rehearse(cells: dict[str, tuple], workload: Workload, device: torch.device, args: argparse.Namespace) -> None:
    """Train a step of the first cell and forget it: what Python imports on first use must not count against a limit."""
    kept = live_tensors(device)
    name, (_, config) = next(iter(cells.items()))
    case = Case(name, config, workload, device, args.seed)
    case.step()
    case.close()
    del case
    free(device, kept)


def speeds_of(rows: list[dict]) -> dict[tuple[str, int], float | None]:
    """{(config, micro-batch): median tokens/s of the passes, None where one of them did not fit}."""
    found = {}
    for row in rows:
        found.setdefault((row["config"], row["micro_batch"]), []).append(
            None if "error" in row else row["tokens_per_s"]
        )
    return {cell: None if None in speeds else median(speeds) for cell, speeds in found.items()}


def draw(speeds: dict, configs: list[str], micro_batches: list[int], path: Path, title: str) -> None:
    """A cell's colour is its speed beside the fastest; cells that did not fit are white."""
    values = [[speeds[config, size] or float("nan") for size in micro_batches] for config in configs]
    fastest = max((speed for speed in speeds.values() if speed), default=1)
    figure, axes = plt.subplots(figsize=(2.5 + 1.2 * len(micro_batches), 1.4 + 0.7 * len(configs)))
    axes.imshow(values, cmap="viridis", vmin=0, vmax=fastest, aspect="auto")
    for y, config in enumerate(configs):
        for x, size in enumerate(micro_batches):
            speed = speeds[config, size]
            dark = speed and speed < 0.6 * fastest
            axes.text(x, y, f"{speed:,.0f}" if speed else "OOM", ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(len(micro_batches)), micro_batches)
    axes.set_yticks(range(len(configs)), configs)
    axes.set(xlabel="micro-batch (sequences a rank)", title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    args = parse_args()
    configs = {Path(path).stem: read_config(path, needs=["optimizer.type"]) for path in args.configs}
    device = join_world()
    ranks = dist.get_world_size()
    cells = {
        f"{name}, micro {size}": (
            {"config": name, "micro_batch": size},
            cell_config(config, size, args.global_batch, ranks),
        )
        for name, config in configs.items()
        for size in args.micro_batches
    }
    workload = load_workload(args.model, args.corpus, args.seq_len, args.seed, device)
    facts = {"model": args.model, "global_batch": args.global_batch, "limit_gib": args.limit_gib}
    table = Table(Path(args.run_dir) / "heatmap.json", COLUMNS, width=32, **facts)
    rehearse(cells, workload, device, args)
    for number, order in enumerate(turn_orders(list(cells), args.passes, args.seed)):
        for cell in order:  # a pass is a turn: what disturbs one cell meets the others as well
            known, config = cells[cell]
            if any("error" in row for row in table.rows if row["case"] == cell):
                continue
            kept = live_tensors(device)
            with table.row(cell, **known, number=number) as row:
                time_cell(row, config, workload, device, args)
            free(device, kept)
    speeds = speeds_of(table.rows)
    table.save(cells=[{"config": c, "micro_batch": m, "tokens_per_s": speed} for (c, m), speed in speeds.items()])
    print0(f"\ntokens/s, median of {args.passes} passes, by micro-batch")
    print0(" " * 32 + "".join(f"{size:>10}" for size in args.micro_batches))
    for name in configs:
        found = [speeds[name, size] for size in args.micro_batches]
        print0(f"{name:32}" + "".join(f"{speed:10,.0f}" if speed else f"{'OOM':>10}" for speed in found))
    if dist.get_rank() == 0:
        limit = f", {args.limit_gib:g} GiB a rank" if args.limit_gib else ""
        title = f"tokens/s: {args.model}, batch {args.global_batch}, {ranks} rank(s){limit}"
        draw(speeds, list(configs), args.micro_batches, Path(args.run_dir) / "heatmap.png", title)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
