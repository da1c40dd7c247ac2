"""Day 26, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day26/solution.py. Source: notes.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day26.exercise import check, clear_errors


def share_out(global_batch: int, largest_micro: int, ranks: int) -> tuple[int, int] | None:
    for micro in range(largest_micro, 0, -1):
        if global_batch % (micro * ranks) == 0:
            return micro, global_batch // (micro * ranks)
    return None


def sequences(step: int, rank: int, ranks: int, micro: int, accumulation: int) -> list[int]:
    before = (step - 1) * micro * accumulation * ranks
    starts = [before + (turn * ranks + rank) * micro for turn in range(accumulation)]
    return [number for start in starts for number in range(start, start + micro)]


def exposition(metrics: dict[str, float | None], rank: int) -> str:
    known = {name: float(value) for name, value in metrics.items() if value is not None}
    return "".join(f'{name}{{rank="{rank}"}} {value}\n' for name, value in known.items())


if __name__ == "__main__":
    with clear_errors():
        check(share_out, sequences, exposition)
