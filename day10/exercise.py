"""Day 10, your turn: write what DeepSpeed's engine does with accumulation, in plain PyTorch.

Fill in the four TODOs, then check yourself, on two ranks (any number works):

    deepspeed --num_accelerators 2 day10/exercise.py

It trains a small model with your engine and compares it with large batches, and says what is wrong, or "solved".
The answers are in solution.py. Source: day10/notes.md.
"""

import argparse
import copy
import os
import sys
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.cpu import start_without_compiler
from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher

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
        raise NotImplementedError

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this micro-batch's share of the step; at the boundary, average them over the ranks."""
        # TODO 2: which share of the step's loss is this one? PyTorch adds to .grad by itself.
        raise NotImplementedError

    def step(self) -> None:
        """At the boundary: update and clear the gradients. Always: count."""
        # TODO 3
        raise NotImplementedError

    def finish(self) -> None:
        """The data ended inside a step: update with the mean over the micro-batches there were, and begin anew."""
        # TODO 4: how many are in? If none, nothing is to do. Each was divided by `accumulation`: correct that; average
        # over the ranks, update, clear, and count on to the next boundary.
        raise NotImplementedError


def agree(problem: str | bool | None) -> None:
    """Stop every rank with the first rank's problem. Collective: a rank that stops alone leaves the others waiting."""
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if wrong := [f"rank {rank} {sentence}" for rank, sentence in enumerate(problems) if sentence]:
        raise UserError(f"not yet: {wrong[0]}")


def check(engine_class: type) -> None:
    """Train with accumulation and with large batches; UserError says what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    rank, world, device = dist.get_rank(), dist.get_world_size(), get_accelerator().current_device_name()
    torch.manual_seed(0)
    model, data = torch.nn.Linear(5, 3), torch.randn(STEPS * A + 2, world, MICRO_BATCH, 5)  # 2 are left at the end
    large, model, data = copy.deepcopy(model).to(device), model.to(device), data.to(device)
    optimizer, want = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, large))
    engine, sent, all_reduce = engine_class(model, optimizer, A), [], dist.all_reduce

    def counting_all_reduce(tensor: torch.Tensor, *args, **kwargs) -> object:
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    total = sum(parameter.numel() for parameter in model.parameters())

    def compare(before: torch.Tensor, micro_batches: torch.Tensor, hint: str) -> None:
        large(micro_batches.flatten(0, 2)).square().mean().backward()
        want.step()
        want.zero_grad()
        ratio = ((model.weight - before).norm() / (large.weight - before).norm()).item()
        wrong = not torch.allclose(model.weight, large.weight, atol=1e-6)
        agree(wrong and f"changed its weights {ratio:.2f} times as much as the large batch does: {hint}.")

    try:
        with patch.object(dist, "all_reduce", counting_all_reduce):
            for number, micro_batch in enumerate(data[:-2, rank], start=1):
                before, last, talks = model.weight.detach().clone(), number % A == 0, number % A == 0 and total
                agree(engine.is_boundary() != last and f"is wrong about micro-batch {number}: {A} make a step.")
                sent.clear()
                engine.backward(model(micro_batch).square().mean())
                agree(sum(sent) != talks and f"averaged {sum(sent)} elements, not {talks:d}, in micro-batch {number}.")
                engine.step()
                moved = bool((model.weight != before).any())
                agree(moved != last and f"has {'new' if moved else 'old'} weights after micro-batch {number}.")
                if last:
                    hint = f"divide the loss by {A} and the sum over the ranks by {world}, and clear the gradients"
                    compare(before, data[number - A : number], hint)
            before = model.weight.detach().clone()
            for micro_batch in data[-2:, rank]:
                engine.backward(model(micro_batch).square().mean())
                engine.step()
            engine.finish()
            compare(before, data[-2:], f"in finish() 2 micro-batches are in, each divided by {A}")
            agree(engine.micro_steps % A and "is inside a step after finish(): count on to the next boundary.")
            before = model.weight.detach().clone()
            engine.finish()
            agree(bool((model.weight != before).any()) and "updated again in a finish() without micro-batches.")
    except NotImplementedError:
        raise UserError("not yet: a TODO still raises NotImplementedError. Fill it in and run this again.") from None
    print0(f"solved: {STEPS} steps of {A} micro-batches, and one of 2, as with large batches on {world} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(Engine)
