"""Day 14: power - a simulated machine, where the truth is known: how often is a verdict wrong, or missing?

From the repository root (no ranks, no DeepSpeed: a minute of arithmetic):

    python day14/labs/power.py
    python day14/labs/power.py --runs 100 --turns 20

Expect first, for each way to measure, how many of the runs in which A and B are equal end with "faster" or "slower";
then how many find a planted difference, by difference and turns; then how many turns `repeats_needed` advises, and
whether they find it. power.json and power.png have the same.
Source: day14/clock.py (the machine), day14/stats.py (the verdicts), day14/designs.py (the ways to measure).
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from common.errors import UserError, clear_errors
from common.plots import save_plot
from common.run_log import default_run_dir
from day14.clock import NoisyClock
from day14.designs import DESIGNS, concluded
from day14.stats import MIN_TURNS, interval, paired_ratios, repeats_needed, turn_orders

STEP_S = 0.050  # of the case "a" on an undisturbed machine
DIFFERENCES = (0.01, 0.02, 0.03, 0.05, 0.10)
TURNS = (10, 20, 40, 80, 160)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="simulated comparisons for each figure")
    parser.add_argument("--turns", type=int, default=40, help="turns of a comparison of equals, and of a pilot")
    parser.add_argument("--run_dir", default=default_run_dir("day14"), help="folder for power.json and power.png")
    args = parser.parse_args()
    if args.turns < MIN_TURNS or args.runs < 1:
        raise UserError(f"--turns {args.turns} --runs {args.runs}: at least {MIN_TURNS} turns, and a run")
    return args


def compare(design: str, turns: int, difference: float, seed: int, beat: float = 0.0) -> str:
    """The verdict of one comparison on a fresh machine, on which "b" is faster by `difference`."""
    clock, seconds = NoisyClock(seed, beat=beat), {"a": STEP_S, "b": STEP_S / (1 + difference)}
    return concluded(DESIGNS[design], lambda case: clock.step(seconds[case]), turns, seed)[1]


def advised(turns: int, difference: float, seed: int) -> int:
    """What a pilot of equals on a fresh machine says is needed to find `difference`."""
    clock, seconds = NoisyClock(seed), {"a": [], "b": []}
    for order in turn_orders("ab", turns, seed):
        for case in order:
            seconds[case].append(clock.step(STEP_S))
    return repeats_needed(interval(paired_ratios(seconds["a"], seconds["b"])), turns, difference)


def draw(rows: list[dict], runs: int, path: Path) -> None:
    """Share of the runs that find a planted difference, against the turns; a line for each difference."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for difference in DIFFERENCES:
        mine = [row for row in rows if row["difference"] == difference]
        axes.plot(
            [row["turns"] for row in mine], [row["found"] / runs for row in mine], "o-", label=f"{difference:.0%}"
        )
    axes.axhline(0.9, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(TURNS, TURNS)
    axes.set(xlabel="turns", ylabel="share of the runs that find it", title="a planted difference, simulated machine")
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    runs = args.runs
    table = Table(Path(args.run_dir) / "power.json", {"wrong": "wrong:d", "runs": "runs:d"}, width=24, turns=args.turns)
    machines = [(design, 0.0) for design in DESIGNS] + [(design, 0.05) for design in ("always A first", "random order")]
    for design, beat in machines:
        wrong = sum(compare(design, args.turns, 0.0, seed, beat) != "cannot tell" for seed in range(runs))
        table.add({"case": design + ", beat" * bool(beat), "wrong": wrong, "runs": runs})
    power = []
    print("\nfound, of", runs, "runs; turns:" + "".join(f"{turns:>8}" for turns in TURNS))
    for difference in DIFFERENCES:
        for turns in TURNS:
            found = sum(compare("random order", turns, difference, seed) == "faster" for seed in range(runs))
            power.append({"difference": difference, "turns": turns, "found": found})
        print(f"{difference:>8.0%} faster" + " " * 16 + "".join(f"{row['found']:>8}" for row in power[-len(TURNS) :]))
    plans = []
    for difference in (0.03, 0.05):
        needs = [advised(args.turns, difference, seed) for seed in range(runs)]
        found = sum(
            compare("random order", turns, difference, runs + seed) == "faster" for seed, turns in enumerate(needs)
        )
        plans.append({"difference": difference, "advised": median(needs), "found": found, "runs": runs})
        print(
            f"{difference:.0%}: a pilot advises {median(needs):.0f} turns (median); so many find it: {found} of {runs}"
        )
    table.save(power=power, plans=plans)
    draw(power, runs, Path(args.run_dir) / "power.png")
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
