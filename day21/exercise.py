"""Day 21, your turn: the fewest blocks to recompute under a budget of memory, and the code that does it.

Fill in the three TODOs, then check yourself, in one process:

    python day21/exercise.py

It asks for the memory of several plans and measures them, gives you budgets with a target for memory and for time, runs
what you chose, and says what is wrong, or "solved".
The answers are in solution.py. Source: day21/notes.md.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint  # noqa: F401 - for TODO 3

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from common.ranks import print0
from day21.peak import step_peak

BLOCKS, HIDDEN, TOKENS = 12, 64, 1024
BUDGETS = [1.0, 0.75, 0.5, 0.34]  # of what a step takes without recomputation


def peak_bytes(blocks: int, only: int, every: int, input_bytes: int, kept_bytes: int, meanwhile_bytes: int) -> float:
    """The worst moment of a step that recomputes the first `only` of `blocks` blocks, `every` of them a checkpoint.

    A checkpoint keeps its input, `input_bytes`; a block that is kept whole, or recomputed at the moment, `kept_bytes`;
    the backward pass of one block needs `meanwhile_bytes` on top. `every` divides `only`; `only` may be 0.
    """
    # TODO 1: the backward pass begins with the blocks that were kept, and goes on with the checkpoints, last one first.
    # What lies in memory at each of the two moments? (When a checkpoint is recomputed, the blocks behind it are gone.)
    # 一步中最吃内存的时刻：blocks 层里重计算前 only 层，每 every 层一个检查点。一个检查点保留它的输入 input_bytes；完
    # 整保留的层，或正在重计算的层，保留 kept_bytes；一层的反向另外需要 meanwhile_bytes。every 整除 only；only 可以是
    # 0。反向先走保留的层，再走各检查点，最后一个最先。两个时刻内存里各有什么？（重计算一个检查点时，它后面的层已经释
    # 放。）
    raise NotImplementedError


def choose(blocks: int, budget: float, peak: Callable[[int, int], float]) -> tuple[int, int] | None:
    """The pair (only, every) that recomputes the fewest blocks with `peak(only, every)` <= budget; of several such the
    one with the lowest peak; None when none fits. `every` is 1 when nothing is recomputed.
    """
    # TODO 2: time first: try `only` from 0 on. For each, which `every` divide it, and which of them takes the least?
    # 返回 (only, every)：在 peak(only, every) <= budget 之下重计算的层最少；有多个时取峰值最低的；都放不下返回 None。
    # 不重计算时 every 为 1。时间优先：only 从 0 开始试；对每个 only，哪些 every 能整除它，其中哪个占得最少？
    raise NotImplementedError


def run(stack: list[torch.nn.Module], x: torch.Tensor, only: int, every: int) -> torch.Tensor:
    """The output of all blocks of `stack`, one after the other, with the memory that `peak_bytes` promises."""
    # TODO 3: torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False). Mind that a function which is defined
    # in a loop sees the loop's variables when it is called, and it is called again in the backward pass.
    # 依次经过 stack 的各层并返回输出，占用的内存如 peak_bytes 所说。用 torch.utils.checkpoint.checkpoint(function, x,
    # use_reentrant=False)。注意：循环里定义的函数在被调用时才去看循环变量，而反向时会再调用一次。
    raise NotImplementedError


class Block(torch.nn.Module):
    """x + down(gelu(up(norm(x)))), (tokens, hidden) -> the same. It counts how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.up, self.down = torch.nn.Linear(HIDDEN, 4 * HIDDEN), torch.nn.Linear(4 * HIDDEN, HIDDEN)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Bench:
    """A stack of blocks; its memory, gradients and time with a plan."""

    def __init__(self, run_stack: Callable) -> None:
        torch.manual_seed(0)
        self.stack, self.run = [Block() for _ in range(BLOCKS)], run_stack
        self.x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
        self.parameters = [parameter for block in self.stack for parameter in block.parameters()]
        width = TOKENS * HIDDEN * self.x.element_size()
        # kept: input, norm, and two tensors of the MLP, 4 wide; meanwhile: the gradients of an MLP tensor and of two h
        self.sizes = {"input_bytes": width, "kept_bytes": (1 + 1 + 4 + 4) * width, "meanwhile_bytes": (4 + 2) * width}

    def step(self, only: int, every: int) -> None:
        for tensor in [self.x, *self.parameters]:
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.zero_()
        self.run(self.stack, self.x, only, every).sum().backward()

    def measure(self, only: int, every: int) -> dict:
        """Gradients, blocks that ran, seconds and peak of one step."""
        self.step(only, every)
        gradients = [tensor.grad.clone() for tensor in [self.x, *self.parameters]]
        before, start = sum(block.runs for block in self.stack), time.perf_counter()
        self.step(only, every)
        seconds, runs = time.perf_counter() - start, sum(block.runs for block in self.stack) - before
        peak = step_peak(lambda: self.step(only, every), self.x.device)
        return {"gradients": gradients, "runs": runs, "seconds": seconds, "peak": peak}


