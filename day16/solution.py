"""Day 16, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day16/solution.py. Source: notes.md."""

import sys
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day16.exercise import HIDDEN, TOKENS, check, clear_errors


def head(embedding: torch.nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    return x @ embedding.weight.T


def layers() -> list[LayerSpec]:
    return [
        TiedLayerSpec("embed", torch.nn.Embedding, TOKENS, HIDDEN),
        LayerSpec(torch.nn.Linear, HIDDEN, HIDDEN),
        TiedLayerSpec("embed", torch.nn.Embedding, TOKENS, HIDDEN, forward_fn=head),
    ]


def best_parts(costs: list[float], stages: int) -> list[int]:
    ways = [[0, *cut, len(costs)] for cut in combinations(range(1, len(costs)), stages - 1)]
    return min(ways, key=lambda way: max(sum(costs[a:b]) for a, b in zip(way, way[1:], strict=False)))


def waiting(stage_seconds: list[int], micro_batches: int) -> Fraction:
    time = sum(stage_seconds) + (micro_batches - 1) * max(stage_seconds)
    return 1 - Fraction(micro_batches * sum(stage_seconds), len(stage_seconds) * time)


if __name__ == "__main__":
    with clear_errors():
        check(layers, best_parts, waiting)
