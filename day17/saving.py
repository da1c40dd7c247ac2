"""Day 17: save a DeepSpeed engine so that a checkpoint is whole or not there.

    from day17.saving import save     # with day17/checkpoints.py; the training scripts of days 17 and 18 call it

Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py, save_checkpoint.
"""

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from common.errors import UserError
from common.ranks import print0
from day17 import checkpoints as ckpt


def save(engine: deepspeed.DeepSpeedEngine, root: Path, step: int, keep_last: int, held_out: float | None) -> None:
    """Write a checkpoint under another name, publish it whole, remove old ones. Collective.

    `held_out`: the loss that was measured now, if it was. Weights that do not train on are not saved: UserError.
    """
    refuse_what_is_not_finite(engine, step, held_out)
    start, name = time.perf_counter(), f"step{step:06d}"
    partial = root / f"partial_{name}"
    client_state = {"step": step, "sequences": engine.global_samples}  # the same on all ranks
    with ckpt.all_or_none(f"saving {name}", root):
        partial.mkdir(parents=True, exist_ok=True)
    with ckpt.all_or_none(f"saving {name}", root):
        try:  # weights, optimizer, schedule, loss scale; save_latest would write `latest` in place
            engine.save_checkpoint(str(root), tag=partial.name, client_state=client_state, save_latest=False)
        except Exception:
            dist.barrier()  # save_checkpoint ends with one, where the other ranks wait for this one
            raise
    with ckpt.all_or_none(f"saving {name}", root):
        torch.save(ckpt.random_state(engine.device), partial / f"random_rank_{engine.global_rank}.pt")
    written_s = time.perf_counter() - start
    facts = {"step": step, "ranks": engine.dp_world_size, "zero_stage": engine.zero_optimization_stage()}
    facts |= {"global_batch": engine.train_batch_size(), "held_out_loss": held_out, "deepspeed": deepspeed.__version__}
    total = sum(entry["bytes"] for entry in ckpt.publish(partial, name, **facts)["files"].values())
    kept = []
    with ckpt.all_or_none(f"removing what {name} replaces", root):
        if engine.global_rank == 0:
            kept = ckpt.prune(root, keep_last)
    if engine.global_rank == 0:
        seconds = f"{time.perf_counter() - start:.2f} s, {written_s:.2f} of it writing"
        print0(f"saved {name}: {total:,} bytes, stood {seconds} | kept {' '.join(kept)}")


def refuse_what_is_not_finite(engine: deepspeed.DeepSpeedEngine, step: int, held_out: float | None) -> None:
    """Raise UserError when the held-out loss, or where nobody measured it a weight, is NaN or infinite. Collective.

    Saved, such weights would push out good ones: they count among the last K.
    """
    if held_out is not None:
        sound, what = math.isfinite(held_out), f"the held-out loss is {held_out}"
    else:  # under ZeRO-3 each rank looks at its own part of each parameter
        parts = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in engine.module.parameters()]
        mine = all(torch.isfinite(part).all().item() for part in parts)
        sound, what = all(ckpt.from_all_ranks(mine)), "there are weights that are NaN or infinite"
    if not sound:
        raise UserError(
            f"{what} at step {step}: not saved, the checkpoints before it are untouched."
            " Go on from one of them with a lower learning rate, or find the data that did it."
        )


class BackgroundWriter(TorchCheckpointEngine):
    """Copy what is to be saved, and write the copies in threads while training goes on.

    engine.checkpoint_engine = BackgroundWriter(engine._config)     # then engine.save_checkpoint(...)
    engine.checkpoint_engine.wait(root)                             # at a later step, before ckpt.publish(...)
    """

    def __init__(self, config_params: object = None) -> None:
        super().__init__(config_params)
        self.pool, self.writes = ThreadPoolExecutor(), []

    def save(self, state_dict: dict, path: str) -> None:
        copies = {}  # tensors that share memory (tied weights) are copied, and saved, once

        def copied(leaf: object) -> object:
            if not torch.is_tensor(leaf):
                return copy.deepcopy(leaf)  # the loss scaler is an object that training changes
            key = (leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype)
            if key not in copies:
                copies[key] = leaf.detach().to("cpu", copy=True)
            return copies[key]

        state = torch.utils._pytree.tree_map(copied, state_dict)
        self.writes.append(self.pool.submit(super().save, state, path))

    def wait(self, root: Path) -> None:
        """Return when all files are written; UserError on all ranks when a write failed on one. Collective."""
        writes, self.writes = self.writes, []
        with ckpt.all_or_none("writing in the background", root):
            for write in writes:
                write.result()  # raises what was raised in the thread, which nobody else would see
