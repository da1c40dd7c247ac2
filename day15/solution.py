"""Day 15, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day15/solution.py. Source: notes.md."""

import math
import sys
from fractions import Fraction
from pathlib import Path

import torch
from deepspeed.pipe import LayerSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day15.exercise import CLASSES, DEPTH, HIDDEN, TOKENS, check, clear_errors


def bubble(stages: int, micro_batches: int) -> Fraction:
    # busy for m; the last micro-batch enters after m - 1 others and passes p stages: m + p - 1 in all
    return Fraction(stages - 1, micro_batches + stages - 1)


def kept(stages: int, micro_batches: int, stage: int) -> int:
    return min(stages - stage, micro_batches)


def micro_batches_for(stages: int, limit: Fraction) -> int:
    # (p - 1) / (m + p - 1) <= limit  <=>  m >= (p - 1) (1 / limit - 1)
    return max(1, math.ceil((stages - 1) * (1 / limit - 1)))


def layers() -> list[LayerSpec]:
    specs = [LayerSpec(torch.nn.EmbeddingBag, TOKENS, HIDDEN, mode="mean")]
    for _ in range(DEPTH):
        specs += [LayerSpec(torch.nn.Linear, HIDDEN, HIDDEN), LayerSpec(torch.nn.ReLU)]
    return [*specs, LayerSpec(torch.nn.Linear, HIDDEN, CLASSES)]


if __name__ == "__main__":
    with clear_errors():
        check(bubble, kept, micro_batches_for, layers)
