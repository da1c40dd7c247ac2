"""Day 17: checkpoints that are whole or not there - publish, verify, choose, keep. Plain Python and torch.

    python day17/checkpoints.py runs/my_run/checkpoints

Expect a line for each checkpoint: its name, what it holds, and "good" or what is wrong with it.
day17/saving.py saves through this module, day18/train.py resumes through it; copy it, it needs no DeepSpeed.
Checked with deepspeed 0.19.8. Source: the rename and fsync pages of the Linux manual (man 2 rename, man 2 fsync).
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Sampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.errors import UserError, clear_errors

NAME = re.compile(r"step\d{6,}")  # a published checkpoint; anything else is on its way in or out
MANIFEST, FINISHED = "manifest.json", "finished.json"
_host_groups = {}  # {the world: its group for host_group()}


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def host_group() -> dist.ProcessGroup:
    """All ranks, talking through gloo: between hosts, whatever the backend of training. Collective the first time.

    Through NCCL an answer lies on the GPU, where the host has to wait for the whole step to read it, and before
    `set_device` there is no GPU to answer on.
    """
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    if dist.group.WORLD not in _host_groups:
        _host_groups.clear()  # that of a world that was destroyed
        _host_groups[dist.group.WORLD] = dist.new_group(backend="gloo")
    return _host_groups[dist.group.WORLD]


def from_all_ranks(value: object) -> list:
    """Return every rank's `value`, in the order of ranks. Collective."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=host_group())
    return values


@contextmanager
def all_or_none(doing: str, folder: Path) -> Iterator[None]:
    """Run the block; when it fails on one rank, all ranks stop with that rank's reason. Collective."""
    problem = cause = None
    try:
        yield
    except Exception as error:  # of any kind: a rank that left here would keep the others waiting for ever
        cause, reason = error, " ".join(str(error).split())[:160]
        problem = f"{type(error).__name__}: {reason}{free_bytes(folder)}; the checkpoints before it are untouched"
    for rank, found in enumerate(from_all_ranks(problem)):
        if found:
            raise UserError(f"{doing} failed on rank {rank}: {found}") from cause


def free_bytes(folder: Path) -> str:
    """What is free on the disk of `folder`, which need not be there (yet): a full disk is what torch does not name."""
    for path in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return f" ({shutil.disk_usage(path).free:,} bytes free in {folder})"
    return ""


# --- publish: a folder gets its name when all that is in it has reached the disk ---


def flush(path: Path) -> None:
    """Wait until `path` (a file, or the names in a folder) has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(f"partial_{path.name}")
    partial.write_text(text)
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def with_own_sum(manifest: dict) -> str:
    """The manifest as text, with the SHA-256 of everything else in it as its last entry."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "manifest_sha256": digest}, indent=1)


def publish(partial: Path, name: str, **facts: object) -> dict:
    """Flush and checksum the files in `partial`, rename it to `name`, point `latest` to it; return the manifest.

    Collective; the ranks share the files out. A kill before the rename leaves a folder that nobody looks at; a kill
    after it, a whole checkpoint.
    """
    rank, world = rank_and_world()
    root, final, mine = partial.parent, partial.parent / name, {}
    with all_or_none(f"publishing {name}", root):
        files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        for file in files[rank::world]:
            flush(partial / file)
            mine[file] = {"bytes": (partial / file).stat().st_size, "sha256": sha256(partial / file)}
    summed = {file: entry for part in from_all_ranks(mine) for file, entry in part.items()}
    manifest = {"version": 1, **facts, "files": dict(sorted(summed.items()))}
    with all_or_none(f"publishing {name}", root):
        if rank == 0:
            write_whole(partial / MANIFEST, with_own_sum(manifest))
            for folder in {path.parent for path in partial.rglob("*")}:
                flush(folder)
            if final.exists():  # the same step again, after an earlier one turned out damaged
                remove(final)
            partial.rename(final)
            flush(root)
            if NAME.fullmatch(name):  # for DeepSpeed's own tools; resuming looks at the folders instead
                write_whole(root / "latest", name)
    return manifest


# --- verify before trust, and choose ---


def read_manifest(folder: Path) -> dict:
    """Return the manifest; UserError says what is wrong with it."""
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        del manifest["manifest_sha256"]
    except FileNotFoundError:
        raise UserError(f"no {MANIFEST}: not written by publish()") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{MANIFEST} is damaged") from None
    if text != with_own_sum(manifest):
        raise UserError(f"{MANIFEST} is damaged")
    if manifest["version"] != 1:
        raise UserError(f"{MANIFEST} is of version {manifest['version']}, this program knows version 1")
    return manifest


