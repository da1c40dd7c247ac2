"""Day 13: notice a hang long before the time-out, and say where every rank stands. A module.

    with watch_for_hangs(10, run_dir) as beat:       # from day13.stuck import watch_for_hangs
        for step in ...:
            beat()                                   # no beat for 10 s: stacks, flight recorder, verdict, exit code 1

Each rank has a thread of its own for that, so none has to come to a collective. py-spy does the same from outside.
Checked with torch 2.13.0. Source: https://docs.python.org/3/library/sys.html#sys._current_frames
"""

import datetime
import functools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from common.cpu import start_without_compiler
from common.ranks import require_launcher
from common.run_log import show_path
from day13.flight import LIBRARY, dump, verdict


def join_with_timeout(seconds: float) -> torch.device:
    """Join the process group; every collective of every group gives up after `seconds`. Collective.

    DeepSpeed's own groups ignore the timeout given to init_distributed: they come from `dist.new_group`, which takes
    the default of 30 minutes (gloo) or 10 (NCCL) unless it is told (0.19.8).
    """
    require_launcher()
    start_without_compiler()
    dist.set_debug_level_from_env()  # TORCH_DISTRIBUTED_DEBUG, also when torch was imported before it was set
    timeout = datetime.timedelta(seconds=seconds)
    dist.new_group = functools.partial(dist.new_group, timeout=timeout)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(timeout=timeout)
    return torch.device(get_accelerator().current_device_name())


def of_rank_0(text: str) -> str:
    """Rank 0's `text` on every rank. Collective. (A default run folder has the second of its start in its name.)"""
    texts = [text]
    dist.broadcast_object_list(texts, src=0)
    return texts[0]


def say(line: str) -> None:
    """Print at once: whoever reads this may be killed in the next second."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def place(frames: list[traceback.FrameSummary]) -> str:
    """The innermost frame of your own code, and the library's function that it called."""
    own = [frame for frame in frames if not LIBRARY.search(frame.filename)] or frames
    inside = f", inside {frames[-1].name}()" if frames[-1] is not own[-1] else ""
    return f"{show_path(own[-1].filename)}:{own[-1].lineno} in {own[-1].name}(): {own[-1].line}{inside}"


def conclude(folder: Path, patience_s: float) -> None:
    """Write this rank's flight recorder, wait for those of the others, and let one rank read them all."""
    dump(folder)
    ends = time.monotonic() + patience_s
    while time.monotonic() < ends and len(list(folder.glob("rank_*"))) < dist.get_world_size():
        time.sleep(0.05)
    time.sleep(0.2)  # the last one may be half written
    with suppress(FileExistsError), open(folder / "verdict.txt", "x") as file:  # the first one that gets here
        file.write(verdict(folder))
        say(verdict(folder))
    time.sleep(0.5)  # a launcher ends the others when this rank has ended: let them write too


@contextmanager
def watch_for_hangs(seconds: float, folder: str | Path, patience_s: float = 3.0) -> Iterator[Callable[[], None]]:
    """Yield `beat`, to be called at each step. Without a beat for `seconds` this rank reports and ends with code 1.

    It reports after an exception as well, which is how a time-out or a lost peer shows. Needs a process group.
    """
    folder, last, over = Path(folder), [time.monotonic()], threading.Event()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / f"rank_{dist.get_rank()}", folder / "verdict.txt"):
        old.unlink(missing_ok=True)  # of a run before
    main = threading.get_ident()

    def beat() -> None:
        last[0] = time.monotonic()

    def watch() -> None:
        while not over.wait(0.1):
            if time.monotonic() - last[0] > seconds:
                where = place(list(traceback.extract_stack(sys._current_frames()[main])))
                say(f"rank {dist.get_rank()}: no step for {seconds:g} s, stands at {where}")
                conclude(folder, patience_s)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield beat
    except Exception as error:
        over.set()
        where = place(list(traceback.extract_tb(error.__traceback__)))
        said = " ".join(str(error).split())[:500]
        say(f"rank {dist.get_rank()}: {type(error).__name__} at {where}\n  {said}")
        conclude(folder, seconds + patience_s)  # the others notice when their own time is up
        raise
    finally:
        over.set()
        dump(folder)  # a rank that is done: its calls show who is not
