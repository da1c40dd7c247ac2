"""Time steps fairly: wait for the device before both looks at the clock, warm up, take turns, compare medians.

    seconds, loss = time_step(lambda: train_step(batch))
    runs = take_turns({"plain": plain_step, "ours": our_step}, turns=11)
    print(ratio(runs["plain"], runs["ours"]))       # 1.05: ours takes 1/1.05 of plain's time

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html (asynchronous execution)
"""

import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch
from deepspeed.accelerator import get_accelerator

from common.ranks import over_ranks

T = TypeVar("T")


def time_step(step: Callable[[], T]) -> tuple[float, T]:
    """Return (seconds, what `step()` returned). The host waits for the device before and after."""
    get_accelerator().synchronize()
    start = time.perf_counter()
    result = step()
    get_accelerator().synchronize()
    return time.perf_counter() - start, result


def take_turns(steps: dict[str, Callable[[], T]], turns: int) -> dict[str, list[tuple[float, T]]]:
    """Run every case once a turn, now forwards, now backwards; return {case: [(seconds, result) of each turn]}.

    What else the machine does meanwhile meets all cases. A case may be a window of several steps.
    """
    runs = {case: [] for case in steps}
    for turn in range(turns):
        for case in list(steps)[:: -1 if turn % 2 else 1]:
            runs[case].append(time_step(steps[case]))
    return runs


def ratio(baseline: list[tuple[float, T]], case: list[tuple[float, T]], warm_up: int = 1) -> float:
    """Median over the turns of baseline's seconds / case's, without the first `warm_up`: above 1, `case` is faster."""
    pairs = zip(baseline[warm_up:], case[warm_up:], strict=True)
    return median(theirs / ours for (theirs, _), (ours, _) in pairs)


def losses_apart(one: list[float], other: list[float]) -> float:
    """The largest difference between two runs' losses, step by step."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def slowest_median(seconds: list[float], device: torch.device, warm_up: int = 0) -> float:
    """The median of `seconds` without the first `warm_up`, on the rank where it is largest. Collective."""
    return over_ranks(median(seconds[warm_up:] or seconds), device, "max")