def target(budget: float, peak: Callable[[int, int], float]) -> tuple[int, float] | None:
    """Fewest blocks, and the lowest peak with so few; None when nothing fits. (By trying all.)"""
    plans = [(0, 1), *((only, k) for only in range(1, BLOCKS + 1) for k in range(1, only + 1) if only % k == 0)]
    fitting = [(only, peak(only, every)) for only, every in plans if peak(only, every) <= budget]
    return min(fitting, default=None)


def check_peak(bench: Bench, predict: Callable[[int, int], float]) -> None:
    """The formula beside the measurement: 25 % apart at most."""
    plain = bench.measure(0, 1)
    for only, every in [(0, 1), (BLOCKS, 1), (BLOCKS, BLOCKS), (BLOCKS, 3), (BLOCKS // 2, 2)]:
        found, said = bench.measure(only, every), predict(only, every)
        what = f"recompute {only} of {BLOCKS} blocks, {every} a checkpoint"
        if any(not torch.equal(a, b) for a, b in zip(found["gradients"], plain["gradients"], strict=True)):
            raise UserError(f"not yet: run() has other gradients: {what}. A closure in a loop?")
        if found["runs"] != BLOCKS + only:
            raise UserError(f"not yet: run() ran {found['runs']} blocks instead of {BLOCKS + only}: {what}.")
        if abs(said / found["peak"] - 1) > 0.25:
            numbers = f"says {said / 1e6:.2f} MB where {found['peak'] / 1e6:.2f} MB are measured"
            raise UserError(f"not yet: peak_bytes() {numbers}: {what}.")


def check(answers: SimpleNamespace) -> None:
    """Formula, choice and run; UserError says what is wrong."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    bench = Bench(answers.run)

    def predict(only: int, every: int) -> float:
        return answers.peak_bytes(BLOCKS, only, every, **bench.sizes)

    predict(0, 1), answers.choose(BLOCKS, 1e12, predict)  # open TODOs come in order
    check_peak(bench, predict)
    plain = bench.measure(0, 1)
    for share in [*BUDGETS, 0.01]:
        budget = share * predict(0, 1)
        best, chosen = target(budget, predict), answers.choose(BLOCKS, budget, predict)
        of = f"choose() with a budget of {budget / 1e6:.2f} MB"
        if best is None or chosen is None:
            if best != chosen:
                raise UserError(f"not yet: {of} finds {chosen}, {'nothing fits' if best is None else 'some do'}.")
            continue
        only, every = chosen
        if only != best[0]:
            raise UserError(f"not yet: {of} recomputes {only} blocks; the target is {best[0]}.")
        if predict(only, every) > best[1]:
            raise UserError(f"not yet: {of} takes {every} blocks a checkpoint; others take less memory.")
        found = bench.measure(only, every)
        if found["peak"] > 1.1 * budget:
            raise UserError(f"not yet: {of}: run() took {found['peak'] / 1e6:.2f} MB.")
        slower = f"{found['runs']} block runs, {found['seconds'] / plain['seconds']:.2f} x the time"
        print0(f"budget {budget / 1e6:6.2f} MB: recompute {only:2d}, {every} a checkpoint: "
               f"{found['peak'] / 1e6:6.2f} MB, {slower}")  # fmt: skip
    print0(f"solved: {len(BUDGETS)} budgets kept with the fewest blocks computed twice")


if __name__ == "__main__":
    with clear_errors():
        check(SimpleNamespace(peak_bytes=peak_bytes, choose=choose, run=run))
