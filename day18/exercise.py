"""Day 18, your turn: cut a checkpoint of N ranks anew for M ranks, as the universal format does.

Fill in the two TODOs, then check yourself (any number of ranks; each checks for itself):

    deepspeed --num_accelerators 2 day18/exercise.py

ZeRO-1 and 2 lay all parameters one after another in a flat vector, pad it, and cut it into equal parts, one a rank.
It says which parameter came back wrong, or "solved". The answers are in solution.py. Source: day18/notes.md.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher

SHAPES = {"embedding": (7, 4), "weight": (4, 6), "bias": (6,), "head": (5, 3)}  # 73 elements, in the model's order


def to_universal(parts: list[torch.Tensor], shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """Return {name: whole parameter} from each rank's part of the padded flat vector."""
    # TODO 1: join the parts, then take each parameter's elements in turn and give them their shape. What is left
    # over at the end is padding.
    # 由各 rank 的那部分（补齐过的展平向量）返回 {名字: 完整参数}。把各部分接起来，再依次取出每个参数的元素，变回它的
    # 形状。最后剩下的是补齐。
    raise NotImplementedError


def to_parts(whole: dict[str, torch.Tensor], num_ranks: int) -> list[torch.Tensor]:
    """Return the parts for `num_ranks` ranks: equal in size, the last one padded with zeros."""
    # TODO 2: flatten and join in the order of the dictionary; pad with zeros until it divides; cut.
    # 返回 num_ranks 个 rank 的各部分：大小相等，最后一个用零补齐。按字典的顺序展平、接起来；用零补到能整除；再切。
    raise NotImplementedError


def check(to_universal, to_parts) -> None:
    """Resize from and to 1 to 5 ranks; UserError says what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    generator = torch.Generator().manual_seed(0)
    model = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    flat = torch.cat([tensor.flatten() for tensor in model.values()])
    for ranks in range(1, 6):
        size = -(-len(flat) // ranks)
        saved = list(torch.cat([flat, torch.zeros(size * ranks - len(flat))]).split(size))
        whole = to_universal(saved, SHAPES)
        if list(whole) != list(SHAPES):
            raise UserError(f"not yet: from {ranks} ranks came parameters {list(whole)}, want {list(SHAPES)}.")
        for name, tensor in model.items():
            if whole[name].shape != tensor.shape or not torch.equal(whole[name], tensor):
                raise UserError(f"not yet: {name} came back wrong from {ranks} ranks: {tuple(whole[name].shape)}.")
        parts = to_parts(model, ranks)
        if [part.numel() for part in parts] != [size] * ranks:
            got = [part.numel() for part in parts]
            raise UserError(f"not yet: parts of {got} elements for {ranks} ranks, want {size} each: pad first.")
        if not all(torch.equal(part, want) for part, want in zip(parts, saved, strict=True)):
            raise UserError(f"not yet: the parts for {ranks} ranks have the right sizes and wrong contents.")
    print0(f"solved: {len(flat)} elements cut for 1 to 5 ranks and put together again")


if __name__ == "__main__":
    with clear_errors():
        check(to_universal, to_parts)
