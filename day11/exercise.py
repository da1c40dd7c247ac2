"""Day 11, your turn: write the optimizer of fp16 training - loss scale, skipped steps, fp32 master weights.

Fill in the three TODOs, then check yourself, on two ranks (any number works):

    deepspeed --num_accelerators 2 day11/exercise.py

It hands your optimizer gradients, some with an inf on one rank only, and compares the loss scale with DeepSpeed's
DynamicLossScaler and the weights with AdamW in fp32. It says what is still wrong, or "solved".
The answers are in solution.py. Source: day11/notes.md.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from bench.judge import start_judging
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import print0

WINDOW, HYSTERESIS, MIN_SCALE, LR = 3, 2, 64.0, 0.01
# A letter a step: "." gradients are fine, "o" one rank has an inf, "n" one rank has a nan.
STEPS = "..o.n.o....o.on........nnooooo."


class Fp16Optimizer:
    """AdamW for fp16 `weights`: a flat tensor, the same on every rank, updated in place."""

    def __init__(self, weights: torch.Tensor, scale: float):
        self.weights, self.scale = weights, scale
        self.hysteresis, self.good_steps = HYSTERESIS, 0
        # TODO 1: self.master, a copy of the weights in fp32, and self.adamw, a torch.optim.AdamW with lr=LR over it.
        # self.master 是权重的 fp32 副本，self.adamw 是作用于它的 torch.optim.AdamW，lr=LR。
        raise NotImplementedError

    def update_scale(self, overflow: bool) -> None:
        """Move self.scale as DeepSpeed does; self.good_steps counts the steps in a row without an overflow."""
        # TODO 2: an overflow uses up hysteresis until 1 is left; from then on it halves the scale, not below MIN_SCALE.
        # The first good step does not count: after 1 + WINDOW, 1 + 2 * WINDOW, ... good steps in a row the scale
        # doubles, and hysteresis is HYSTERESIS again.
        # 像 DeepSpeed 一样调整损失缩放系数 self.scale；self.good_steps 数连续没有溢出的步。溢出先消耗 hysteresis，直
        # 到剩 1；此后每次溢出使系数减半，但不低于 MIN_SCALE。第一个正常步不算：连续 1 + WINDOW、1 + 2 * WINDOW……个正
        # 常步之后系数加倍，hysteresis 变回 HYSTERESIS。
        raise NotImplementedError

    def step(self, gradient: torch.Tensor) -> bool:
        """Return whether the weights were updated. `gradient`: in fp16, of loss x self.scale, of this rank alone."""
        # TODO 3: average over the ranks in fp32 (all_reduce; an inf or nan of one rank then reaches all). Update the
        # scale either way. With an overflow: change nothing else. Without: divide by the scale that the gradient was
        # made with, step self.adamw, and copy the masters to the fp16 weights.
        # 返回是否更新了权重。gradient 是 fp16 的、只属于本 rank 的、损失 x self.scale 的梯度。先以 fp32 在各 rank 间
        # 求平均（all_reduce；这样一个 rank 的 inf 或 nan 会传到所有 rank）。无论如何都更新系数。有溢出：别的都不动。
        # 没有：除以得出这个梯度时所用的系数，做一步 self.adamw，再把主权重复制到 fp16 权重。
        raise NotImplementedError


def check(fp16_optimizer: type) -> None:
    """Play STEPS; UserError says at which step what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    device = join_world()
    agree = start_judging()  # UserError on every rank when one has a problem; it ends a check that hangs
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(257, generator=generator).half().to(device)
    want, updates = weights.float(), 0
    reference = torch.optim.AdamW([want], lr=LR)
    scaler = DynamicLossScaler(512.0, WINDOW, MIN_SCALE, HYSTERESIS, False, raise_error_at_min_scale=False)
    mine = fp16_optimizer(weights, scale=512.0)
    agree(not hasattr(mine, "adamw") and "has no self.adamw: a torch.optim.AdamW over the fp32 masters, see TODO 1.")
    held = mine.adamw.param_groups[0]["params"][0]
    agree(held.dtype != torch.float32 and f"gave AdamW {held.dtype}: small updates need the fp32 master weights.")
    for step, event in enumerate(STEPS, start=1):
        gradients = torch.randn(world, 257, generator=generator).to(device) * 1e-3
        before, scale, overflow = weights.clone(), scaler.cur_scale, event != "."
        local = (gradients[rank] * scale).half()
        if overflow and rank == step % world:
            local[step] = float("inf" if event == "o" else "nan")
        updated = mine.step(local)
        scaler.update_scale(overflow)
        changed, at = not torch.equal(before, weights), f"at step {step}"
        agree(overflow and (changed or updated) and f"{at} made an update, but a gradient is broken: skip on all.")
        agree(mine.scale != scaler.cur_scale and f"{at} has loss scale {mine.scale}, DeepSpeed {scaler.cur_scale}.")
        if not overflow:
            agree(not changed and f"{at} left the weights alone: copy_ the masters to them after adamw.step().")
            agree(not updated and f"{at} returned {updated}: return True after an update.")
            want.grad, updates = gradients.mul(scale).half().float().mean(dim=0) / scale, updates + 1
            reference.step()
        far = (held.detach() - want).abs().max().item()
        hint = "average over the ranks, divide by the scale of before update_scale, all in fp32"
        agree(far > 1e-5 and f"{at} is {far:.1e} off AdamW in fp32: {hint}.")
    skipped = len(STEPS) - updates
    print0(f"solved: {updates} updates, {skipped} skipped steps on {world} ranks, loss scale {mine.scale} at the end")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(Fp16Optimizer)
