"""Day 01, your turn: the arithmetic of collectives, and an all-reduce made of two halves.

Fill in the three TODOs, then check yourself, on two ranks (four work as well):

    deepspeed --num_accelerators 2 day01/exercise.py

It says what is still missing, or "solved". The answers are in solution.py. Source: day01/notes.md.
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
from common.errors import clear_errors
from common.ranks import print0


def all_reduce_bytes(num_bytes: int, num_ranks: int) -> float:
    """Bytes that one rank sends when `num_ranks` ranks all-reduce a tensor of `num_bytes` bytes in a ring."""
    # TODO 1: an all-reduce is a reduce-scatter and an all-gather; each sends (N-1)/N of the tensor.
    # 环形 all-reduce 一个 num_bytes 字节的张量时，一个 rank 发送多少字节？all-reduce 由 reduce-scatter 和 all-gather
    # 组成，两半各发送张量的 (N-1)/N。
    raise NotImplementedError


def blocks_of_rank(num_blocks: int, rank: int, num_ranks: int) -> list[int]:
    """Which of the blocks 0 … num_blocks-1 `rank` trains on, unshuffled, as DistributedSampler deals them out."""
    # TODO 2: rank 0 takes 0, N, 2N, …; rank 1 takes 1, N+1, …
    # 按 DistributedSampler 的分法（不打乱），rank 用哪些序列块训练：rank 0 取 0、N、2N……，rank 1 取 1、N+1……
    raise NotImplementedError


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` (its length a multiple of the ranks) over all ranks without calling dist.all_reduce."""
    # TODO 3: dist.reduce_scatter gives each rank its part of the sum, dist.all_gather collects the parts.
    # 不调用 dist.all_reduce，在所有 rank 上对 tensor 求和（长度是 rank 数的倍数）：dist.reduce_scatter 让每个 rank 得
    # 到和的一部分，dist.all_gather 再收集各部分。
    raise NotImplementedError


def check(all_reduce_bytes: Callable, blocks_of_rank: Callable, all_reduce: Callable) -> None:
    """Try the three answers; UserError says which one is not right yet, and why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    device = join_world()
    rank, world = dist.get_rank(), dist.get_world_size()

    agree = start_judging()

    def expect(todo: int, got: object, want: object, hint: str) -> None:
        agree(got != want and f"has TODO {todo} wrong: got {got}, want {want}. {hint}")

    expect(1, all_reduce_bytes(1000, 4), 1500, "Both halves send (N-1)/N of the tensor.")
    expect(1, all_reduce_bytes(1000, 1), 0, "One rank has nobody to send to.")
    blocks = blocks_of_rank(8, 1, 2)
    expect(2, blocks and list(blocks), [1, 3, 5, 7], "Count up in steps of the number of ranks.")
    mine = torch.arange(2 * world, dtype=torch.float32, device=device) + rank
    want = mine.clone()
    dist.all_reduce(want)
    got = all_reduce(mine.clone())
    shown = got.tolist() if torch.is_tensor(got) else got
    expect(3, shown, want.tolist(), "Return the tensor: hello_distributed.py's last two steps, the parts joined.")
    print0("solved: all three answers are right")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(all_reduce_bytes, blocks_of_rank, all_reduce)
