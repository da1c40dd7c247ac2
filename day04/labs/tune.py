"""Day 04: tune - what single options do to speed and memory on this machine.

From the repository root (this one starts the launcher itself):

    python day04/labs/tune.py
    python day04/labs/tune.py --variants zero_optimization.stage=2 train_micro_batch_size_per_gpu=16 --steps 20

Each variant is train.py with one `--set`. Expect a table against the unchanged config, tune.json and speed.png.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/docs/config-json/
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

import torch

from common.errors import UserError, clear_errors
from common.plots import plot_bars
from common.results import this_command, write_results
from common.run_log import default_run_dir, read_rows, show_path

# One option each, or several joined by commas where one needs another.
VARIANTS = [
    "train_micro_batch_size_per_gpu=2",
    "train_micro_batch_size_per_gpu=32",
    "gradient_accumulation_steps=4",
    "zero_optimization.stage=0",
    "zero_optimization.stage=2",
    "zero_optimization.stage=3",
    "zero_optimization.reduce_bucket_size=50000,zero_optimization.allgather_bucket_size=50000",
    "zero_optimization.overlap_comm=true",
    "wall_clock_breakdown=true",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument(
        "--variants", nargs="+", default=VARIANTS, help="key=value[,key=value] of the config, one a run"
    )
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2, help="processes, or GPUs")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day04"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--port", type=int, default=29500, help="port on which rank 0 waits for the others")
    return parser.parse_args()


def measure(variant: str, run_dir: Path, args: argparse.Namespace) -> dict:
    """Run train.py with `variant` through the launcher; a variant that fails says so in its row."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", args.ranks]
    command += ["--master_port", args.port, HERE / "train.py", "--deepspeed_config", args.deepspeed_config]
    command += ["--steps", args.steps, "--log_every", 5, "--seed", args.seed, "--model", args.model]
    command += ["--run_dir", run_dir] + (["--set", *variant.split(",")] if variant else [])
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    row = {"variant": variant.replace("zero_optimization.", "") or "unchanged"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line or line.startswith("error: ")]
        return row | {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    rows = read_rows(run_dir)
    steps = [step for step in rows if "loss" in step]
    speed = median(step["tokens_per_s"] for step in steps[1:] or steps)  # the first line pays for starting up
    return row | {"tokens_per_s": speed, "held_gib": rows[-1]["held_gib"], "peak_gib": steps[-1]["memory_gib"]}


def main() -> None:
    args = parse_args()
    run_dir, table = Path(args.run_dir), []
    print(f"{'variant':64} {'tok/s':>9} {'relative':>8} {'held GiB':>9} {'peak GiB':>9}")
    for number, variant in enumerate(["", *args.variants]):
        row = measure(variant, run_dir / str(number), args)
        if not variant and "error" in row:
            raise UserError(f"the unchanged config does not train, so nothing can be compared: {row['error']}")
        row["relative"] = row["tokens_per_s"] / (table or [row])[0]["tokens_per_s"] if "error" not in row else None
        table.append(row)
        # after each row, so that an interrupted run leaves what it has
        write_results(run_dir / "tune.json", this_command(), ranks=args.ranks, steps=args.steps, table=table)
        if "error" in row:
            print(f"{row['variant']:64} {row['error']}")
        else:
            speed = f"{row['tokens_per_s']:9.0f} {row['relative']:7.2f}x"
            print(f"{row['variant']:64} {speed} {row['held_gib']:9.4f} {row['peak_gib']:9.2f}")

    speeds = {row["variant"]: row["tokens_per_s"] for row in table if "error" not in row}
    plot_bars(speeds, run_dir / "speed.png", f"{args.model}, {args.ranks} ranks", "tokens/s")
    print(f"table: {show_path(run_dir / 'tune.json')} | plot: {show_path(run_dir / 'speed.png')}")


if __name__ == "__main__":
    with clear_errors():
        main()
