"""Day 14, your turn: how many repeats does it take to find 3 %? Write the interval, the plan and the verdict yourself.

Fill in the three TODOs, then check yourself (no ranks are needed, seconds):

    python day14/exercise.py

It tries your functions on a simulated machine, on which the truth is known, and says what is wrong, or "solved".
Targets: at most 5 of 100 comparisons of equals end with a difference, at least 90 of 100 find a planted 3 % at the
number of turns that you advise, and you advise at most 1.5 times as many as the solution does.
The answers are in solution.py. Source: day14/notes.md.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from day14 import stats
from day14.clock import NoisyClock
from day14.stats import turn_orders

RUNS, PILOT = 100, 30  # comparisons of each kind, turns of a pilot
CONFIDENCE, POWER = 0.99, 0.95


def bounds(baseline_s: list[float], case_s: list[float]) -> tuple[float, float]:
    """Bounds of the median of baseline's seconds / the case's, turn by turn, with CONFIDENCE.

    Both lists have a time for each turn; those of one turn were measured side by side.
    """
    # TODO 1: the ratios of the turns (not of the medians); 2,000 samples of them, each drawn with replacement and as
    # large as there are turns (np.random.default_rng(0).integers picks); the median of each sample; and the bounds
    # between which the middle 99 % of these medians lie.
    # 返回“基线秒数 / 被比较者秒数”逐轮之比的中位数的上下界，置信度 CONFIDENCE。两个列表每轮各有一个时间，同一轮的是并
    # 排测的。取各轮的比值（不是中位数之比）；有放回地抽 2,000 个样本，每个与轮数一样大（用
    # np.random.default_rng(0).integers 抽）；求每个样本的中位数；上下界之间是这些中位数中间的 99 %。
    raise NotImplementedError


def verdict(low: float, high: float) -> str:
    """ "faster", "slower" or "cannot tell", of the case whose ratio lies between `low` and `high`."""
    # TODO 2: the ratio is baseline / case. What does a ratio of 1 mean?
    # 比值落在 low 和 high 之间时，返回 "faster"、"slower" 或 "cannot tell"。比值是基线 / 被比较者。比值为 1 意味着什
    # 么？
    raise NotImplementedError


def repeats(low: float, high: float, turns: int, difference: float) -> int:
    """How many turns find `difference` (0.03: 3 %) in POWER of the runs; a pilot of `turns` gave these bounds."""
    # TODO 3: with logarithms, half of the pilot's interval is 2.58 standard errors of the median. To be found in 95 of
    # 100, the difference has to be 2.58 + 1.64 of them. Standard errors fall with the square root of the turns. And a
    # pilot of 30 turns is itself uncertain: take its standard error a little larger, by 1 + 1/sqrt(turns).
    # 要多少轮，才能在 POWER 的运行中检出 difference（0.03 即 3 %）；预跑 turns 轮得到了这两个界。取对数后，预跑区间的
    # 一半是中位数标准误的 2.58 倍。要在 100 次里检出 95 次，差异须是标准误的 2.58 + 1.64 倍。标准误随轮数的平方根下降。
    # 30 轮的预跑本身也不确定：把它的标准误放大一点，乘以 1 + 1/sqrt(turns)。
    raise NotImplementedError


def run(turns: int, difference: float, seed: int) -> tuple[list[float], list[float]]:
    """Times of the baseline and of a case that is faster by `difference`, by turns in random order."""
    clock, seconds = NoisyClock(seed), {"baseline": [], "case": []}
    for order in turn_orders(list(seconds), turns, seed):
        for name in order:
            seconds[name].append(clock.step(0.05 / (1 + difference if name == "case" else 1)))
    return seconds["baseline"], seconds["case"]


def check_bounds(bounds: Callable) -> None:
    """Turn by turn, and neither too wide nor too narrow."""
    slowed = [10.0**turn for turn in range(12)]  # the machine slows down tenfold in each turn, the ratio stays
    low, high = bounds([1.1 * seconds for seconds in slowed], slowed)
    if not abs(low - 1.1) < 1e-6 > abs(high - 1.1):
        raise UserError(
            f"not yet: every turn has a ratio of 1.1, your bounds are {low:.3g} and {high:.3g}: compare turn by turn."
        )
    widths = [np.log(high / low) for low, high in (bounds(*run(PILOT, 0.0, seed)) for seed in range(RUNS))]
    right = [np.log(high / low) for low, high in (reference(*run(PILOT, 0.0, seed)) for seed in range(RUNS))]
    share = median(widths) / median(right)
    if not 0.8 < share < 1.25:
        why = "is it the middle 99 %?" if share > 0.3 else "medians of samples as large as the data, not of all of it?"
        raise UserError(f"not yet: your intervals are {share:.2f} times as wide as they should be: {why}")


def reference(baseline_s: list[float], case_s: list[float]) -> tuple[float, float]:
    return stats.interval(stats.paired_ratios(baseline_s, case_s))


def check(bounds: Callable, verdict: Callable, repeats: Callable) -> None:
    """Equals, a planted 3 %, and the plan; UserError says what is missed."""
    check_bounds(bounds)
    for low, high, want in ((1.01, 1.2, "faster"), (0.8, 0.99, "slower"), (0.99, 1.2, "cannot tell")):
        if (got := verdict(low, high)) != want:
            raise UserError(f"not yet: a ratio between {low} and {high} is {want!r}, you say {got!r}.")
    wrong = sum(verdict(*bounds(*run(PILOT, 0.0, seed))) != "cannot tell" for seed in range(RUNS))
    if wrong > 0.05 * RUNS:
        raise UserError(f"not yet: {wrong} of {RUNS} comparisons of equals end with a difference, 5 are allowed.")
    pilots = [bounds(*run(PILOT, 0.0, seed)) for seed in range(RUNS)]
    plans = [repeats(low, high, PILOT, 0.03) for low, high in pilots]
    most = 1.5 * median(stats.repeats_needed(pilot, PILOT, 0.03) for pilot in pilots)
    if median(plans) > most:
        raise UserError(f"not yet: you advise {median(plans):.0f} turns (median): {most:.0f} must do. Square what?")
    found = sum(verdict(*bounds(*run(turns, 0.03, RUNS + seed))) == "faster" for seed, turns in enumerate(plans))
    if found < 0.9 * RUNS:
        raise UserError(f"not yet: at your {median(plans):.0f} turns {found} of {RUNS} find 3 %, 90 have to.")
    print(f"solved: {wrong} of {RUNS} wrong; 3 % takes {median(plans):.0f} turns here, and {found} of {RUNS} find it")


if __name__ == "__main__":
    with clear_errors():
        check(bounds, verdict, repeats)
