"""Day 11, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day11/solution.py. Source: notes.md."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day11.exercise import HYSTERESIS, LR, MIN_SCALE, WINDOW, check, clear_errors


class Fp16Optimizer:
    def __init__(self, weights: torch.Tensor, scale: float):
        self.weights, self.scale = weights, scale
        self.hysteresis, self.good_steps = HYSTERESIS, 0
        self.master = weights.float()
        self.adamw = torch.optim.AdamW([self.master], lr=LR)

    def update_scale(self, overflow: bool) -> None:
        if overflow:
            self.good_steps = 0
            if self.hysteresis > 1:
                self.hysteresis -= 1
            else:
                self.scale = max(self.scale / 2, MIN_SCALE)
            return
        self.good_steps += 1
        if self.good_steps > 1 and (self.good_steps - 1) % WINDOW == 0:
            self.scale *= 2
            self.hysteresis = HYSTERESIS

    def step(self, gradient: torch.Tensor) -> bool:
        averaged, scale = gradient.float(), self.scale
        dist.all_reduce(averaged)
        overflow = not torch.isfinite(averaged).all().item()
        self.update_scale(overflow)
        if overflow:
            return False
        self.master.grad = averaged / dist.get_world_size() / scale
        self.adamw.step()
        self.weights.copy_(self.master)
        return True


if __name__ == "__main__":
    with clear_errors():
        check(Fp16Optimizer)
