"""Day 13, your turn: six faults, and for each the rank, the line and the cause.

Each number is another fault in the same training, on one of two ranks:

    deepspeed --num_accelerators 2 day13/labs/patient.py --fault 1 --run_dir runs/day13/patient

Find it with the tools of the day (the patient's flags; day13/flight.py on runs/day13/patient/flight), fill in what you
found below, and check yourself. No ranks are needed for that:

    python day13/exercise.py

The answers are in solution.py; they say which tool found it. Source: day13/notes.md.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository

from common.errors import UserError, clear_errors
from day13.faults import CAUSES, ORDER, victim

PATIENT = HERE / "labs/patient.py"


class Finding(NamedTuple):
    """`rank` of 2; `line` of day13/labs/patient.py, the text of it, as lines move; `cause` one of those below."""

    rank: int
    line: str  # dist.all_reduce(tokens)
    cause: str


# Causes to choose from:
#   a collective that one rank alone calls
#   a collective that the ranks call with different shapes
#   a rank that waits for something outside of the process group
#   a loss that is nan in the forward pass
#   a gradient that is nan though the loss is finite
#   a rank that trains with another learning rate
# 填入时照抄英文；依次是：只有一个 rank 调用的集合通信；各 rank 以不同形状调用的集合通信；一个 rank 在等进程组之外的东
# 西；前向中损失就是 nan；损失有限而梯度是 nan；一个 rank 用另外的学习率训练。


def fault_1() -> Finding:
    # TODO 1
    # 故障 1：返回 Finding(哪个 rank, patient.py 里那一行的文字, 原因)。
    raise NotImplementedError


def fault_2() -> Finding:
    # TODO 2
    # 故障 2：返回 Finding(哪个 rank, patient.py 里那一行的文字, 原因)。
    raise NotImplementedError


def fault_3() -> Finding:
    # TODO 3
    # 故障 3：返回 Finding(哪个 rank, patient.py 里那一行的文字, 原因)。
    raise NotImplementedError


def fault_4() -> Finding:
    # TODO 4
    # 故障 4：返回 Finding(哪个 rank, patient.py 里那一行的文字, 原因)。
    raise NotImplementedError


def fault_5() -> Finding:
    # TODO 5
    # 故障 5：返回 Finding(哪个 rank, patient.py 里那一行的文字, 原因)。
    raise NotImplementedError


def fault_6() -> Finding:
    # TODO 6
    # 故障 6：返回 Finding(哪个 rank, patient.py 里那一行的文字, 原因)。
    raise NotImplementedError


def guilty_lines(name: str) -> list[str]:
    """The lines of the patient that are right answers: those under the switch of the fault, and what they call."""
    lines = [line.partition("  #")[0].strip() for line in PATIENT.read_text().splitlines()]
    at = next(number for number, line in enumerate(lines) if f'has("{name}"' in line)
    found = lines[at : at + 3]
    for function in ("wait_for_token", "penalty"):
        if any(f"{function}(" in line for line in found):
            start = next(number for number, line in enumerate(lines) if line.startswith(f"def {function}("))
            found += lines[start + 2 : start + 4]
    return found + (["dist.all_reduce(tokens)"] if name == "short" else [])


def check(findings: list[Callable[[], Finding]]) -> None:
    """Compare with what is dealt; UserError names the first part that is wrong, and a tool that shows it."""
    tools = {
        "rank": "which rank's words differ from the other's?",
        "line": "the tool that stops there, or names the module, gives the line",
        "cause": "does it hang, is a number wrong, or do the ranks train different things?",
    }
    for number, finding in enumerate(findings, start=1):
        name, found = ORDER[number - 1], finding()
        if found.cause not in CAUSES.values():
            raise UserError(f"not yet: fault {number}, {found.cause!r} is none of the six causes: copy one from above.")
        right = {"cause": found.cause == CAUSES[name], "rank": found.rank == victim(number)}
        right["line"] = found.line.strip() in guilty_lines(name)
        for what, good in right.items():
            if not good:
                raise UserError(f"not yet: fault {number}, the {what} is not {getattr(found, what)!r}: {tools[what]}.")
    print(f"solved: rank, line and cause of {len(findings)} faults")


if __name__ == "__main__":
    with clear_errors():
        check([fault_1, fault_2, fault_3, fault_4, fault_5, fault_6])
