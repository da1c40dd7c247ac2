"""Day 18, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day18/solution.py. Source: notes.md."""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day18.exercise import check, clear_errors


def to_universal(parts: list[torch.Tensor], shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    flat, offset, whole = torch.cat(parts), 0, {}
    for name, shape in shapes.items():
        whole[name] = flat[offset : offset + math.prod(shape)].view(shape)
        offset += math.prod(shape)
    return whole


def to_parts(whole: dict[str, torch.Tensor], num_ranks: int) -> list[torch.Tensor]:
    flat = torch.cat([tensor.flatten() for tensor in whole.values()])
    size = -(-len(flat) // num_ranks)
    return list(torch.cat([flat, torch.zeros(size * num_ranks - len(flat))]).split(size))


if __name__ == "__main__":
    with clear_errors():
        check(to_universal, to_parts)
