"""Day 14: designs - ways to compare two steps, wrong ones and the right one, to be tried where the truth is known.

    from day14.designs import DESIGNS, concluded

    ratio, verdict = concluded(DESIGNS["random order"], lambda case: clock.step(seconds[case]), turns=15, seed=1)

A design says in which order cases "a" and "b" are timed, and how the times become an interval of a's time / b's.
Source: day14/notes.md; day14/stats.py has what the right one is made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from day14.stats import interval, paired_ratios, turn_orders, unpaired_interval


@dataclass(frozen=True)
class Design:
    """`orders(turns, seed)`: the cases in the order in which they are timed; `paired`: compared turn by turn."""

    orders: Callable[[int, int], list[str]]
    paired: bool
    looks: bool = False  # from the tenth turn on, look after each turn and stop at the first difference


def _random(turns: int, seed: int) -> list[str]:
    return [case for order in turn_orders("ab", turns, seed) for case in order]


DESIGNS = {
    "blocks": Design(lambda turns, seed: ["a"] * turns + ["b"] * turns, paired=False),
    "always A first": Design(lambda turns, seed: ["a", "b"] * turns, paired=True),
    "random, looking": Design(_random, paired=True, looks=True),
    "random order": Design(_random, paired=True),
}


def concluded(design: Design, step: Callable[[str], float], turns: int, seed: int) -> tuple[float, str]:
    """Time both cases by the design; return (a's time / b's, "faster", "slower" or "cannot tell" of b)."""
    seconds = {"a": [], "b": []}
    for case in design.orders(turns, seed):
        seconds[case].append(step(case))
    if not design.paired:
        return median(seconds["a"]) / median(seconds["b"]), _say(unpaired_interval(seconds["a"], seconds["b"]))
    ratios = paired_ratios(seconds["a"], seconds["b"])
    for seen in range(10, turns) if design.looks else []:
        if (verdict := _say(interval(ratios[:seen]))) != "cannot tell":
            return float(median(ratios[:seen])), verdict
    return float(median(ratios)), _say(interval(ratios))


def _say(bounds: tuple[float, float]) -> str:
    return "faster" if bounds[0] > 1 else "slower" if bounds[1] < 1 else "cannot tell"


def echo(seconds: Sequence[float], lag: int) -> float:
    """Autocorrelation: how much a step's time says of the time `lag` steps later. 0: nothing; 1: all of it."""
    logs = np.log(seconds)
    return float(np.corrcoef(logs[:-lag], logs[lag:])[0, 1])
