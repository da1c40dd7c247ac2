"""Day 03: compare configs - train.py once for each JSON, on the same data and first weights; a table and plots.

From the repository root (this one starts the launcher itself):

    python day03/labs/compare.py
    python day03/labs/compare.py --configs day03/ds_config.json day03/ds_config_bf16.json --ranks 2 --steps 50

Expect a table (loss, speed, memory) on the terminal and compare.json, loss.png and speed.png in the run folder.
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
from common.plots import plot_bars, plot_loss
from common.results import this_command, write_results
from common.run_log import default_run_dir, read_rows, show_path

# On CPU these need 16-bit arithmetic in the processor (else it is emulated, slowly) or a compiler. --configs runs them.
ONLY_ON_GPU = {f"ds_config_{name}.json" for name in ("bf16", "fp16", "autocast", "fused_adam")}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", help="JSON files to compare (default: those of day03/)")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2, help="processes, or GPUs")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=10, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day03"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--port", type=int, default=29500, help="port on which rank 0 waits for the others")
    return parser.parse_args()


def train(config: Path, run_dir: Path, args: argparse.Namespace) -> list[dict]:
    """Run train.py with `config` through the launcher, as a reader would, and return its log rows."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", args.ranks]
    command += ["--master_port", args.port, HERE / "train.py", "--deepspeed_config", config, "--run_dir", run_dir]
    command += ["--steps", args.steps, "--log_every", args.log_every, "--seed", args.seed, "--model", args.model]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line or line.startswith("error: ")]
        raise UserError(f"training with {show_path(config)} failed: {lines[-1] if lines else done.stderr[-500:]}")
    return read_rows(run_dir)


def summary(rows: list[dict]) -> dict:
    """One table row: losses at the end, median speed after the first line, and memory."""
    steps = [row for row in rows if "loss" in row]
    return {
        "train_loss": steps[-1]["loss"],
        "held_out_loss": [row["held_out_loss"] for row in rows if "held_out_loss" in row][-1],
        "tokens_per_s": median(row["tokens_per_s"] for row in steps[1:] or steps),
        "held_gib": rows[-1]["held_gib"],
        "peak_gib": steps[-1]["memory_gib"],
    }


def main() -> None:
    args = parse_args()
    configs = [Path(name) for name in args.configs or sorted(HERE.glob("ds_config*.json"))]
    if not args.configs and not torch.cuda.is_available():
        print(f"left out on CPU: {', '.join(sorted(ONLY_ON_GPU))}")
        configs = [config for config in configs if config.name not in ONLY_ON_GPU]
    for config in configs:
        if not config.exists():
            raise UserError(f"no config file {config}")
        if [other.stem for other in configs].count(config.stem) > 1:
            raise UserError(f"two configs are called {config.stem}: copy one to another name, the table goes by it")

    run_dir, runs, table = Path(args.run_dir), {}, []
    print(f"{'config':24} {'train':>8} {'held-out':>8} {'tok/s':>9} {'held GiB':>9} {'peak GiB':>9}")
    for config in configs:
        name = config.stem
        runs[name] = train(config, run_dir / name, args)
        row = summary(runs[name])
        table.append({"config": config.name, **row, "rows": runs[name]})
        losses = f"{row['train_loss']:8.4f} {row['held_out_loss']:8.4f}"
        print(f"{name:24} {losses} {row['tokens_per_s']:9.0f} {row['held_gib']:9.4f} {row['peak_gib']:9.2f}")

    write_results(run_dir / "compare.json", this_command(), ranks=args.ranks, steps=args.steps, table=table)
    plot_loss(runs, run_dir / "loss.png", f"{args.model}, {args.ranks} ranks")
    plot_bars(
        {n: summary(rows)["tokens_per_s"] for n, rows in runs.items()}, run_dir / "speed.png", "speed", "tokens/s"
    )
    print(f"table: {show_path(run_dir / 'compare.json')} | plots: {show_path(run_dir)}/loss.png, speed.png")


if __name__ == "__main__":
    with clear_errors():
        main()
