"""Day 20: bandwidth - what a collective moves a second, in the definitions of nccl-tests, so that figures compare.

    from day20.bandwidth import COLLECTIVES, bus_share, make_collective

    call = make_collective("all_gather", size, device)     # size: S, the bytes of the whole result
    busbw = bus_share("all_gather", ranks) * size / seconds

algbw = S / seconds; busbw = algbw x the share of S that has to pass a rank's link whatever the algorithm: comparable
with the link's own speed and between collectives and numbers of ranks.
Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

# S: all-reduce the tensor, all-gather the whole result, reduce-scatter the whole input, all-to-all what a rank sends.
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")

# NCCL's environment with which ranks of one machine talk through TCP, and leave NVLink and shared memory alone.
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_IB_DISABLE": "1"}


def bus_share(collective: str, ranks: int) -> float:
    """Bytes that pass each rank's link in one direction, per byte of S: busbw / algbw."""
    if collective not in COLLECTIVES:
        raise ValueError(f"no definition for {collective!r}: there are {', '.join(COLLECTIVES)}")
    return (2 if collective == "all_reduce" else 1) * (ranks - 1) / ranks


def make_collective(
    collective: str, size: int, device: torch.device, group: dist.ProcessGroup | None = None
) -> Callable[[], object]:
    """Return a function that runs `collective` on S = `size` bytes of fp32 once. Collective: so is each call."""
    ranks, numel = dist.get_world_size(group), size // 4
    whole = torch.ones(numel // ranks * ranks, device=device)
    part, other = torch.ones(numel // ranks, device=device), torch.empty_like(whole)
    calls = {
        "all_reduce": lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group),  # sums would grow to inf
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
    }
    return calls[collective]
