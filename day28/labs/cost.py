"""Day 28: what an answer costs - machine-hours a million tokens, machines for a peak - from a measured load.

    python day28/labs/cost.py day28/results/load_2cpu.json
    python day28/labs/cost.py day28/results/load_2cpu.json --price 0.10 --peak_requests_per_s 50 --max_p99_s 2

Expect how busy a machine may be before answers come later than promised (the ceiling), what a million tokens take, and
how many machines the peak takes. Money is hours times the price that you are offered: --price. Training's share is
day25/labs/budget.py's. Source: the arithmetic below; the measured file says on what machine.
"""

import argparse
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir, show_path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default=default_run_dir("day28"), help="folder for cost.json")
    parser.add_argument("--price", type=float, help="of one machine for one hour, in your currency")
    parser.add_argument("--utilisation", type=float, default=0.3, help="share of what it could, averaged over the day")
    parser.add_argument(
        "--peak_requests_per_s", type=float, default=100, help="requests a second in the busiest minute"
    )
    parser.add_argument("--max_p99_s", type=float, default=1, help="seconds that 99 of 100 answers may take")
    parser.add_argument("load", type=Path, help="what day28/labs/load.py wrote")
    return parser.parse_args()


def hours_per_million(tokens_per_s: float, utilisation: float) -> float:
    """Machine-hours for a million tokens of answers, on machines that idle for the rest of the time."""
    return 1e6 / (tokens_per_s * utilisation) / 3600


def ceiling(rows: list[dict], max_p99_s: float) -> dict:
    """The row of the highest utilisation below 1 at which nobody was refused and 99 of 100 answers came in time."""
    rows = [row for row in rows if row["utilisation"] < 1]
    if not rows:
        raise UserError("the load was measured at 100 % and more alone, where the queue never ends: add lower ones")
    good = [row for row in rows if row["p99_s"] <= max_p99_s and not row["errors"]]
    if not good:
        best = min(row["p99_s"] for row in rows)
        raise UserError(f"--max_p99_s {max_p99_s:g}: the best that was measured is {best:.2f} s")
    return max(good, key=lambda row: row["utilisation"])


def machines_for(peak_requests_per_s: float, row: dict) -> int:
    """Machines for the peak, each as busy as in this row; one more may be lost."""
    return math.ceil(peak_requests_per_s / row["offered_per_s"]) + 1


def main() -> None:
    args = parse_args()
    if not args.load.exists():
        raise UserError(
            f"{args.load} is not there: python day28/labs/load.py runs/capstone/tiny/export writes load.json"
        )
    for name in ("price", "peak_requests_per_s", "max_p99_s", "utilisation"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise UserError(f"--{name} {value:g}: want more than 0")
    measured = json.loads(args.load.read_text())
    if "capacity_per_s" not in measured:
        raise UserError(f"{args.load} was not written by day28/labs/load.py: it has no capacity_per_s")
    row = ceiling(measured["table"], args.max_p99_s)
    print(
        f"ceiling: {row['utilisation']:.0%} busy, {row['offered_per_s']:.1f} requests/s a machine:"
        f" p99 {row['p99_s']:.2f} s within {args.max_p99_s:g} s"
    )
    if args.utilisation > row["utilisation"]:
        raise UserError(
            f"--utilisation {args.utilisation:g}: above {row['utilisation']:g}, the highest measured one that keeps"
            f" the p99 within {args.max_p99_s:g} s, and an average is below its peak"
        )
    rows, tokens_per_s = [], measured["capacity_per_s"] * measured["tokens_per_answer"]
    for utilisation, when in ((args.utilisation, "averaged over the day"), (row["utilisation"], "at the ceiling")):
        hours = hours_per_million(tokens_per_s, utilisation)
        rows.append({"utilisation": utilisation, "hours_per_million": hours})
        cost = f" = {hours * args.price:.2f}" if args.price is not None else ""
        print(f"a million tokens: {hours:.2f} hours at {utilisation:.0%}, {when}{cost}")
    number = machines_for(args.peak_requests_per_s, row)
    print(f"{args.peak_requests_per_s:g} requests/s in the peak: {number} machines, one of them spare")
    if args.price is not None:
        print(f"a month of that: {number * args.price * 24 * 30.4:,.0f}")
    path = Path(args.run_dir) / "cost.json"
    facts = {"ceiling": row["utilisation"], "machines": number, "measured_on": measured["hardware"]}
    write_results(path, this_command(), table=rows, **facts)
    print(f"table: {show_path(path)}")


if __name__ == "__main__":
    with clear_errors():
        main()
