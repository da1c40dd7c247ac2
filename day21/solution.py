"""Day 21, the answers. Run it like the exercise: python day21/solution.py. Source: notes.md."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day21.exercise import check, clear_errors


def peak_bytes(blocks: int, only: int, every: int, input_bytes: int, kept_bytes: int, meanwhile_bytes: int) -> float:
    inputs = only // every * input_bytes
    at_kept = inputs + (blocks - only) * kept_bytes
    at_checkpoints = inputs + every * kept_bytes if only else 0
    return max(at_kept, at_checkpoints) + meanwhile_bytes


def choose(blocks: int, budget: float, peak: Callable[[int, int], float]) -> tuple[int, int] | None:
    for only in range(blocks + 1):
        divisors = [every for every in range(1, only + 1) if only % every == 0] or [1]
        best = min(divisors, key=lambda every, only=only: peak(only, every))
        if peak(only, best) <= budget:
            return only, best
    return None


def run(stack: list[torch.nn.Module], x: torch.Tensor, only: int, every: int) -> torch.Tensor:
    def segment(first: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def through(x: torch.Tensor) -> torch.Tensor:
            for block in stack[first : first + every]:
                x = block(x)
            return x

        return through

    for first in range(0, only, every):
        x = checkpoint(segment(first), x, use_reentrant=False)
    for block in stack[only:]:
        x = block(x)
    return x


if __name__ == "__main__":
    with clear_errors():
        check(SimpleNamespace(peak_bytes=peak_bytes, choose=choose, run=run))
