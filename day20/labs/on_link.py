"""Day 20: on_link - run a script on ranks of several hosts that a link of known speed joins, on this one machine.

From the repository root, as root (a letter is a rank's host; ranks share this machine's cores):

    python day20/labs/on_link.py "day20/train.py --steps 4" --placements AABB
    python day20/labs/on_link.py "day20/labs/all_reduce.py" --placements AABB ABAB --rates 200mbit

Expect what rank 0 prints, for each placement and rate; all rows that it wrote as tables, with both, in on_link.json.
Where no link can be made, one sentence says what is missing. Source: bench/link.py.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.link import open_link
from bench.results import this_command, write_results
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir, show_path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="a script with its flags, in quotes; --run_dir is added")
    parser.add_argument("--placements", nargs="+", default=["AABB"], help="the host of each rank: AABB, ABAB, ABCD ...")
    parser.add_argument("--rates", nargs="+", default=["200mbit"], help="what each host can send: tc's words, or none")
    parser.add_argument("--run_dir", default=default_run_dir("day20"), help="folder for on_link.json and the script's")
    return parser.parse_args()


def run_on(link, placement: str, words: list[str]) -> str:
    """Run the script on the ranks of `placement`; return what rank 0 printed. UserError with a failed rank's words."""
    ended = link.run_ranks(placement, *words)
    if failed := [run for run in ended if run.returncode]:
        said = failed[0].stderr.strip().splitlines() or [f"exit code {failed[0].returncode}"]
        told = [line.removeprefix("error: ") for run in failed for line in run.stderr.splitlines() if "error: " in line]
        raise UserError(f"on {placement}: {(told or said[-1:])[0]}")
    return "\n".join(line for line in ended[0].stdout.splitlines() if not re.match(r"\[20\d\d-|\[W|\s*$", line))


def main() -> None:
    args = parse_args()
    program, *flags = shlex.split(args.script)
    script = [str(HERE.parent / program), *flags]  # from the repository, wherever this was started
    if not Path(script[0]).is_file():
        raise UserError(f"script {program!r} is not there: a path from the repository's root, or a whole one")
    if unknown := [name for name in args.placements if not re.fullmatch("[A-H]{2,}", name)]:
        raise UserError(f"--placements {unknown[0]!r}: a capital letter from A to H for each rank, AABB say")
    hosts = ord(max("".join(args.placements))) - ord("A") + 1
    table = []
    with open_link(None, hosts=hosts) as link:
        for placement in args.placements:
            for rate in args.rates:
                link.set_rate(None if rate == "none" else rate)
                folder = Path(args.run_dir) / f"{placement}-{rate}"
                print(f"# {placement} at {rate}: {args.script}", flush=True)
                print(run_on(link, placement, [*script, "--run_dir", str(folder)]), flush=True)
                for path in sorted(folder.glob("*.json")):
                    rows = json.loads(path.read_text()).get("table", [])
                    table += [{"placement": placement, "rate": rate, **row} for row in rows]
    path = Path(args.run_dir) / "on_link.json"
    write_results(path, this_command(), table=table)
    print(f"rows: {show_path(path)}")


if __name__ == "__main__":
    with clear_errors():
        main()
