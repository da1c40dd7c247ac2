"""Start a world of ranks from a program, join the one that a launcher started, and end what is left of it.

    device = join_world()                                              # in a script that `deepspeed` started
    done = launch(2, "day03/train.py", "--steps", 20)                  # from a script that starts others
    ended = run_ranks(2, "day12/labs/trial.py", "--stage", 1)          # the same without the launcher's seconds

Checked with deepspeed 0.19.8. Source: deepspeed/launcher/runner.py and launch.py.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator

from common.cpu import start_without_compiler
from common.errors import UserError
from common.ranks import require_launcher


def join_world() -> torch.device:
    """Join the process group of the ranks that the launcher started; return this rank's device. Collective.

    Raises UserError when no launcher started this process.
    """
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    return torch.device(get_accelerator().current_device_name())


def default_ranks() -> int:
    """The accelerators of this machine, or 2 CPU ranks."""
    return get_accelerator().device_count() if get_accelerator().device_name() != "cpu" else 2


def free_port(count: int = 1) -> int:
    """A port that nobody listens on now, so that two worlds do not collide; the first of `count` such in a row.

    Below 32768, where Linux takes none by itself: what was free a moment ago is then not another world's NCCL socket.
    """
    while True:
        first = random.SystemRandom().randrange(10_000, 32_768 - count)
        with ExitStack() as probes, suppress(OSError):  # one is taken: look elsewhere
            for number in range(count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", first + number))
            return first


def launch_command(ranks: int, *words: object, port: int | None = None) -> list[str]:
    """The command that starts a script (or `--module NAME`) with its flags on `ranks` ranks, by DeepSpeed's launcher.

    It is the launcher of this Python's own environment: `deepspeed` need not be on the PATH.
    """
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", ranks]
    return [str(word) for word in (*launcher, "--master_port", port or free_port(), *words)]


def launch(ranks: int, *words: object, port: int | None = None) -> subprocess.CompletedProcess:
    """Run `launch_command(...)` to its end, its output kept as text. Raises UserError with its last complaint."""
    done = subprocess.run(launch_command(ranks, *words, port=port), capture_output=True, text=True)
    if done.returncode:
        lines = [s for s in done.stderr.splitlines() if s.startswith("error: ") or ("Error" in s and s[:2] != "错误")]
        last = lines[-1].removeprefix("error: ") if lines else f"exit code {done.returncode}: {done.stderr[-500:]}"
        raise UserError(last)
    return done


def run_ranks(ranks: int, *words: object, port: int | None = None) -> list[subprocess.CompletedProcess]:
    """Run a script on `ranks` ranks with the environment that the launcher would give them, to its end.

    Return exit code and output of each rank. One that fails ends the others after 3 s: they wait for it in vain.
    """
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(ranks)}
    return run_together([world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)], *words)


def run_together(
    environments: list[dict[str, str]], *words: object, inside: Iterable[tuple[str, ...]] | None = None
) -> list[subprocess.CompletedProcess]:
    """Run a script once for each of `environments`, all at once: `run_ranks`, for ranks of other kinds.

    `inside`: for each of them the words that start it elsewhere, `("ip", "netns", "exec", "A")` say.
    """
    command = [sys.executable, *map(str, words)]
    with ExitStack() as files:  # files and not pipes: nobody reads while they run, and a full pipe would stop a rank
        outputs = [[files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in environments]
        processes = [
            subprocess.Popen([*where, *command], env=os.environ | environment, stdout=stdout, stderr=stderr)
            for where, environment, (stdout, stderr) in zip(
                inside or [()] * len(environments), environments, outputs, strict=True
            )
        ]
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            time.sleep(0.05)
        ended = []
        for process, (stdout, stderr) in zip(processes, outputs, strict=True):
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            stdout.seek(0)
            stderr.seek(0)
            said = stdout.read(), stderr.read()
            ended.append(subprocess.CompletedProcess(command, process.returncode, *said))
    return ended


def process_tree(pid: int) -> list[psutil.Process]:
    """The process and all below it: launcher, ranks, what they started. Empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end_session(job: subprocess.Popen) -> None:
    """SIGKILL to a job that was started with `start_new_session=True` and to all of its, orphans too; wait for them."""
    left = process_tree(job.pid)
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(job.pid, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)
    job.wait()


def command_of(process: psutil.Process) -> list[str]:
    """The words of its command line; empty when it is gone. A rank has `--local_rank=NUMBER` among them."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to all of them at once; who is gone already is gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
