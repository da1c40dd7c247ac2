"""Day 28: what an answer costs - machine-hours a million tokens, machines for a peak - from a measured load.

    python day28/labs/cost.py day28/results/load_2cpu.json
    python day28/labs/cost.py day28/results/load_2cpu.json --price 0.10 --peak_requests_per_s 50 --max_p99_s 2

Expect a row for each measured number of clients, and how many machines the peak takes. Money is hours times the price
that you are offered: --price. Training's share is day25/labs/budget.py's.
Source: the arithmetic below; the measured file says on what machine.
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
    parser.add_argument("--utilisation", type=float, default=0.3, help="share of the day's capacity that is asked for")
    parser.add_argument("--peak_requests_per_s", type=float, default=10, help="requests a second in the busiest minute")
    parser.add_argument("--max_p99_s", type=float, default=1, help="seconds that 99 of 100 answers may take")
    parser.add_argument("load", type=Path, help="what day28/labs/load.py wrote")
    return parser.parse_args()


def hours_per_million(tokens_per_s: float, utilisation: float) -> float:
    """Machine-hours for a million tokens of answers, on machines that idle for the rest of the time."""
    return 1e6 / (tokens_per_s * utilisation) / 3600


def machines_for(peak_requests_per_s: float, rows: list[dict], max_p99_s: float) -> tuple[int, dict]:
    """Machines for the peak, each loaded as in the fastest measured row that keeps the p99; one more may be lost."""
    good = [row for row in rows if row["p99_s"] <= max_p99_s]
    if not good:
        best = min(row["p99_s"] for row in rows)
        raise UserError(f"--max_p99_s {max_p99_s:g}: the best that was measured is {best:.2f} s")
    row = max(good, key=lambda row: row["requests_per_s"])
    return math.ceil(peak_requests_per_s / row["requests_per_s"]) + 1, row


def main() -> None:
    args = parse_args()
    if not args.load.exists():
        raise UserError(
            f"{args.load} is not there: python day28/labs/load.py runs/capstone/tiny/export writes load.json"
        )
    if not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation {args.utilisation:g} is no share: want more than 0, at most 1")
    for name in ("price", "peak_requests_per_s", "max_p99_s"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise UserError(f"--{name} {value:g}: want more than 0")
    measured, rows = json.loads(args.load.read_text()), []
    if "p99_s" not in measured.get("table", [{}])[0]:
        raise UserError(f"{args.load} was not written by day28/labs/load.py: it has no table with p99_s")
    for row in measured["table"]:
        hours = hours_per_million(row["tokens_per_s"], args.utilisation)
        rows.append({"clients": row["clients"], "tokens_per_s": row["tokens_per_s"], "hours_per_million": hours})
        cost = f" = {hours * args.price:.2f}" if args.price is not None else ""
        print(
            f"{row['clients']:3d} clients: {row['tokens_per_s']:.0f} tokens/s, {hours:.2f} hours a million tokens{cost}"
        )
    number, row = machines_for(args.peak_requests_per_s, measured["table"], args.max_p99_s)
    print(
        f"{args.peak_requests_per_s:g} requests/s within {args.max_p99_s:g} s: {number} machines, one of them spare;"
        f" measured {row['requests_per_s']:.1f} requests/s with p99 {row['p99_s']:.2f} s at {row['clients']} clients"
    )
    if args.price is not None:
        print(f"a month of that: {number * args.price * 24 * 30.4:,.0f}")
    path = Path(args.run_dir) / "cost.json"
    write_results(path, this_command(), table=rows, machines=number, measured_on=measured["hardware"])
    print(f"table: {show_path(path)}")


if __name__ == "__main__":
    with clear_errors():
        main()
