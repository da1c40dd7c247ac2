"""Day 06, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day06/solution.py. Source: notes.md."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day06.exercise import check, clear_errors


class GradientSlice:
    def __init__(self, start: int, stop: int, bucket_size: int, device: torch.device):
        self.start, self.stop, self.bucket_size = start, stop, bucket_size
        self.kept = torch.zeros(stop - start, device=device)
        self.bucket: list[tuple[int, torch.Tensor]] = []

    def add(self, offset: int, gradient: torch.Tensor) -> None:
        if sum(held.numel() for _, held in self.bucket) + gradient.numel() > self.bucket_size:
            self.flush()
        self.bucket.append((offset, gradient))

    def flush(self) -> None:
        flat = torch.cat([gradient for _, gradient in self.bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        averaged = flat.split([gradient.numel() for _, gradient in self.bucket])
        for (offset, _), gradient in zip(self.bucket, averaged, strict=True):
            first, last = max(offset, self.start), min(offset + gradient.numel(), self.stop)
            if first < last:
                self.kept[first - self.start : last - self.start] = gradient[first - offset : last - offset]
        self.bucket.clear()


if __name__ == "__main__":
    with clear_errors():
        check(GradientSlice)
