"""Day 04: tune - what single options do to speed and memory on this machine.

From the repository root (this one starts the launcher itself):

    python day04/labs/tune.py
    python day04/labs/tune.py --variants zero_optimization.stage=2 train_micro_batch_size_per_gpu=16 --steps 20

Each variant is train.py with one `--set`. Expect a table against the unchanged config, tune.json and speed.png.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/docs/config-json/
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import default_ranks, launch
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir, median_speed, read_rows

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


COLUMNS = {
    "tok/s": "tokens_per_s:,.0f",
    "relative": "relative:.2f",
    "held GiB": "held_gib:.4f",
    "peak GiB": "peak_gib:.2f",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument(
        "--variants", nargs="+", default=VARIANTS, help="key=value[,key=value] of the config, one a run"
    )
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="processes, or accelerators")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day04"), help="folder for tune.json, speed.png, and runs")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def measure(variant: str, run_dir: Path, args: argparse.Namespace) -> dict:
    """Run train.py with `variant` through the launcher; a variant that fails says so in its row."""
    flags = ["--steps", args.steps, "--log_every", 5, "--seed", args.seed, "--model", args.model]
    flags += ["--corpus", args.corpus, "--run_dir", run_dir] + (["--set", *variant.split(",")] if variant else [])
    try:
        launch(args.ranks, HERE / "train.py", "--deepspeed_config", args.deepspeed_config, *flags)
    except UserError as error:
        return {"error": str(error)}
    rows = read_rows(run_dir)
    last = [step for step in rows if "loss" in step][-1]
    return {"tokens_per_s": median_speed(rows), "held_gib": rows[-1]["held_gib"], "peak_gib": last["memory_gib"]}


def main() -> None:
    args = parse_args()
    run_dir = Path(args.run_dir)
    table = Table(run_dir / "tune.json", COLUMNS, width=64, ranks=args.ranks, steps=args.steps)
    for number, variant in enumerate(["", *args.variants]):
        row = measure(variant, run_dir / str(number), args)
        if not variant and "error" in row:
            raise UserError(f"the unchanged config does not train, so nothing can be compared: {row['error']}")
        if "error" not in row:
            unchanged = table.rows[0] if table.rows else row
            row["relative"] = row["tokens_per_s"] / unchanged["tokens_per_s"]
        name = variant.replace("zero_optimization.", "") or "unchanged"
        table.add({"case": name, "variant": name, **row})
    table.bars("tokens_per_s", "tokens/s", f"{args.model}, {args.ranks} ranks", name="speed")
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
