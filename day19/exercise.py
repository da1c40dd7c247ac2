"""Day 19, your turn: three hot spots are planted in a training step. Name them from its trace, and remove them.

Fill in the two TODOs, then check yourself, on two ranks (any number works):

    deepspeed --num_accelerators 2 day19/exercise.py
    python day19/labs/read_trace.py runs/day19/exercise/trace_rank0.json.gz

The first command writes the trace that the second one reads, each time. It says what is wrong, or "solved": the same
losses, in at most half of the time. The answers are in solution.py. Source: day19/notes.md.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import record_function

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # common/ is one level up

from bench.judge import start_judging
from bench.timing import losses_apart, ratio, take_turns
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import print0
from day19.traces import record_steps

VOCABULARY, HIDDEN, HEADS, LENGTH, SEQUENCES = 2048, 128, 4, 64, 8
TARGET = 2.0  # times as fast
PARTS = ("embed", "mask", "attend", "feed_forward", "loss", "average", "update")  # each a label in the trace


class Step:
    """One training step of a small model, in seven parts; the backward pass is an eighth label."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        shapes = {"tokens": (VOCABULARY, HIDDEN), "qkv": (3 * HIDDEN, HIDDEN), "out": (HIDDEN, HIDDEN)}
        shapes |= {"wide": (4 * HIDDEN, HIDDEN), "narrow": (HIDDEN, 4 * HIDDEN)}
        self.weights = {name: (0.05 * torch.randn(shape)).to(device).requires_grad_() for name, shape in shapes.items()}
        self.device = device

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) -> (B, T, H)."""
        return F.embedding(ids, self.weights["tokens"])

    def mask(self, length: int) -> torch.Tensor:
        """(T, T), True where a token may look: at itself and at what comes before it."""
        allowed = torch.zeros(length, length, dtype=torch.bool, device=self.device)
        for row in range(length):
            for column in range(row + 1):
                allowed[row, column] = True
        return allowed

    def attend(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> same."""
        q, k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in F.linear(x, self.weights["qkv"]).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + F.linear(attended.transpose(1, 2).flatten(2), self.weights["out"])

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> same, four times with the same weights."""
        for _ in range(4):
            x = x + F.linear(F.gelu(F.linear(x, self.weights["wide"])), self.weights["narrow"])
        return x

    def loss(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(B, T, H) and ids (B, T) -> the mean next-token loss in nats."""
        logits = F.linear(x[:, :-1], self.weights["tokens"]).flatten(0, 1).double() / math.sqrt(HIDDEN)
        wanted = F.one_hot(ids[:, 1:].flatten(), VOCABULARY).double()
        return -(wanted * (logits.exp() / logits.exp().sum(-1, keepdim=True)).log()).sum() / len(logits)

    def average(self) -> None:
        """Average the gradients over the ranks."""
        for weight in self.weights.values():
            for part in weight.grad.flatten().split(1024):
                dist.all_reduce(part)
                part /= dist.get_world_size()

    def update(self) -> None:
        """One step of gradient descent."""
        with torch.no_grad():
            for weight in self.weights.values():
                weight -= 0.5 * weight.grad
                weight.grad = None

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        def part(name: str, *inputs: object) -> torch.Tensor:
            with record_function(name):
                return getattr(self, name)(*inputs)

        x = part("embed", ids)
        x = part("feed_forward", part("attend", x, part("mask", ids.shape[1])))
        loss = part("loss", x, ids)
        with record_function("backward"):
            loss.backward()
        part("average")
        part("update")
        return loss.detach()


def hot_spots() -> set[str]:
    """The three of PARTS in which time is wasted."""
    # TODO 1: read the trace. What takes long and computes much is no hot spot; "backward" follows from other parts.
    # 返回 PARTS 中浪费时间的那三个。去读 trace。耗时长而计算也多的不是热点；"backward" 由其他部分决定。
    raise NotImplementedError


def cures() -> dict[str, Callable]:
    """{part: a function with the arguments of Step's, self first, that returns the same in less time}."""
    # TODO 2: one for each hot spot.
    # 返回 {部分: 函数}，函数的参数与 Step 中的相同（self 在最前），结果相同但更快。每个热点一个。
    raise NotImplementedError


def wrong_names(named: set[str], planted: set[str]) -> str | None:
    """What is wrong with the three names."""
    if unknown := sorted(named - set(PARTS)):
        return f"names {unknown[0]!r}, which is no part: {', '.join(PARTS)}."
    if innocent := sorted(named - planted):
        return f"names {innocent[0]!r}: it takes no longer than its work needs. Compare its ms with the others' labels."
    return f"names {len(named)} of 3 hot spots." if len(named) < 3 else None


def check(hot_spots: Callable[[], set[str]], cures: Callable[[], dict[str, Callable]]) -> None:
    """Write the trace, then compare names, losses and time; UserError says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    device = join_world()
    agree = start_judging()  # UserError on every rank when one has a problem; it ends a check that hangs
    torch.manual_seed(1 + dist.get_rank())
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH)).to(device)
    trace = ROOT / f"runs/day19/exercise/trace_rank{dist.get_rank()}.json.gz"
    seen = Step(device)
    record_steps(lambda: seen(ids), trace, steps=2)
    agree(wrong_names(set(hot_spots()), {"mask", "loss", "average"}))
    slow, fast = Step(device), Step(device)
    for name, cure in cures().items():
        setattr(fast, name, MethodType(cure, fast))
    runs = take_turns({"slow": lambda: slow(ids), "fast": lambda: fast(ids)}, turns=7)
    losses = {case: [loss.item() for _, loss in run] for case, run in runs.items()}
    apart = losses_apart(losses["slow"], losses["fast"])
    agree(not apart < 1e-3 and f"has losses {apart:.2g} away from the slow step's: a cure changes what is computed.")
    faster = ratio(runs["slow"], runs["fast"])
    agree(faster < TARGET and f"is {faster:.2f} times as fast, the target is {TARGET:g}: which label is long still?")
    print0(f"solved: {faster:.1f} times as fast, losses at most {apart:.0e} apart")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(hot_spots, cures)
