"""Day 17: save a DeepSpeed engine so that a checkpoint is whole or not there.

    from day17.saving import save     # with day17/checkpoints.py; the training scripts of days 17 and 18 call it

Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py, save_checkpoint.
"""

import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from common.ranks import print0
from day17 import checkpoints as ckpt


def save(engine: deepspeed.DeepSpeedEngine, root: Path, step: int, keep_last: int, held_out: float | None) -> None:
    """Write a checkpoint under another name, publish it whole, remove old ones. Collective."""
    start, name = time.perf_counter(), f"step{step:06d}"
    partial = root / f"partial_{name}"
    client_state = {"step": step, "sequences": engine.global_samples}  # the same on all ranks
    with ckpt.all_or_none(f"saving {name}", root):
        partial.mkdir(parents=True, exist_ok=True)
    with ckpt.all_or_none(f"saving {name}", root):
        try:  # weights, optimizer, schedule, loss scale; save_latest would write `latest` in place
            engine.save_checkpoint(str(root), tag=partial.name, client_state=client_state, save_latest=False)
        except (OSError, RuntimeError):
            dist.barrier()  # save_checkpoint ends with one, where the other ranks wait for this one
            raise
    with ckpt.all_or_none(f"saving {name}", root):
        torch.save(ckpt.random_state(engine.device), partial / f"random_rank_{engine.global_rank}.pt")
    written_s = time.perf_counter() - start
    facts = {"step": step, "ranks": engine.dp_world_size, "zero_stage": engine.zero_optimization_stage()}
    facts |= {"global_batch": engine.train_batch_size(), "held_out_loss": held_out, "deepspeed": deepspeed.__version__}
    total = sum(entry["bytes"] for entry in ckpt.publish(partial, name, **facts)["files"].values())
    if engine.global_rank == 0:
        kept = ckpt.prune(root, keep_last)
        seconds = f"{time.perf_counter() - start:.2f} s, {written_s:.2f} of it writing"
        print0(f"saved {name}: {total:,} bytes, stood {seconds} | kept {' '.join(kept)}")
