"""Run every program of every day on all accelerators of this machine, at its smallest size, and write down what held.

    make test-gpu                                              (python -m tests.gpu, after the tests marked gpu)
    python -m tests.gpu --days day17 day18 --out tests/results/gpu_2xh200.json
    python -m tests.gpu --ranks 2 --days day05                 on two CPU processes

Expect a line a program: exit code and seconds. Exit code 1 when one failed, with its last lines in the file.
The programs are those of tests/programs.txt; tests/test_house_rules.py holds that none is missing there.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepspeed.accelerator import get_accelerator

from bench.results import write_results
from bench.world import launch_command
from common.errors import UserError, clear_errors

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "tests/programs.txt"
LIMIT_S = 240  # for one program


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="ranks of a world (default: all accelerators)")
    parser.add_argument("--days", nargs="+", help="day05 day12 ... (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="days that run side by side, on the same accelerators")
    parser.add_argument("--out", help="JSON for the results")
    return parser.parse_args()


def blocks() -> list[list[str]]:
    """The lines of programs.txt, by block."""
    text = re.sub(r"^#.*\n", "", PROGRAMS.read_text(), flags=re.M)
    return [block.splitlines() for block in re.split(r"\n{2,}", text.strip())]


def missing(line: str, ranks: int) -> tuple[str, str]:
    """Split off what a line needs; return (the command, why it is left out here or "")."""
    need, _, rest = line.partition(" ")
    if need.endswith("@"):
        return rest, f"needs {need[:-1]} ranks" if ranks < int(need[:-1]) else ""
    if need.endswith("?"):
        there = importlib.util.find_spec(need[:-1]) or shutil.which(need[:-1])
        return rest, "" if there else f"needs {need[:-1]}, which is not installed here"
    return line, ""


def run(line: str, ranks: int, runs: str) -> dict:
    """Run one line; return {"program", "code", "seconds"}, with its last words where it failed."""
    line, reason = missing(line, ranks)
    launcher = f"{sys.executable} -m deepspeed.launcher.runner --num_accelerators {ranks}"
    words = shlex.split(line.format(runs=runs, small=ROOT / "tests/data/small.txt", deepspeed=launcher))
    shown = (
        line.replace("{runs}", "RUNS").replace("{small}", "tests/data/small.txt").replace("{deepspeed}", "deepspeed")
    )
    if reason:
        return {"program": shown, "left_out": reason}
    if words[0] == "python":
        command = [sys.executable, *words[1:]]
    else:
        command = launch_command(1 if words[0] == "deepspeed1" else ranks, *words[1:])
    start = time.perf_counter()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
    row = {"program": shown, "code": process.returncode, "seconds": round(time.perf_counter() - start, 1)}
    return row | ({"said": output[-3000:].splitlines()} if process.returncode else {})


def save(out: str | None, ranks: int, table: list[dict]) -> str:
    """Write what has been run so far, in the order of the days; return the sentence that sums it up."""
    ran = [row for row in table if "code" in row]
    failed = [row for row in ran if row["code"]]
    counts = {"passed": len(ran) - len(failed), "failed": len(failed), "left_out": len(table) - len(ran)}
    if out:
        ordered = sorted(table, key=lambda row: re.search(r"day\d\d|$", row["program"])[0])
        write_results(out, f"python -m tests.gpu --ranks {ranks}", ranks=ranks, **counts, table=ordered)
    return f"{counts['passed']} passed, {counts['failed']} failed, {counts['left_out']} skipped"


def main() -> int:
    args = parse_args()
    accelerators = get_accelerator().device_count() if get_accelerator().device_name() != "cpu" else 0
    ranks = args.ranks or accelerators
    if not ranks:
        raise UserError("no accelerator on this machine: `make test` runs the same programs on CPU (or name --ranks 2)")
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    table, one_at_a_time = [], threading.Lock()

    def run_block(block: list[str]) -> None:
        for line in block:
            row = run(line, ranks, runs)
            state = row.get("left_out") or f"exit code {row['code']}"
            print(f"{row.get('seconds', 0):7.1f} s | {state:12} | {row['program']}", flush=True)
            with one_at_a_time:  # after each program, so that an interrupted run leaves what it has
                table.append(row)
                save(args.out, ranks, table)

    chosen = [block for block in blocks() if not args.days or any(day in block[0] for day in args.days)]
    with tempfile.TemporaryDirectory() as runs, ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run_block, sorted(chosen, key=len, reverse=True)))  # the longest day first
    print(save(args.out, ranks, table))
    return any(row.get("code") for row in table)


if __name__ == "__main__":
    with clear_errors():
        sys.exit(main())
