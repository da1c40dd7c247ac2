"""Day 14, the answers. Run it like the exercise: `day14/solution.py` with plain python. Source: notes.md."""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day14.exercise import check, clear_errors


def bounds(baseline_s: list[float], case_s: list[float]) -> tuple[float, float]:
    ratios = np.array(baseline_s) / np.array(case_s)
    picks = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.005, 0.995])
    return low, high


def verdict(low: float, high: float) -> str:
    if low > 1:
        return "faster"
    return "slower" if high < 1 else "cannot tell"


def repeats(low: float, high: float, turns: int, difference: float) -> int:
    error = math.log(high / low) / 2 / 2.58 * (1 + 1 / math.sqrt(turns))
    return math.ceil(turns * ((2.58 + 1.64) * error / math.log(1 + difference)) ** 2)


if __name__ == "__main__":
    with clear_errors():
        check(bounds, verdict, repeats)
