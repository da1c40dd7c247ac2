"""Save and resume: day 17's checkpoints, day 18's choice of the newest good one, on any number of ranks. Days 17, 18.

What is new: where day 18 asks for a conversion by hand, a start on other ranks converts by itself.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch

from common.errors import UserError
from common.ranks import print0
from common.run_log import ROOT, show_path
from day17 import checkpoints as ckpt
from day17.saving import save as save_whole
from day18.loading import load_safely

CONVERT = ROOT / "day18/convert.py"
__all__ = ["choose", "load", "save", "load_safely"]


def choose(root: Path, section: dict[str, Any]) -> Path | None:
    """The checkpoint to load, verified, in a form that this many ranks load; sets `section` accordingly. Collective."""
    found, rejected = ckpt.newest_good(root)
    for sentence in rejected:
        print0(f"not trusted: {sentence}")
    if rejected and found is None:
        raise UserError(f"none of the {len(rejected)} checkpoints in {show_path(root)} is whole: move them away first")
    rank, world = ckpt.rank_and_world()
    with ckpt.all_or_none("clearing up", root):  # nobody looks while rank 0 does
        if rank == 0:
            ckpt.clear_up(root, found)
    if found is None:
        print0(f"resume: no checkpoint in {show_path(root)}, starting at step 0")
        return None
    facts, stage = ckpt.read_manifest(found), section.get("zero_optimization", {}).get("stage", 0)
    if (facts["ranks"], facts["zero_stage"]) != (world, stage) and (facts["zero_stage"], stage) != (0, 0):
        universal = root / f"universal_{found.name}"
        made = f"{facts['ranks']} ranks at stage {facts['zero_stage']}"
        print0(f"resume: {found.name} is of {made}, this run has {world} at stage {stage}: loading {universal.name}")
        if ckpt.problem_with(universal):
            convert(root, found.name)
        section.setdefault("checkpoint", {})["load_universal"] = True
        found = universal
    print0(f"resume: {found.name}, {len(facts['files'])} files verified, continuing after step {facts['step']}")
    return found


def convert(root: Path, name: str) -> None:
    """Day 18's program, in a process of its own: it starts workers, and rank 0 has threads that no fork survives.

    Collective: large weights take longer than a process group waits in one collective, so until the program has ended
    all ranks meet twice a second.
    """
    program, said = None, tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the program
    with ckpt.all_or_none(f"converting {name}", root):
        if ckpt.rank_and_world()[0] == 0:
            program = subprocess.Popen([sys.executable, CONVERT, root], stdout=subprocess.DEVNULL, stderr=said)
    while ckpt.from_all_ranks(program and program.poll())[0] is None:
        time.sleep(0.5)
    with ckpt.all_or_none(f"converting {name}", root):
        if program and program.returncode:
            said.seek(0)
            raise RuntimeError(said.read().strip().splitlines()[-1])


def load(engine: deepspeed.DeepSpeedEngine, found: Path) -> int:
    """Load `found` into the engine and return its step. Collective."""
    path, client_state = engine.load_checkpoint(str(found.parent), tag=found.name)
    if path is None:  # DeepSpeed only warns, and would train on from fresh weights
        raise UserError(f"DeepSpeed loaded nothing from {show_path(found)}")
    mine = found / f"random_rank_{engine.global_rank}.pt"  # what client_state has is rank 0's on every rank
    if mine.exists() and ckpt.read_manifest(found)["ranks"] == engine.dp_world_size:
        ckpt.set_random_state(torch.load(mine, weights_only=True), engine.device)
    return client_state["step"]


def save(engine: deepspeed.DeepSpeedEngine, root: Path, step: int, keep_last: int, held_out: float | None) -> None:
    """Day 17's save, which refuses weights that are not finite; then outdated conversions go. Collective."""
    save_whole(engine, root, step, keep_last, held_out)
    with ckpt.all_or_none("removing conversions", root):
        if engine.global_rank == 0:
            for universal in root.glob("universal_*"):
                ckpt.remove(universal)
            (root / "latest_universal").unlink(missing_ok=True)
