"""Day 24: what do failures cost at scale? MTBF, checkpoint interval and goodput from 8 to 131,072 GPUs.

    python day24/labs/at_scale.py
    python day24/labs/at_scale.py --save_s 20 --restart_s 300

Expect a row a size of job, computed and simulated; then Llama 3's 54 days a hundred times, against what was published;
and a plot of goodput over the checkpoint interval. Seconds; no GPU and no network. Source: day24/goodput.py.
"""

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir
from day24 import goodput as model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZES = (8, 128, 1024, 4096, 16_384, 131_072)
# Failures per 1,000 node-days of 8 GPUs: Kokolis et al. 2024 (arXiv:2410.21680), two clusters of A100s.
OTHER_CLUSTERS = {"RSC-1": 6.50, "RSC-2": 2.34}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_s", type=float, default=60, help="how long training stands for a checkpoint")
    parser.add_argument("--restart_s", type=float, default=600, help="noticing, replacing, starting, loading")
    parser.add_argument("--runs", type=int, default=100, help="simulated runs a row")
    parser.add_argument("--run_dir", default=default_run_dir("day24"), help="folder for the tables and the plot")
    return parser.parse_args()


def played(
    runs: int, total_s: float, save_s: float, restart_s: float, mtbf: float, interval_s: float | None = None
) -> tuple[list[int], list[float]]:
    """Failures and goodput of each of `runs` simulated runs; the interval is Young's unless given."""
    interval_s = interval_s or model.best_interval_s(save_s, mtbf)
    done = [model.simulate(seed, total_s, interval_s, save_s, restart_s, mtbf) for seed in range(runs)]
    return [failures for failures, _ in done], [part for _, part in done]


def sizes(args: argparse.Namespace, run_dir: Path) -> None:
    columns = {"MTBF h": "mtbf_h:,.1f", "Young min": "young_min:.0f", "Daly min": "daly_min:.0f"}
    columns |= {"goodput": "goodput:.4f", "simulated": "simulated:.4f", "every 3 h": "three_hours:.4f"}
    table = Table(run_dir / "sizes.json", columns, width=10, save_s=args.save_s, restart_s=args.restart_s)
    for num_gpus in SIZES:
        mtbf = model.mtbf_s(num_gpus)
        interval = model.best_interval_s(args.save_s, mtbf)
        # long enough for some hundred failures, in segments that are short against the whole
        _, parts = played(args.runs, max(30 * mtbf, 100 * interval), args.save_s, args.restart_s, mtbf)
        row = {"case": f"{num_gpus:,}", "mtbf_h": mtbf / model.HOUR, "young_min": interval / 60}
        row["daly_min"] = model.daly_interval_s(args.save_s, mtbf) / 60
        row["goodput"] = model.goodput(interval, args.save_s, args.restart_s, mtbf)
        row["three_hours"] = model.goodput(3 * model.HOUR, args.save_s, args.restart_s, mtbf)
        table.add(row | {"simulated": statistics.mean(parts)})
    table.close()


def llama3(args: argparse.Namespace, run_dir: Path) -> None:
    """The published run: with its own rate, and with those of two other clusters, which nobody fitted to it."""
    columns = {"save s": "save_s:g", "restart s": "restart_s:g", "failures": "failures:.0f", "sd": "sd:.0f"}
    columns |= {"published": "published:d", "goodput": "goodput:.3f"}
    table = Table(run_dir / "llama3.json", columns, width=14)
    per_gpu = {name: 8 * 1000 * model.DAY / rate for name, rate in OTHER_CLUSTERS.items()}
    cases = [("its own rate", model.mtbf_s(1), args.save_s, args.restart_s)]
    cases += [("its own rate", model.mtbf_s(1), args.save_s / 3, args.restart_s / 2)]
    cases += [(name, one_gpu_s, args.save_s, args.restart_s) for name, one_gpu_s in per_gpu.items()]
    for name, one_gpu_s, save_s, restart_s in cases:
        mtbf = model.mtbf_s(model.LLAMA3_GPUS, one_gpu_s)
        failures, parts = played(args.runs, model.LLAMA3_DAYS * model.DAY, save_s, restart_s, mtbf)
        row = {"case": name, "save_s": save_s, "restart_s": restart_s, "failures": statistics.mean(failures)}
        row |= {"sd": statistics.stdev(failures), "published": model.LLAMA3_INTERRUPTIONS}
        table.add(row | {"goodput": statistics.mean(parts)})
    table.close()


def plot(args: argparse.Namespace, path: Path) -> None:
    """Goodput over the checkpoint interval: curves computed, points simulated."""
    figure, axes = plt.subplots(figsize=(7, 4))
    minutes = [2**k for k in range(0, 10)]
    for num_gpus, colour in zip((1024, 16_384, 131_072), ("tab:green", "tab:blue", "tab:red"), strict=True):
        mtbf = model.mtbf_s(num_gpus)
        fine = [m * 2 ** (k / 8) for m in minutes for k in range(8)]
        curve = [model.goodput(60 * m, args.save_s, args.restart_s, mtbf) for m in fine]
        runs = [played(10, 200 * mtbf, args.save_s, args.restart_s, mtbf, 60.0 * m)[1] for m in minutes]
        points = [statistics.mean(parts) for parts in runs]
        best = model.best_interval_s(args.save_s, mtbf)
        axes.plot(fine, curve, color=colour, label=f"{num_gpus:,} GPUs, MTBF {mtbf / model.HOUR:.1f} h")
        axes.plot(minutes, points, "o", color=colour, markersize=4)
        axes.axvline(best / 60, color=colour, linestyle=":", linewidth=1)
    axes.set(xscale="log", ylim=(0, 1), xlabel="minutes between two checkpoints", ylabel="goodput")
    axes.set_title(f"save {args.save_s:g} s, restart {args.restart_s:g} s; dotted: Young's interval")
    axes.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    print(f"plot: {path.name}")


def main() -> None:
    args = parse_args()
    if min(args.save_s, args.restart_s) <= 0 or args.runs < 2:
        flags = f"--save_s {args.save_s:g} --restart_s {args.restart_s:g} --runs {args.runs}"
        raise UserError(f"{flags}: times are positive, and it takes two runs to see a spread")
    run_dir = Path(args.run_dir)
    sizes(args, run_dir)
    llama3(args, run_dir)
    plot(args, run_dir / "goodput.png")


if __name__ == "__main__":
    with clear_errors():
        main()
