"""Day 03: compare configs - train.py once for each JSON, on the same data and first weights; a table and plots.

From the repository root (this one starts the launcher itself):

    python day03/labs/compare.py
    python day03/labs/compare.py --configs day03/ds_config.json day03/ds_config_bf16.json --ranks 2 --steps 50

Expect a table (loss, speed, memory) on the terminal and compare.json, loss.png and speed.png in the run folder.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/docs/config-json/
"""

import argparse
import sys
from pathlib import Path

from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import default_ranks, launch
from common.errors import UserError, clear_errors
from common.plots import plot_loss
from common.run_log import default_run_dir, median_speed, read_rows, show_path
from config.read import read_config

# On CPU these need 16-bit arithmetic in the processor (else it is emulated, slowly) or a compiler. --configs runs them.
ONLY_ON_GPU = {f"ds_config_{name}.json" for name in ("bf16", "fp16", "autocast", "fused_adam")}
COLUMNS = {
    "train": "train_loss:.4f",
    "held-out": "held_out_loss:.4f",
    "tok/s": "tokens_per_s:,.0f",
    "held GiB": "held_gib:.4f",
    "peak GiB": "peak_gib:.2f",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", help="JSON files to compare (default: those of day03/)")
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="processes, or accelerators")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=10, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day03"), help="folder for compare.json, plots, and runs")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def chosen_configs(names: list[str] | None) -> list[Path]:
    """The files named, or those of day 03 that this machine trains in a sensible time; UserError for two of a name."""
    configs = [Path(name) for name in names or sorted(HERE.glob("ds_config*.json"))]
    if not names and get_accelerator().device_name() == "cpu":
        print(f"left out on CPU: {', '.join(sorted(ONLY_ON_GPU))}")
        configs = [config for config in configs if config.name not in ONLY_ON_GPU]
    for config in configs:
        read_config(config)  # a bad file is told before the first one has trained for minutes
        if [other.stem for other in configs].count(config.stem) > 1:
            raise UserError(f"two configs are called {config.stem}: copy one to another name, the table goes by it")
    return configs


def train(config: Path, run_dir: Path, args: argparse.Namespace) -> list[dict]:
    """Run train.py with `config` through the launcher, as a reader would, and return its log rows."""
    flags = ["--steps", args.steps, "--log_every", args.log_every, "--seed", args.seed, "--model", args.model]
    flags += ["--corpus", args.corpus, "--run_dir", run_dir]
    try:
        launch(args.ranks, HERE / "train.py", "--deepspeed_config", config, *flags)
    except UserError as error:
        raise UserError(f"training with {show_path(config)} failed: {error}") from error
    return read_rows(run_dir)


def summary(rows: list[dict]) -> dict:
    """One table row: losses at the end, median speed after the first line, and memory."""
    steps = [row for row in rows if "loss" in row]
    return {
        "train_loss": steps[-1]["loss"],
        "held_out_loss": [row["held_out_loss"] for row in rows if "held_out_loss" in row][-1],
        "tokens_per_s": median_speed(rows),
        "held_gib": rows[-1]["held_gib"],
        "peak_gib": steps[-1]["memory_gib"],
    }


def main() -> None:
    args = parse_args()
    configs = chosen_configs(args.configs)
    run_dir = Path(args.run_dir)
    table = Table(run_dir / "compare.json", COLUMNS, width=24, ranks=args.ranks, steps=args.steps)
    for config in configs:
        rows = train(config, run_dir / config.stem, args)
        table.add({"case": config.stem, "config": config.name, **summary(rows), "rows": rows})
    plot_loss(
        {row["case"]: row["rows"] for row in table.rows}, run_dir / "loss.png", f"{args.model}, {args.ranks} ranks"
    )
    table.bars("tokens_per_s", "tokens/s", "speed", name="speed")
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
