"""Day 24: what a rank says about itself when there are several hosts - beats with host and clock, and its last words.

    from day24.watch import Beats, fingerprint, require_same     # in a training script; day24/supervise.py reads them

Checked with torch 2.13.0, gloo. Source: day18/supervise.py, which sees one machine's processes and nothing else.
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from common.errors import UserError
from day17.checkpoints import from_all_ranks

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("starting", "batch", "compute", "boundary", "done", "failed")  # of a step, in order; failed: with a "problem"


class Beats:
    """One small file a rank in the shared folder: host, process, step, phase, this host's clock.

    `host_log`: a folder on the host's own disk, where each beat becomes a line as well.
    """

    def __init__(self, run_dir: str | Path, rank: int, host_log: str | None = None) -> None:
        self.path = Path(run_dir) / "heartbeats" / f"rank_{rank}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.step, self.phase = None, 0, "starting"
        self.facts = {"host": platform.node(), "rank": rank, "pid": os.getpid()}
        with self.last_words():
            if host_log:
                Path(host_log).mkdir(parents=True, exist_ok=True)
                self.log = open(Path(host_log) / f"rank_{rank}.log", "a")  # noqa: SIM115 - open for the run
            self.beat(0, "starting")

    def beat(self, step: int, phase: str, **more: str) -> None:
        """Say where this rank is. OSError when the disk under host_log is full."""
        self.step, self.phase = step, phase
        line = json.dumps({**self.facts, "step": step, "phase": phase, "time": time.time(), **more})
        partial = self.path.with_suffix(
            ".partial"
        )  # renamed: a reader on another host sees a whole line or the old one
        partial.write_text(line)
        partial.replace(self.path)
        if self.log and phase != "failed":
            self.log.write(line + "\n")
            self.log.flush()

    @contextmanager
    def last_words(self) -> Iterator[None]:
        """Write down what ended this rank, with the step and the phase that it ended in."""
        try:
            yield
        except Exception as error:
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.beat(self.step, "failed", during=self.phase, problem=" ".join(said.split())[:300])
            raise


def read_beats(run_dir: Path) -> dict[int, dict]:
    """{rank: its last beat}."""
    beats = {}
    for path in sorted((run_dir / "heartbeats").glob("rank_*.json")):
        with suppress(FileNotFoundError):  # a new launch clears them away
            beat = json.loads(path.read_text())
            beats[beat["rank"]] = beat
    return dict(sorted(beats.items()))


def fingerprint(*files: str) -> dict[str, str]:
    """{name: version or SHA-256} of what has to be equal on all hosts: packages, loaded course modules, `files`."""
    found = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "deepspeed")}}
    modules = [Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
    for path in {path for path in modules if path.suffix == ".py" and path.is_relative_to(ROOT)} | set(
        map(Path, files)
    ):
        path = path.resolve()
        if ".venv" not in path.parts:
            name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return found


def differences(facts: dict[str, dict[str, str]]) -> list[str]:
    """What differs between {who: {name: value}}, against the first of them, a sentence each."""
    (first, want), *others = facts.items()
    return [
        f"{who} has {name} {got.get(name, 'not at all')}, {first} has {want.get(name, 'none')}"
        for who, got in others
        for name in sorted(want.keys() | got.keys())
        if got.get(name) != want.get(name)
    ]


def require_same(mine: dict[str, str]) -> None:
    """Stop all ranks when code, config or versions differ between hosts. Collective."""
    rank = int(os.environ["RANK"])
    facts = dict(from_all_ranks((f"{platform.node()} (rank {rank})", mine)))
    if found := differences(facts):
        raise UserError(f"not the same on all hosts: {'; '.join(found[:3])}. Copy it there, then start again")
