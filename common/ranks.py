"""Three helpers every distributed script needs: print once, average over ranks, insist on a launcher."""

import os
import sys

import torch
import torch.distributed as dist

from common.errors import UserError


def print0(message: str) -> None:
    """Print `message` on global rank 0 only. (Local rank 0 would print once per node.)

    One write, newline included: the launcher runs `python -u`, where `print` makes several writes
    and lines from different ranks can mix.
    """
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        sys.stdout.write(message + "\n")


def over_ranks(value: float, device: torch.device, op: str = "mean") -> float:
    """Return the "mean", "sum" or "max" of `value` over all ranks. Collective: every rank calls it, or the job hangs.

    Without a process group (plain PyTorch, one process) it returns `value` itself.
    """
    if not dist.is_initialized():
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float32, device=device)  # some accelerators have no float64
    dist.all_reduce(total, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return total.item() / (dist.get_world_size() if op == "mean" else 1)


def require_launcher() -> None:
    """Stop with one sentence when the script was started with plain `python`; torchrun and srun set RANK as well."""
    if "RANK" not in os.environ:
        script = os.path.relpath(sys.argv[0])
        raise UserError(
            f"{script} was started without a launcher, so it does not know its rank."
            f" Start it with: deepspeed --num_accelerators 2 {script}"
        )
