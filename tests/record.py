"""Record a run for the notes: its command, machine, output and log rows as JSON, and its loss curve beside it.

    python -m tests.record day02/results/train_2cpu.json deepspeed --num_accelerators 2 day02/train.py
    python -m tests.record --fails day04/results/check_2cpu.json python config/check.py my.json

The notes show these files (tests/render.py); `make results` records all of them on the machine at hand.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from common.plots import plot_loss
from common.results import write_results
from common.run_log import parse_lines
from tests.launch import PATH, ROOT

# Lines that say nothing about the run: the launcher's and DeepSpeed's time-stamped log, warnings of libraries.
NOISE = re.compile(r"^\[20\d\d-|^\[rank|^\[W|^\s*$")


def main() -> None:
    arguments = sys.argv[1:]
    should_fail = arguments[0] == "--fails"  # a run that ends with an error is recorded only when that is its point
    path, *command = arguments[should_fail:]
    path = Path(path)
    start = time.perf_counter()
    program = shutil.which(command[0], path=PATH)
    process = subprocess.Popen([program, *command[1:]], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        lines.append(line.rstrip("\n").replace(f"{ROOT}/", ""))
    code = process.wait()
    if bool(code) != should_fail:
        sys.exit(f"{' '.join(command)} ended with exit code {code}: nothing recorded")
    output = [line for line in lines if not NOISE.search(line)]
    rows = parse_lines("\n".join(output))
    wall_s = round(time.perf_counter() - start, 1)
    write_results(path, shlex.join(command), exit_code=code, wall_s=wall_s, output=output, rows=rows)
    if any("loss" in row for row in rows):  # a run that fails may end before its first step
        title = f"{textwrap.fill(shlex.join(command), 75)}\n{json.loads(path.read_text())['hardware']}"
        plot_loss({"": rows}, path.with_suffix(".png"), title)  # no label: a legend would hide a part of one curve


if __name__ == "__main__":
    main()
