"""Day 08: run one of the day's labs on two hosts that a link of known speed joins, once for each speed.

    from day08.wire import run_on_link

    tables = run_on_link(["100mbit", "1gbit"], Path(args.run_dir), "day08/labs/fit.py")   # {rate: what the ranks wrote}

Source: bench/link.py, man 8 tc-tbf.
"""

import json
import os
import sys
from pathlib import Path

from bench.link import open_link
from common.errors import UserError
from day08.cost import rate_bytes_per_s


def started_by_launcher() -> bool:
    """Whether this process is a rank: the labs then measure what joins the ranks, instead of making links."""
    return "RANK" in os.environ


def run_on_link(rates: list[str], run_dir: Path, script: str | Path, *flags: object) -> dict[str, dict]:
    """Run `script` with `flags` on a rank each of hosts A and B at each rate; return {rate: its JSON}.

    The ranks get `--rate RATE --run_dir RUN_DIR/RATE`, and write RUN_DIR/RATE/SCRIPT'S NAME.json. What rank 0 prints
    is printed. Raises UserError where no link can be made, and with a rank's own sentence when it fails.
    """
    for rate in rates:
        rate_bytes_per_s(rate)  # before anything starts
    os.environ["DS_ACCELERATOR"] = "cpu"  # for the ranks: a GPU is on no host of this link
    found = {}
    with open_link(rates[0]) as link:
        for rate in rates:
            link.set_rate(rate)
            folder = run_dir / rate
            ended = link.run_ranks("AB", script, *flags, "--rate", rate, "--run_dir", folder)
            if failed := [done for done in ended if done.returncode]:
                lines = failed[0].stderr.strip().splitlines() or [f"exit code {failed[0].returncode}"]
                said = [line for line in lines if line.startswith("error: ")] or lines
                raise UserError(said[-1].removeprefix("error: "))
            sys.stdout.write(f"link of {rate}\n{ended[0].stdout}\n")
            found[rate] = json.loads((folder / Path(script).with_suffix(".json").name).read_text())
    return found
