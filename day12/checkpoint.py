"""Day 12: checkpoints from which a run goes on as if nothing had happened: what is saved, loaded, and checked first.

    from day12.checkpoint import batches_from, resume, save

DeepSpeed saves weights, optimizer, schedule. Added here: each rank's random state, and the place in the data.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py (save_checkpoint, load_checkpoint).
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader

from common.errors import UserError
from common.ranks import print0
from common.run_log import show_path


def batches_from(loader: DataLoader, position: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches for ever, as common/data.py's `endless_batches`, but from micro-batch number `position` on."""
    if not len(loader):
        raise UserError(f"{len(loader.sampler)} blocks a rank do not fill one micro-batch of {loader.batch_size}")
    epoch, skip = divmod(position, len(loader))
    while True:
        loader.sampler.set_epoch(epoch)
        yield from islice(loader, skip, None)
        epoch, skip = epoch + 1, 0


def batch_of(engine: deepspeed.DeepSpeedEngine) -> str:
    """How the global batch comes about, for the proof line and for the settings."""
    accumulation = engine.gradient_accumulation_steps()
    return (
        f"{engine.train_micro_batch_size_per_gpu()} micro x {accumulation} accumulation x {engine.dp_world_size} ranks"
    )


def settings_of(engine: deepspeed.DeepSpeedEngine, args: argparse.Namespace) -> dict:
    """What a run must have in common with the one that it continues; its length is for the user to know."""
    return {"model": args.model, "corpus": args.corpus, "seed": args.seed, "batch": batch_of(engine)}


def save(engine: deepspeed.DeepSpeedEngine, args: argparse.Namespace, step: int) -> None:
    """Save weights, optimizer, schedule, and each rank's random state: client_state is rank 0's alone. Collective."""
    states = [None] * engine.dp_world_size
    torch.distributed.all_gather_object(states, (torch.get_rng_state(), get_accelerator().get_rng_state()))
    folder, client_state = f"{args.run_dir}/checkpoints", {"step": step, "random": states}
    engine.save_checkpoint(folder, tag=f"step{step}", client_state=client_state)
    if engine.global_rank == 0:
        Path(args.run_dir, "settings.json").write_text(json.dumps(settings_of(engine, args)))
    print0(f"step {step:4d} | checkpoint {show_path(args.run_dir)}/checkpoints/step{step}")


def load(engine: deepspeed.DeepSpeedEngine, run_dir: str) -> int:
    """Load what `save` saved and return its step. Collective."""
    path, client_state = engine.load_checkpoint(f"{run_dir}/checkpoints")
    if path is None:  # DeepSpeed only warns
        raise UserError(f"--resume {run_dir}: no checkpoint in {run_dir}/checkpoints")
    cpu_state, device_state = client_state["random"][engine.global_rank]
    torch.set_rng_state(cpu_state)
    get_accelerator().set_rng_state(device_state)
    return client_state["step"]


def resume(engine: deepspeed.DeepSpeedEngine, args: argparse.Namespace) -> int:
    """Continue the run in the folder `args.resume`; return the steps that it has done, 0 without one. Collective."""
    if not args.resume:
        return 0
    check_resume(args, settings_of(engine, args))
    done = load(engine, args.resume)
    print0(f"resumed {show_path(args.resume)} after step {done}")
    if done >= args.steps:
        raise UserError(f"--resume {args.resume}: that run has {done} steps; --steps must be more")
    return done


def check_resume(args: argparse.Namespace, settings: dict) -> None:
    """Stop when the run to continue was made with other settings, or would lose its log."""
    old_run = Path(args.resume)
    if not (old_run / "settings.json").exists():
        raise UserError(f"--resume {args.resume}: no settings.json there; name a run folder with checkpoints")
    if old_run.resolve() == Path(args.run_dir).resolve():
        raise UserError(f"--resume and --run_dir are both {args.resume}: its log would be overwritten; name another")
    for name, value in json.loads((old_run / "settings.json").read_text()).items():
        if settings[name] != value:
            raise UserError(f"--resume {args.resume}: that run had {name} {value}, this one has {settings[name]}")