def problem_with(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when every byte is as it was published. Collective: ranks share files."""
    rank, world = rank_and_world()
    found = None
    try:
        manifest = read_manifest(folder)
        files, loss = manifest["files"], manifest.get("held_out_loss")
        if not (loss is None or math.isfinite(loss)):
            raise UserError(f"its held-out loss is {loss}")
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
        for file in [*sorted(files), *sorted(present - files.keys())][rank::world]:
            if file not in present:
                raise UserError(f"{file} is missing")
            if file not in files:
                raise UserError(f"{file} is not in the manifest")
            if (size := (folder / file).stat().st_size) != files[file]["bytes"]:
                raise UserError(f"{file} has {size:,} bytes, want {files[file]['bytes']:,}")
            if sha256(folder / file) != files[file]["sha256"]:
                raise UserError(f"{file} has another SHA-256 than when it was saved")
    except Exception as error:  # of any kind, as in all_or_none
        found = str(error) if isinstance(error, OSError | UserError) else f"{type(error).__name__}: {error}"
    return next((problem for problem in from_all_ranks(found) if problem), None)


def checkpoints(root: Path) -> list[Path]:
    """The published checkpoints in `root`, newest first."""
    folders = root.iterdir() if root.exists() else ()
    found = [path for path in folders if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[4:]), reverse=True)


def newest_good(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and why newer ones did not. Collective."""
    rejected, listed = [], []
    with all_or_none("looking for checkpoints", root):
        listed = checkpoints(root) if rank_and_world()[0] == 0 else []
    for folder in from_all_ranks(listed)[0]:  # rank 0's: all ranks go through the same ones
        problem = problem_with(folder)
        if problem is None:
            return folder, rejected
        rejected.append(f"{folder.name} ({problem})")
    return None, rejected


# --- keep and clear away: renamed first, so that a kill in between leaves no half checkpoint ---


def remove(folder: Path) -> None:
    away = folder.with_name(f"removed_{folder.name}")
    shutil.rmtree(away, ignore_errors=True)
    folder.rename(away)
    shutil.rmtree(away)


def prune(root: Path, keep_last: int, keep_best: int = 1) -> list[str]:
    """Remove all but the newest `keep_last` and the `keep_best` with the lowest held-out loss; return what is left.

    A loss that was not measured, is NaN or infinite is never among the best. Rank 0 calls it, after `publish`, so that
    `latest` never names what is gone.
    """
    found, losses = checkpoints(root), {}
    for folder in found:
        with suppress(UserError):  # an old one may be damaged
            losses[folder] = read_manifest(folder).get("held_out_loss")
    measured = [folder for folder in losses if losses[folder] is not None and math.isfinite(losses[folder])]
    best = sorted(measured, key=losses.get)[:keep_best]  # with a NaN among them, sorting would put anything first
    kept = [folder for folder in found if folder in found[:keep_last] or folder in best]
    for folder in set(found) - set(kept):
        remove(folder)
    return [folder.name for folder in kept]


def clear_up(root: Path, good: Path | None) -> None:
    """At a start, on rank 0: delete what a kill left half done; rename checkpoints newer than `good` to damaged_*."""
    for path in root.glob("partial_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in root.glob("removed_*"):
        shutil.rmtree(path)
    for folder in checkpoints(root):
        if folder == good:
            break
        aside = folder.with_name(f"damaged_{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


# --- say that all is done: the launcher's exit code does not ---


def mark_finished(run_dir: Path, step: int) -> None:
    """Write that the run has reached its last step; all ranks call it, last of all, and rank 0 writes.

    A launcher that is killed itself ends with exit code 0 while its ranks train on (deepspeed 0.19.8).
    """
    if rank_and_world()[0] == 0:
        write_whole(run_dir / FINISHED, json.dumps({"step": step}))


# --- what is each rank's own, and what is not in DeepSpeed's files at all ---


def seed_all(number: int) -> None:
    """Seed every generator that random_state saves: one that nobody seeded makes two runs differ."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def random_state(device: torch.device) -> dict:
    """The state of this rank's random generators, in types that torch.load(weights_only=True) accepts."""
    name, keys, *rest = np.random.get_state()
    numpy = (name, torch.from_numpy(keys.astype(np.int64)), *rest)
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


class GlobalOrder(Sampler):
    """Deal sequences for ever, from number `start` of all ranks' on: shuffled anew each epoch, whatever the ranks.

    Number i of the run is the (i mod n)-th of epoch i // n. A step takes consecutive numbers and deals them out, so the
    data position is one number, the sequences seen so far, and it means the same on any number of ranks.
    """

    def __init__(self, num_sequences: int, micro_batch: int, seed: int, start: int = 0) -> None:
        self.num_sequences, self.micro_batch, self.seed, self.start = num_sequences, micro_batch, seed, start

    def __iter__(self) -> Iterator[int]:
        (rank, world), epoch_now, order = rank_and_world(), None, None
        number = self.start + rank * self.micro_batch
        while True:
            for at in range(number, number + self.micro_batch):
                epoch, index = divmod(at, self.num_sequences)
                if epoch != epoch_now:
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    epoch_now, order = epoch, torch.randperm(self.num_sequences, generator=generator)
                yield order[index].item()
            number += world * self.micro_batch


class StopSignals:
    """SIGTERM and SIGUSR1, as schedulers send them, ask for a save and an end at the next step boundary."""

    def __init__(self) -> None:
        self.seen = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.seen = number  # nothing else: a handler runs between any two lines of the program

    def agreed(self) -> str | None:
        """The signal that any rank has seen, the same answer on all. Collective, once a step."""
        seen = torch.tensor(self.seen)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=host_group())
        return signal.Signals(seen.item()).name if seen else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of checkpoints")
    root = parser.parse_args().root
    if not checkpoints(root):
        raise UserError(f"no checkpoints (step000123, ...) in {root}")
    for folder in checkpoints(root):
        problem = problem_with(folder)
        if problem is None:
            manifest = read_manifest(folder)
            total = sum(entry["bytes"] for entry in manifest["files"].values())
            made_by = f"{manifest['ranks']} ranks, stage {manifest['zero_stage']}"
            problem = f"good: {len(manifest['files'])} files, {total:,} bytes, {made_by}"
        print(f"{folder.name}  {problem}")


if __name__ == "__main__":
    with clear_errors():
        main()
