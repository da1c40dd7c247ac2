"""Day 22, your turn: the four small things that decide what fine-tuning learns.

Fill in the four TODOs, then check yourself (any number of ranks; each checks for itself):

    deepspeed --num_accelerators 2 day22/exercise.py

It says what is wrong, or "solved". The answers are in solution.py. Source: day22/notes.md, and packing.md for TODO 4.
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
# Three samples of token ids and labels; only of the second is the first token an answer's.
SAMPLES = [([31, 32, 33], [-100, 32, 33]), ([41], [41]), ([51, 52], [-100, 52])]
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


def pack_row(samples: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int], list[list[bool]]]:
    """Samples of (token ids, labels) as one row of T tokens: its position ids, its labels, and its mask of T x T.

    mask[i][j]: whether token i may look at token j. None of the samples may notice that the others are there.
    """
    # TODO 4: positions start anew with each sample, attention looks back and stops at the border. And a label says what
    # the token *before* it has to guess: which one of each sample must not be guessed?
    # 把多个样本（token id, 标签）放进一行，返回 position id、标签和 T x T 的掩码；mask[i][j] 表示第 i 个 token 能否看到
    # 第 j 个。位置从每个样本重新开始，注意力只往回看，到样本边界为止。标签要由*前一个* token 猜出来：每个样本的哪一个
    # 不该猜？
    raise NotImplementedError


def check_packed(pack_row) -> None:
    packed = pack_row(SAMPLES)
    if not isinstance(packed, tuple) or len(packed) != 3:
        raise UserError(f"not yet: pack_row() returned {packed!r}, want position ids, labels and a mask.")
    positions, labels, mask = packed
    where = [(sample, at) for sample, (ids, _) in enumerate(SAMPLES) for at in range(len(ids))]
    if list(positions) != [at for _, at in where]:
        raise UserError(f"not yet: position ids {positions} for samples of 3, 1 and 2 tokens: each starts at 0.")
    for i, (sample, at) in enumerate(where):
        want = SAMPLES[sample][1][at] if at else -100
        if len(labels) != len(where) or labels[i] != want:
            raise UserError(
                f"not yet: labels {labels}: label {i} has to be {want}; a sample's first token follows another sample."
            )
        for j, (other, _) in enumerate(where):
            if bool(mask[i][j]) != (sample == other and j <= i):
                does = "looks at" if mask[i][j] else "does not see"
                raise UserError(f"not yet: token {i} of sample {sample} {does} token {j}, of sample {other}.")


def check(answer_labels, divisor, decay_groups, pack_row) -> None:
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
    check_packed(pack_row)
    print0(
        "solved: loss on answers alone, each of their tokens counts the same, norms do not decay, samples keep apart"
    )


if __name__ == "__main__":
    with clear_errors():
        check(answer_labels, divisor, decay_groups, pack_row)
