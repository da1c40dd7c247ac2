"""Day 24: how often does a job of N GPUs fail, how often should it save, and what part of its time counts?

    from day24.goodput import best_interval_s, mtbf_s, simulate      # `python day24/labs/at_scale.py` tabulates them

Plain arithmetic, and a simulator that draws failures one after the other to check it. All times in seconds.
Source: Young 1974, CACM 17(9); Daly 2006, FGCS 22(3); Llama Team 2024, arXiv:2407.21783, section 3.3.4.
"""

import math
import random

HOUR, DAY = 3600.0, 86400.0
# The published run: unexpected interruptions, GPUs, days.
LLAMA3_INTERRUPTIONS, LLAMA3_GPUS, LLAMA3_DAYS = 419, 16_384, 54


def mtbf_s(num_gpus: int, per_gpu_s: float = LLAMA3_GPUS * LLAMA3_DAYS * DAY / LLAMA3_INTERRUPTIONS) -> float:
    """Mean time between failures of a job that any of its GPUs (and what belongs to it) can end.

    `per_gpu_s`: that of one GPU; the default is Llama 3's, 50,677 hours or 5.8 years. Failures are independent.
    """
    return per_gpu_s / num_gpus


def best_interval_s(save_s: float, mtbf: float) -> float:
    """Young's interval between two checkpoints: saving more often costs time, more rarely costs lost work."""
    return math.sqrt(2 * save_s * mtbf)


def daly_interval_s(save_s: float, mtbf: float) -> float:
    """Daly's higher-order estimate, for checkpoints that are not short against the MTBF."""
    if save_s >= 2 * mtbf:
        return mtbf
    ratio = save_s / (2 * mtbf)
    return math.sqrt(2 * save_s * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def goodput(interval_s: float, save_s: float, restart_s: float, mtbf: float) -> float:
    """Expected part of the time that ends up in the weights; Daly's complete model, exponential failures.

    A segment of `interval_s` of work and `save_s` of saving counts when no failure falls into it; a failure costs
    what was done of the segment, and `restart_s`, in which the job can fail again.
    """
    segment_s = mtbf * math.exp(restart_s / mtbf) * math.expm1((interval_s + save_s) / mtbf)
    return interval_s / segment_s


def simulate(
    seed: int, total_s: float, interval_s: float, save_s: float, restart_s: float, mtbf: float
) -> tuple[int, float]:
    """Play a job for `total_s`, one failure after the other; return the number of failures and the goodput."""
    draw = random.Random(seed).expovariate
    now = useful = 0.0
    failures, next_failure = 0, draw(1 / mtbf)
    while now < total_s:
        ends = now + interval_s + save_s
        if next_failure > ends:  # a whole segment, saved
            now, useful = ends, useful + interval_s
            continue
        while now < total_s and next_failure <= ends:  # down: a failure during the restart begins it anew
            failures += next_failure < total_s
            now, ends = next_failure, next_failure + restart_s
            next_failure = now + draw(1 / mtbf)
        now = ends
    return failures, useful / now
