"""Day 23, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day23/solution.py. Source: notes.md."""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day23.exercise import check, clear_errors


class LoraLinear(nn.Module):
    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.base, self.r, self.alpha = base.requires_grad_(False), r, alpha
        self.A = nn.Parameter(torch.empty(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bypass = nn.functional.linear(nn.functional.linear(x, self.A), self.B)
        return self.base(x) + self.alpha / self.r * bypass

    def merged(self) -> nn.Linear:
        plain = nn.Linear(self.base.in_features, self.base.out_features, bias=self.base.bias is not None)
        plain.load_state_dict(self.base.state_dict())
        with torch.no_grad():
            plain.weight += self.alpha / self.r * self.B @ self.A
        return plain


def largest_rank(shapes: list[tuple[int, int]], total: int, share: float) -> int:
    one = sum(d_in + d_out for d_in, d_out in shapes)  # what r = 1 trains
    return int(share / (1 - share) * total / one)  # r * one <= share * (total + r * one)


def preference_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    rewards = beta * (policy - reference)
    return -nn.functional.logsigmoid(rewards[0] - rewards[1]).mean()


if __name__ == "__main__":
    with clear_errors():
        check(LoraLinear, largest_rank, preference_loss)
