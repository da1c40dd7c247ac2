"""Day 01, your turn: the arithmetic of collectives, and an all-reduce made of two halves.

Fill in the three TODOs, then check yourself, on two ranks (four work as well):

    deepspeed --num_accelerators 2 day01/exercise.py

It says what is still missing, or "solved". The answers are in solution.py. Source: day01/notes.md.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.cpu import start_without_compiler
from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher


def all_reduce_bytes(num_bytes: int, num_ranks: int) -> float:
    """Bytes that one rank sends when `num_ranks` ranks all-reduce a tensor of `num_bytes` bytes in a ring."""
    # TODO 1: an all-reduce is a reduce-scatter and an all-gather; each sends (N-1)/N of the tensor.
    raise NotImplementedError


def blocks_of_rank(num_blocks: int, rank: int, num_ranks: int) -> list[int]:
    """Which of the blocks 0 … num_blocks-1 `rank` trains on, unshuffled, as DistributedSampler deals them out."""
    # TODO 2: rank 0 takes 0, N, 2N, …; rank 1 takes 1, N+1, …
    raise NotImplementedError


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` (its length a multiple of the ranks) over all ranks without calling dist.all_reduce."""
    # TODO 3: dist.reduce_scatter gives each rank its part of the sum, dist.all_gather collects the parts.
    raise NotImplementedError


def check(all_reduce_bytes: Callable, blocks_of_rank: Callable, all_reduce: Callable) -> None:
    """Try the three answers; UserError says which one is not right yet, and why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(get_accelerator().current_device_name())

    def expect(todo: int, got: object, want: object, hint: str) -> None:
        if got != want:
            raise UserError(f"TODO {todo} is not right yet: got {got}, want {want}. {hint}")

    try:
        expect(1, all_reduce_bytes(1000, 4), 1500, "Both halves send (N-1)/N of the tensor.")
        expect(1, all_reduce_bytes(1000, 1), 0, "One rank has nobody to send to.")
        expect(2, list(blocks_of_rank(8, 1, 2)), [1, 3, 5, 7], "Count up in steps of the number of ranks.")
        mine = torch.arange(2 * world, dtype=torch.float32, device=device) + rank
        want = mine.clone()
        dist.all_reduce(want)
        expect(3, all_reduce(mine.clone()).tolist(), want.tolist(), "Look at hello_distributed.py's last two steps.")
    except NotImplementedError:
        raise UserError("not yet: a TODO still raises NotImplementedError. Fill it in and run this again.") from None
    print0("solved: all three answers are right")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(all_reduce_bytes, blocks_of_rank, all_reduce)
