"""Day 05, your turn: write ZeRO-1 by hand, in plain torch.distributed.

Fill in the three TODOs, then check yourself, on two ranks (any number works):

    deepspeed --num_accelerators 2 day05/exercise.py

It compares your weights with AdamW on the whole vector, and says what is still wrong, or "solved".
The answers are in solution.py. Source: day05/notes.md.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from bench.judge import start_judging
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import print0

PSI, STEPS, LR = 1009, 3, 0.01  # parameters: a prime, so that no number of ranks divides it


def slice_of(psi: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """[start, stop) of `rank`'s slice of `psi` elements. All are equally long: the last may end in the padding."""
    # TODO 1: the shortest length with which the slices cover the vector is a division, rounded up.
    # 返回 rank 那一片的 [start, stop)：各片等长，最后一片可以伸进补齐的部分。盖得住整个向量的最短长度，是一次向上取整
    # 的除法。
    raise NotImplementedError


class ShardedAdamW:
    """AdamW on this rank's slice of `weights`, a flat vector that every rank has whole."""

    def __init__(self, weights: torch.Tensor, lr: float):
        self.weights = weights
        # TODO 2: self.adamw, a torch.optim.AdamW with this lr over one tensor: a copy of this rank's slice.
        # Python cuts weights[start:stop] short at the end of the vector; torch.nn.functional.pad appends zeros to it.
        # self.adamw 是用这个 lr 的 torch.optim.AdamW，只管一个张量，即本 rank 那一片的副本。Python 的
        # weights[start:stop] 到向量末尾会变短；torch.nn.functional.pad 可以在后面补零。
        raise NotImplementedError

    def step(self, gradient: torch.Tensor) -> None:
        """Update all of `weights`, in place. `gradient`: flat, whole, already averaged over the ranks."""
        # TODO 3: give the slice its part of the gradient (padded as well), call self.adamw.step(), collect all slices
        # with dist.all_gather, and copy them, without the padding, into self.weights.
        # gradient 是展平的、完整的、已在各 rank 间平均过的梯度。把对应的部分（同样补齐）交给那一片，调用
        # self.adamw.step()，用 dist.all_gather 收集所有片，去掉补齐后复制到 self.weights。
        raise NotImplementedError


def check(slice_of: Callable, sharded_adamw: type) -> None:
    """Train a flat vector both ways; UserError says what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    device = join_world()
    agree = start_judging()
    rank, world = dist.get_rank(), dist.get_world_size()
    before, *gradients = torch.randn(1 + STEPS, PSI, generator=torch.Generator().manual_seed(0)).to(device)
    weights, want = before.clone(), before.clone()
    reference = torch.optim.AdamW([want], lr=LR)
    for psi, ranks, owner in [(10, 4, 0), (10, 4, 3), (12, 4, 3), *((PSI, world, owner) for owner in range(world))]:
        size = -(-psi // ranks)
        if (got := slice_of(psi, owner, ranks)) != (owner * size, (owner + 1) * size):
            hint = f"Each slice is {size} long and starts where the one before ends; the last is padded."
            raise UserError(f"not yet: TODO 1, slice_of({psi}, {owner}, {ranks}) is {got}. {hint}")
    sharded = sharded_adamw(weights, lr=LR)
    if not isinstance(getattr(sharded, "adamw", None), torch.optim.AdamW):
        raise UserError("not yet: TODO 2, self.adamw is no torch.optim.AdamW.")
    held = sum(p.numel() for group in sharded.adamw.param_groups for p in group["params"])
    hint = "pad before you cut" if held < size else "its slice is enough, or each rank keeps all the moments"
    agree(held != size and f"gave AdamW {held} elements, want {size}: {hint}.")
    for gradient in gradients:
        want.grad = gradient.clone()
        reference.step()
        sharded.step(gradient.clone())

    moments = sum(state["exp_avg"].numel() for state in sharded.adamw.state.values())
    agree(moments != size and f"has first moments of {moments} elements, want {size}: self.adamw makes every step.")
    wrong = (weights - want).abs() > 1e-6
    if torch.equal(weights[wrong], before[wrong]):
        problem = f"still has {wrong.sum()} of {PSI} old weights: all-gather the slices and copy them to self.weights."
    elif wrong[rank * size : (rank + 1) * size].any():
        problem = "has a slice that differs from AdamW's: its .grad is the same [start, stop) of the padded gradient."
    else:
        problem = "has its own slice right and others wrong: all-gather in every step, in the order of the ranks."
    agree(problem if wrong.any() else None)
    print0(f"solved: AdamW's weights, with moments of {size} instead of {PSI} elements on each of {world} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(slice_of, ShardedAdamW)
