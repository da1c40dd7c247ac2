"""Day 01: ranks and collectives - what each rank is called, and what the four basic operations do to its tensors.

From the repository root, on two CPU processes or two GPUs (any number works):

    deepspeed --num_accelerators 2 day01/labs/hello_distributed.py
    deepspeed --num_accelerators 4 day01/labs/hello_distributed.py --numel 8

Expect one table line a rank, before and after each operation, and the bytes that a rank sends in a ring.
Checked with deepspeed 0.19.8. Source: https://docs.pytorch.org/docs/stable/distributed.html; ring costs:
Thakur et al. 2005, "Optimization of collective communication operations in MPICH".
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import print0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=4, help="elements of the tensors; a multiple of the ranks")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args()


def show(title: str, tensor: torch.Tensor) -> None:
    """Print every rank's `tensor`, in rank order. Collective."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, tensor.tolist())
    print0(title)
    for rank, values in enumerate(everyone):
        print0(f"    rank {rank}: {[int(value) for value in values]}")


def main() -> None:
    args = parse_args()
    device = join_world()  # set_device, without which every rank would use GPU 0; then deepspeed.init_distributed
    rank, world = dist.get_rank(), dist.get_world_size()
    if args.numel < 1 or args.numel % world:
        raise UserError(f"--numel {args.numel} cannot be cut into {world} equal parts; try --numel {2 * world}")

    names = [None] * world
    dist.all_gather_object(
        names, f"rank {rank} of {world} | local rank {os.environ['LOCAL_RANK']} | {device} | {dist.get_backend()}"
    )
    print0("\n".join(names))

    mine = torch.arange(args.numel, dtype=torch.float32, device=device) + 10 * (rank + 1)
    size = mine.numel() * mine.element_size()  # S, bytes of one rank's tensor
    share = (world - 1) / world
    show("\nevery rank starts with", mine)

    tensor = mine.clone()
    dist.broadcast(tensor, src=0)
    show(f"\nbroadcast: all get rank 0's tensor (data parallel: the first weights) | S = {size} bytes", tensor)

    tensor = mine.clone()
    dist.all_reduce(tensor)
    show(f"\nall-reduce: all get the sum (data parallel: gradients) | 2S(N-1)/N = {2 * size * share:.0f} bytes", tensor)

    part = torch.empty(args.numel // world, device=device)
    dist.reduce_scatter(part, list(mine.chunk(world)))
    show(
        f"\nreduce-scatter: each gets its part of the sum (ZeRO-3: gradients) | S(N-1)/N = {size * share:.0f} bytes",
        part,
    )

    parts = [torch.empty_like(part) for _ in range(world)]
    dist.all_gather(parts, part)
    show(f"\nall-gather: each gets all parts (ZeRO: weights) | S(N-1)/N = {size * share:.0f} bytes", torch.cat(parts))
    print0("\nreduce-scatter + all-gather = all-reduce, in result and in bytes: the identity that ZeRO lives on")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
