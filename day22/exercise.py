"""Day 22, your turn: the three small things that decide what fine-tuning learns.

Fill in the three TODOs, then check yourself (any number of ranks; each checks for itself):

    deepspeed --num_accelerators 2 day22/exercise.py

It says what is wrong, or "solved". The answers are in solution.py. Source: day22/notes.md.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher

EOS = 2
# A dialogue, already tokenized turn by turn. The template adds a line break, 9, after the token that ends an answer.
TURNS = [
    ("system", [7, 5]),
    ("user", [11, 12, 13]),
    ("assistant", [21, EOS, 9]),
    ("user", [14]),
    ("assistant", [EOS, 9]),
]
LABELS = [-100] * 5 + [21, EOS, -100] + [-100] + [EOS, -100]


def answer_labels(turns: list[tuple[str, list[int]]], eos: int) -> list[int]:
    """One label a token of the dialogue: the token itself where the assistant speaks, else -100."""
    # TODO 1: what ends an answer is to be learned, what the template adds behind it is not.
    # 对话的每个 token 一个标签：助手说的是 token 本身，其余是 -100。结束回答的 token 要学，模板加在它后面的不学。
    raise NotImplementedError


def divisor(counts: list[list[int]]) -> float:
    """By what each micro-batch divides its sum of token losses, so that the step's loss is the mean over tokens.

    counts[rank][micro_batch]: answer tokens. The engine averages over micro-batches and over ranks by itself.
    """
    # TODO 2: with one rank and one micro-batch it is that micro-batch's count. With more, not each its own count:
    # then a token of a short answer would weigh more than one of a long answer.
    # 每个 micro-batch 用什么去除它的 token 损失之和，才能使这一步的损失是对所有 token 的平均。
    # counts[rank][micro_batch] 是回答的 token 数；engine 自己会在 micro-batch 和 rank 之间求平均。只有一个 rank、一个
    # micro-batch 时，就是它的 token 数；更多时不能各用各的：那样短回答的一个 token 会比长回答的分量重。
    raise NotImplementedError


def decay_groups(shapes: dict[str, tuple[int, ...]], frozen: set[str]) -> tuple[list[str], list[str]]:
    """Names of (those with weight decay, those without): matrices, then vectors. Frozen ones are in neither."""
    # TODO 3
    # 返回（要权重衰减的名字，不要的名字）：先矩阵，后向量。冻结的两边都不放。
    raise NotImplementedError


def check(answer_labels, divisor, decay_groups) -> None:
    """UserError says what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    labels = answer_labels(TURNS, EOS)
    if not isinstance(labels, list):
        raise UserError(f"not yet: answer_labels() returned {labels!r}, want a list: is a `return` missing?")
    if len(labels) != len(LABELS):
        raise UserError(f"not yet: {len(labels)} labels for {len(LABELS)} tokens; a prompt's tokens get -100.")
    for at, (got, want) in enumerate(zip(labels, LABELS, strict=True)):
        if got != want:
            raise UserError(f"not yet: label {at} of the dialogue is {got}, want {want}: {labels}")
    generator = torch.Generator().manual_seed(0)
    for ranks, micro_batches in ((1, 1), (1, 4), (2, 1), (3, 4)):
        counts = torch.randint(1, 30, (ranks, micro_batches), generator=generator).tolist()
        losses = [[torch.rand(n, generator=generator) for n in row] for row in counts]
        share = divisor(counts)
        if not isinstance(share, int | float) or share <= 0:
            raise UserError(f"not yet: divisor({counts}) returned {share!r}, want a number above 0.")
        engine = sum(float(loss.sum() / share) for row in losses for loss in row) / (ranks * micro_batches)
        mean = float(torch.cat([loss for row in losses for loss in row]).mean())
        if abs(engine - mean) > 1e-5:
            raise UserError(
                f"not yet: {ranks} ranks x {micro_batches} micro-batches give the loss {engine:.4f}, the mean over"
                f" all tokens is {mean:.4f} (counts {counts}, you divided by {share:.4g})."
            )
    shapes = {"embed": (40, 8), "norm": (8,), "layer.weight": (8, 8), "layer.bias": (8,)}
    groups = decay_groups(shapes, {"embed"})
    if not isinstance(groups, tuple) or len(groups) != 2:
        raise UserError(f"not yet: decay_groups() returned {groups!r}, want two lists of names.")
    got = tuple(map(set, groups))
    if got != ({"layer.weight"}, {"norm", "layer.bias"}):
        raise UserError(f"not yet: with `embed` frozen the groups are {got[0]} and {got[1]}.")
    print0("solved: loss on answers alone, each of their tokens counts the same, and norms do not decay")


if __name__ == "__main__":
    with clear_errors():
        check(answer_labels, divisor, decay_groups)
