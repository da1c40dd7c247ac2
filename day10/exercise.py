"""Day 10, your turn: write what DeepSpeed's engine does with accumulation, in plain PyTorch.

Fill in the four TODOs, then check yourself, on two ranks (any number works):

    deepspeed --num_accelerators 2 day10/exercise.py

It trains a small model with your engine and compares it with large batches, and says what is wrong, or "solved".
The answers are in solution.py. Source: day10/notes.md.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from bench.judge import start_judging
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import print0

A, MICRO_BATCH, STEPS = 4, 2, 3  # micro-batches a step, sequences in one of them, optimizer steps


class Engine:
    """Data parallelism with accumulation, as ZeRO-0 does it. The caller calls backward and step for each micro-batch.

    Use self.optimizer, self.accumulation, self.parameters, dist.all_reduce, dist.get_world_size.
    """

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, accumulation: int):
        self.module, self.optimizer, self.accumulation = module, optimizer, accumulation
        self.parameters = list(module.parameters())
        self.micro_steps = 0  # calls of step() so far

    def is_boundary(self) -> bool:
        """Whether the micro-batch at hand is the last one of an optimizer step."""
        # TODO 1: micro_steps counts those that are over; the one at hand is the next.
        # 眼前的 micro-batch 是不是一个优化器步的最后一个。micro_steps 数的是已经结束的；眼前的是下一个。
        raise NotImplementedError

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this micro-batch's share of the step; at the boundary, average them over the ranks."""
        # TODO 2: which share of the step's loss is this one? PyTorch adds to .grad by itself.
        # 累加这个 micro-batch 在一步里的那一份梯度；到边界时在各 rank 间求平均。它占一步损失的多少？PyTorch 会自己加
        # 到 .grad 上。
        raise NotImplementedError

    def step(self) -> None:
        """At the boundary: update and clear the gradients. Always: count."""
        # TODO 3
        # 到边界时：更新，并清空梯度。每次都要：计数。
        raise NotImplementedError

    def finish(self) -> None:
        """The data ended inside a step: update with the mean over the micro-batches there were, and begin anew."""
        # TODO 4: how many are in? If none, nothing is to do. Each was divided by `accumulation`: correct that; average
        # over the ranks, update, clear, and count on to the next boundary.
        # 数据在一步中间结束：用已有 micro-batch 的平均值更新，然后重新开始。已有几个？没有就什么也不做。每个都除以了
        # accumulation：要改正过来；在各 rank 间求平均，更新，清空，并数到下一个边界。
        raise NotImplementedError


class Rivals:
    """Your engine with its model, and a copy of it that trains on large batches."""

    def __init__(self, engine_class: type, model: torch.nn.Module, agree: Callable) -> None:
        self.small, self.large, self.agree = model, copy.deepcopy(model), agree
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (self.small, self.large)]
        self.engine, self.optimizer = engine_class(self.small, optimizers[0], A), optimizers[1]

    def compare(self, before: torch.Tensor, micro_batches: torch.Tensor, hint: str) -> None:
        """One step of the large batch, then both have to have the same weights; `before`: those of the small one."""
        self.large(micro_batches.flatten(0, 2)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        ratio = ((self.small.weight - before).norm() / (self.large.weight - before).norm()).item()
        wrong = not torch.allclose(self.small.weight, self.large.weight, atol=1e-6)
        self.agree(wrong and f"changed its weights {ratio:.2f} times as much as the large batch does: {hint}.")


def check_steps(rivals: Rivals, data: torch.Tensor) -> None:
    """`data`: (micro-batches, ranks, sequences, numbers); whole steps."""
    engine, model, agree = rivals.engine, rivals.small, rivals.agree
    rank, world, sent, all_reduce = dist.get_rank(), dist.get_world_size(), [], dist.all_reduce
    total = sum(parameter.numel() for parameter in model.parameters())

    def counting_all_reduce(tensor: torch.Tensor, *args, **kwargs) -> object:
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with patch.object(dist, "all_reduce", counting_all_reduce):
        for number, micro_batch in enumerate(data[:, rank], start=1):
            before, last = model.weight.detach().clone(), number % A == 0
            agree(engine.is_boundary() != last and f"is wrong about micro-batch {number}: {A} make a step.")
            sent.clear()
            engine.backward(model(micro_batch).square().mean())
            talks = total if last else 0
            agree(sum(sent) != talks and f"averaged {sum(sent)} elements, not {talks}, in micro-batch {number}.")
            engine.step()
            moved = bool((model.weight != before).any())
            agree(moved != last and f"has {'new' if moved else 'old'} weights after micro-batch {number}.")
            if last:
                hint = f"divide the loss by {A} and the sum over the ranks by {world}, and clear the gradients"
                rivals.compare(before, data[number - A : number], hint)


def check_finish(rivals: Rivals, data: torch.Tensor) -> None:
    """`data`: what is left over, fewer micro-batches than a step has."""
    engine, model, agree = rivals.engine, rivals.small, rivals.agree
    before = model.weight.detach().clone()
    for micro_batch in data[:, dist.get_rank()]:
        engine.backward(model(micro_batch).square().mean())
        engine.step()
    engine.finish()
    rivals.compare(before, data, f"in finish() {len(data)} micro-batches are in, each divided by {A}")
    agree(engine.micro_steps % A and "is inside a step after finish(): count on to the next boundary.")
    before = model.weight.detach().clone()
    engine.finish()
    agree(bool((model.weight != before).any()) and "updated again in a finish() without micro-batches.")


def check(engine_class: type) -> None:
    """Train with accumulation and with large batches; UserError says what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    device = join_world()
    agree = start_judging()  # UserError on every rank when one has a problem; it ends a check that hangs
    world = dist.get_world_size()
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    data = torch.randn(STEPS * A + 2, world, MICRO_BATCH, 5).to(device)  # 2 micro-batches are left at the end
    rivals = Rivals(engine_class, model.to(device), agree)
    check_steps(rivals, data[:-2])
    check_finish(rivals, data[-2:])
    print0(f"solved: {STEPS} steps of {A} micro-batches, and one of 2, as with large batches on {world} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(Engine)
