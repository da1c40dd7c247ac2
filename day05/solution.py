"""Day 05, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day05/solution.py. Source: notes.md."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day05.exercise import check, clear_errors


def slice_of(psi: int, rank: int, num_ranks: int) -> tuple[int, int]:
    size = -(-psi // num_ranks)  # rounded up
    return rank * size, (rank + 1) * size


class ShardedAdamW:
    def __init__(self, weights: torch.Tensor, lr: float):
        self.weights = weights
        self.start, self.stop = slice_of(weights.numel(), dist.get_rank(), dist.get_world_size())
        self.slice = self.cut(weights)
        self.adamw = torch.optim.AdamW([self.slice], lr=lr)

    def cut(self, flat: torch.Tensor) -> torch.Tensor:
        """A copy of this rank's slice of `flat`, padding included."""
        padding = (self.stop - self.start) * dist.get_world_size() - flat.numel()
        return torch.nn.functional.pad(flat, (0, padding))[self.start : self.stop].clone()

    def step(self, gradient: torch.Tensor) -> None:
        self.slice.grad = self.cut(gradient)
        self.adamw.step()
        padded = self.slice.new_empty(self.slice.numel() * dist.get_world_size())
        dist.all_gather(list(padded.chunk(dist.get_world_size())), self.slice)  # the chunks are views of padded
        self.weights.copy_(padded[: self.weights.numel()])


if __name__ == "__main__":
    with clear_errors():
        check(slice_of, ShardedAdamW)
