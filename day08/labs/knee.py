"""Day 08: from how many tokens per rank on does communication hide? Two models, two links, predicted and measured.

On one machine, as root (CPU; it makes two hosts and a link of each speed between them):

    python day08/labs/knee.py
    python day08/labs/knee.py --models tiny --rates 1gbit --around 0.5 1 2

Expect the tables of steps.py at each speed, then predicted and measured knee, and knee.png: step time over tokens.
Checked with deepspeed 0.19.8 and torch 2.13.0. Source: The Scaling Book, chapter "training"; day08/cost.py.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from common.errors import clear_errors
from common.plots import save_plot
from common.run_log import default_run_dir
from day08.wire import run_on_link

COLUMNS = {"GFLOP/s": "flops_per_s_g:.1f", "MB/s": "bytes_per_s:MB", "predicted": "predicted:,.0f"}
COLUMNS |= {"measured": "measured:,.0f", "measured/predicted": "factor:.2f"}
STYLES = {"none": "k--", "ddp": "C0o-", "zero0": "C1s-", "zero1": "C2^-", "zero2": "C3v-"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["300mbit", "1gbit"], help="speeds of the link, in tc's words")
    parser.add_argument("--models", nargs="+", default=["tiny", "mini"], help="presets of common/model.py")
    parser.add_argument("--ways", nargs="+", default=list(STYLES), help="of day08/ways.py")
    parser.add_argument("--around", nargs="+", type=float, default=[0.4, 0.8, 1.6], help="times predicted knee")
    parser.add_argument("--turns", type=int, default=6, help="steps of each way, the first of them to warm up")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--run_dir", default=default_run_dir("day08"), help="folder for knee.json and knee.png")
    return parser.parse_args()


def draw(steps: list[dict], knees: list[dict], path: Path) -> None:
    """Step time over tokens per rank, a picture for each model and link, the predicted knee as a line."""
    figure, grid = plt.subplots(1, len(knees), figsize=(4 * len(knees), 4), squeeze=False)
    for axes, knee in zip(grid[0], knees, strict=True):
        rows = [row for row in steps if (row["rate"], row["model"]) == (knee["rate"], knee["model"])]
        for way, style in STYLES.items():
            points = [(row["tokens"], row[f"{way}_ms"]) for row in rows if f"{way}_ms" in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, label={"none": "no communication"}.get(way, way))
        axes.axvline(knee["predicted"], color="gray", linestyle=":", label="predicted knee")
        top = 1.6 * max(value for row in rows for name, value in row.items() if name.endswith("_ms"))  # for the legend
        axes.set(xlim=0, ylim=(0, top), xlabel="tokens per rank", title=f"{knee['model']}, {knee['rate']}")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("ms per step")
    save_plot(figure, grid[0][0], path)


def main() -> None:
    args = parse_args()
    folder = Path(args.run_dir)
    flags = ("--models", *args.models, "--ways", *args.ways, "--around", *args.around)
    flags += ("--turns", args.turns, "--corpus", args.corpus)
    found = run_on_link(args.rates, folder, HERE / "labs/steps.py", *flags)
    steps = [{"rate": rate, **row} for rate, one in found.items() for row in one["table"]]
    table = Table(folder / "knee.json", COLUMNS, steps=steps)
    for rate, one in found.items():
        for knee in one["knees"]:
            row = {"case": f"{knee['model']}, {rate}", "rate": rate, "bytes_per_s": one["bytes_per_s"], **knee}
            row |= {"flops_per_s_g": knee["flops_per_s"] / 1e9}
            row["factor"] = knee["measured"] and knee["measured"] / knee["predicted"]
            table.add(row)
    draw(steps, table.rows, folder / "knee.png")
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
