"""Day 12: resource use - how much of the hardware a run of train.py used, from its log.

    python day12/labs/resources.py runs/day12/20261125-120000
    python day12/labs/resources.py runs/day12/20261125-120000 --measure

Expect a table with tokens/s, model FLOP utilisation (MFU), data-loader share and GPU utilisation, and a plot beside
the log. MFU is work that the model needs, a second, over what the device could do: recomputed work does not count.
With --measure "could do" is not the data sheet's figure but a large matrix product, timed on this machine.
Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 4.1 and appendix B.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import torch

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.errors import UserError, clear_errors
from common.plots import plt
from common.run_log import read_rows, show_path
from day12.resources import measured_flops


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of day12/train.py")
    parser.add_argument("--measure", action="store_true", help="time a matrix product here, and take that as the peak")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not (Path(args.run) / "metrics.jsonl").exists():
        raise UserError(f"no log {args.run}/metrics.jsonl: name the run folder of a day12/train.py")
    rows = read_rows(args.run)
    setup = next((row for row in rows if "flops_per_token" in row), None)
    steps = [row for row in rows if "data_share" in row][1:]  # the first line pays for starting up
    if not setup or not steps:
        raise UserError(f"{args.run}/metrics.jsonl has no resource figures: it takes two log lines of day12/train.py")
    peak = setup["peak_flops"] and setup["peak_flops"] * setup["ranks"]
    if args.measure:  # what one rank can do here, with as many threads as it had
        peak = measured_flops(torch.accelerator.current_accelerator() or torch.device("cpu")) * setup["ranks"]
        print(f"measured: {peak / 1e12:.3f} TFLOP/s in bf16 matrix products, {setup['ranks']} ranks")
    for row in steps:
        row["mfu"] = peak and row["tokens_per_s"] * setup["flops_per_token"] / peak
    columns = {"tokens_per_s": ",.0f", "mfu": ".1%", "data_share": ".1%", "gpu_utilisation": ".0f"}
    show = {name: [row[name] for row in steps if row.get(name) is not None] for name in columns}
    print(f"{setup['num_params']:,} parameters, {setup['flops_per_token']:,} FLOPs a token, {len(steps)} log lines")
    for name, values in show.items():
        low, middle, high = (format(f(values), columns[name]) if values else "-" for f in (min, median, max))
        print(f"{name:16} min {low:>9} | median {middle:>9} | max {high:>9}" if values else f"{name:16} unknown")

    figure, axes = plt.subplots(figsize=(7, 3))
    for name, scale in {"mfu": 100, "data_share": 100, "gpu_utilisation": 1}.items():
        if show[name]:
            axes.plot([row["step"] for row in steps], [scale * value for value in show[name]], label=name)
    axes.set(xlabel="optimizer step", ylabel="percent", title="resource use")
    axes.legend()
    figure.savefig(Path(args.run) / "resources.png", dpi=120, bbox_inches="tight")
    print(f"plot: {show_path(args.run)}/resources.png")


if __name__ == "__main__":
    with clear_errors():
        main()
