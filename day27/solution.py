"""Day 27, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day27/solution.py. Source: notes.md."""

import math
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day27.exercise import check, clear_errors


def is_wrong(loss: float, last_hour: list[float]) -> str | None:
    if math.isnan(loss):
        return "nan"
    least = min((value for value in last_hour if not math.isnan(value)), default=math.inf)
    return "diverging" if loss > 1.2 * least else None


def first_firing(is_true: list[bool], for_evaluations: int) -> int | None:
    in_a_row = 0
    for number, now in enumerate(is_true):
        in_a_row = in_a_row + 1 if now else 0
        if in_a_row > for_evaluations:
            return number
    return None


def fastest(trials: list[dict]) -> str | None:
    speeds = {}
    for trial in trials:
        if trial["status"] == "ok":
            speeds.setdefault(trial["settings"], []).append(trial["tokens_per_s"])
    return max(speeds, key=lambda settings: median(speeds[settings]), default=None)


if __name__ == "__main__":
    with clear_errors():
        check(is_wrong, first_firing, fastest)
