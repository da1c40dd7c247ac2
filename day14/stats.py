"""Day 14: stats - which is faster? Turns in random order, paired ratios, their median, a bootstrap interval, a verdict.

    from day14.stats import judge, turn_orders

    seconds = {"a": [], "b": []}
    for order in turn_orders(["a", "b"], turns=20):
        for case in order:
            seconds[case].append(time_step(steps[case])[0])
    print(judge(seconds["a"], seconds["b"], difference=0.05).text)      # of b: faster, slower, cannot tell (...)

Times in seconds, one a turn. A ratio above 1: the second case is faster. Nothing here starts or times anything.
Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; Kalibera & Jones 2013 (ISMM).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from common.errors import UserError

CONFIDENCE = 0.99  # of an interval: in 1 of 100 comparisons of equals it leaves out 1
POWER = 0.95  # a difference of the size asked for is to be found in 95 of 100 comparisons
MIN_TURNS = 10  # of fewer, not even the smallest and the largest ratio make an interval of this confidence
RESAMPLES = 2000


def turn_orders(cases: Sequence[str], turns: int, seed: int = 0) -> list[list[str]]:
    """For each turn all cases in a new random order; the same on every rank.

    Random, so that nothing in the machine can keep step with it: when the cases are equal, which of the two comes out
    ahead in a turn is a coin's fall, whatever else runs.
    """
    draw = random.Random(seed)
    return [draw.sample(list(cases), len(cases)) for _ in range(turns)]


def paired_ratios(baseline_s: Sequence[float], case_s: Sequence[float]) -> np.ndarray:
    """Turn by turn, the baseline's seconds / the case's: what slowed the machine in a turn slowed both."""
    if len(baseline_s) != len(case_s) or len(case_s) < MIN_TURNS:
        raise UserError(f"{len(baseline_s)} and {len(case_s)} turns: both need the same number, {MIN_TURNS} or more")
    return np.asarray(baseline_s, float) / np.asarray(case_s, float)


def resampled_medians(values: Sequence[float] | np.ndarray, seed: int = 0) -> np.ndarray:
    """The bootstrap: medians of RESAMPLES samples, each drawn from `values` with replacement and as large."""
    values = np.asarray(values)
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    return np.median(values[picks], axis=1)


def unpaired_interval(baseline_s: Sequence[float], case_s: Sequence[float]) -> tuple[float, float]:
    """The same for the ratio of two medians, as if turns were nothing: what one has after timing one case, then the
    other. Here to be shown wrong (labs/aa.py, labs/power.py)."""
    ratios = resampled_medians(baseline_s, seed=1) / resampled_medians(case_s, seed=2)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def interval(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Between which bounds the median lies, with this confidence: the middle part of the resampled medians."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_medians(values), [tail, 1 - tail])
    return float(low), float(high)


def smallest_difference(bounds: tuple[float, float], confidence: float = CONFIDENCE) -> float:
    """The smallest relative difference that as many turns as gave this interval find with POWER.

    A difference is found when the interval around what was measured leaves out 1. So it has to be half an interval,
    and as much again as a measurement strays downwards.
    """
    return math.expm1(math.log(bounds[1] / bounds[0]) / 2 * (1 + stray(confidence)))


def stray(confidence: float) -> float:
    """How far, in half intervals, all but 1 - POWER of the measurements stay above."""
    return NormalDist().inv_cdf(POWER) / NormalDist().inv_cdf((1 + confidence) / 2)


def repeats_needed(bounds: tuple[float, float], turns: int, difference: float, confidence: float = CONFIDENCE) -> int:
    """How many turns it takes to find `difference` (0.03: 3 %), judged from the interval that a pilot of `turns` gave.

    The error of a median falls with the square root of the turns. The pilot's own interval is uncertain, by about
    1/sqrt(turns) of itself: that much is added, or half of the plans would come out too small.
    """
    if difference <= 0:
        raise UserError(f"a difference of {difference}: say how much matters to you, 0.03 for 3 %")
    found = math.log1p(smallest_difference(bounds, confidence)) * (1 + 1 / math.sqrt(turns))
    return max(MIN_TURNS, math.ceil(turns * (found / math.log1p(difference)) ** 2))


@dataclass(frozen=True)
class Verdict:
    """What was measured, between which bounds, and what may be said of it."""

    ratio: float
    low: float
    high: float
    smallest: float  # difference that as many turns find
    needed: int  # turns that the difference asked for takes
    text: str


def judge(
    baseline_s: Sequence[float], case_s: Sequence[float], difference: float = 0.03, comparisons: int = 1
) -> Verdict:
    """Say of the case: "faster", "slower", "cannot tell (needs n more)" or "cannot tell (less than 3 % apart)".

    `difference`: what matters to you; `comparisons`: how many such verdicts one table has. Each gets its share of the
    allowed error, or with enough configs one would win by luck (Bonferroni).
    """
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    ratios = paired_ratios(baseline_s, case_s)
    low, high = interval(ratios, confidence)
    needed = repeats_needed((low, high), len(ratios), difference, confidence)
    if low > 1:
        text = "faster"
    elif high < 1:
        text = "slower"
    elif 1 / (1 + difference) < low and high < 1 + difference:
        text = f"cannot tell (less than {difference:.0%} apart)"
    else:
        text = f"cannot tell (needs {max(1, needed - len(ratios))} more)"
    smallest = smallest_difference((low, high), confidence)
    return Verdict(float(np.median(ratios)), low, high, smallest, needed, text)
