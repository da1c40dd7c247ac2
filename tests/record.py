"""Record a run for the notes: its command, machine, output and log rows as JSON, and its loss curve beside it.

    python -m tests.record day02/results/train_2cpu.json deepspeed --num_accelerators 2 day02/train.py
    python -m tests.record --fails day04/results/check_2cpu.json python config/check.py my.json

The notes show these files (tests/render.py); tests/recipes.py records all that a day's recipes.txt names.
"""

import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path

from bench.results import machine, write_results
from common.errors import UserError, clear_errors
from common.plots import plot_loss
from common.run_log import parse_lines
from tests.launch import PATH, ROOT

# Lines that say nothing about the run: the launcher's and DeepSpeed's time-stamped log, warnings of libraries.
NOISE = re.compile(r"^\[20\d\d-|^\[rank|^\[W|^\s*$")


def record(paths: Iterable[Path], command: str, unsaid: Iterable[str] = (), should_fail: bool = False) -> None:
    """Run `command` with the words `unsaid` behind it, show its output, and write what `paths` name: a JSON, a curve.

    Raises UserError, and writes nothing, when it fails, or should fail and does not.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        ["bash", "-c", f"{command} {shlex.join(unsaid)}"],
        cwd=ROOT, env={**os.environ, "PATH": PATH}, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        lines.append(line.rstrip("\n").replace(f"{ROOT}/", ""))
    code = process.wait()
    if bool(code) != should_fail:
        raise UserError(f"{command} ended with exit code {code}: nothing recorded")
    output = [line for line in lines if not NOISE.search(line)]
    rows = parse_lines("\n".join(output))
    wall_s = round(time.perf_counter() - start, 1)
    for path in paths:
        if path.suffix == ".json":
            write_results(path, command, exit_code=code, wall_s=wall_s, output=output, rows=rows)
        elif any("loss" in row for row in rows):  # a run that fails may end before its first step
            title = f"{textwrap.fill(command, 75)}\n{machine()['hardware']}"
            plot_loss({"": rows}, path, title)  # no label: a legend would hide a part of one curve


def main() -> None:
    arguments = sys.argv[1:]
    should_fail = arguments[0] == "--fails"  # a run that ends with an error is recorded only when that is its point
    path, *words = arguments[should_fail:]
    json_path = Path(path).absolute()
    record([json_path, json_path.with_suffix(".png")], shlex.join(words), should_fail=should_fail)


if __name__ == "__main__":
    with clear_errors():
        main()
