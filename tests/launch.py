"""Run a day's script the way a reader does, and read its log lines back."""

import functools
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UserError
from common.run_log import parse_lines

ROOT = Path(__file__).resolve().parents[1]
# About 100 kB of Moby Dick: for tests whose claim is not the loss. Tokenizing and evaluating all of it takes seconds.
SMALL_CORPUS = ROOT / "tests/data/small.txt"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # this environment's programs first
DEEPSPEED = shutil.which("deepspeed", path=PATH)


@dataclass
class Run:
    """What a launch left: exit code, stdout, stderr, and the log rows."""

    code: int
    stdout: str
    stderr: str

    @property
    def rows(self) -> list[dict]:
        return parse_lines(self.stdout)

    @property
    def losses(self) -> dict[int, float]:
        """{optimizer step: training loss}."""
        return {row["step"]: row["loss"] for row in self.rows if "loss" in row}

    @property
    def held_out(self) -> dict[int, float]:
        """{optimizer step: held-out loss}."""
        return {row["step"]: row["held_out_loss"] for row in self.rows if "held_out_loss" in row}


def measure_again(test):
    """Give a test that compares times three goes: another program on these cores spoils one measurement, or two."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        for _ in range(2):
            try:
                return test(*args, **kwargs)
            except (AssertionError, ValueError) as error:
                print(f"measuring again: {error}")
        return test(*args, **kwargs)

    return run


def free_port() -> int:
    """A port that nobody listens on now, so that two launches on one machine do not collide."""
    from bench.world import free_port  # here: it imports deepspeed, which takes seconds

    return free_port()


def run_command(*command: object, timeout: int = 300, check: bool = True, **env: str) -> Run:
    """Run `command` from the repository root; raise AssertionError with its last output when it fails.

    Runs in a process group of its own, which is killed on time-out, so no rank outlives its test.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}  # ranks share the cores; more threads only fight
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"{command} ran longer than {timeout} s\n{stdout[-2000:]}\n{stderr[-2000:]}") from None
    if check:
        assert process.returncode == 0, f"exit code {process.returncode}\n{stdout[-2000:]}\n{stderr[-3000:]}"
    return Run(process.returncode, stdout, stderr)


def run_day(script: str, *flags: object, ranks: int = 2, port: int | None = None, **options) -> Run:
    """Launch `script` on `ranks` processes through the `deepspeed` launcher, on a free port unless `port` says."""
    launcher = [DEEPSPEED, "--num_accelerators", ranks, "--master_port", port or free_port()]
    return run_command(*launcher, script, *flags, **options)


def run_plain(script: str, *flags: object, **options) -> Run:
    """Run `script` with plain python, one process."""
    return run_command(sys.executable, script, *flags, **options)


def run_ranks(script: str, *flags: object, ranks: int = 1, timeout: int = 300, check: bool = True, **env: str) -> Run:
    """Run `script` on `ranks` processes with the flags and the environment that the launcher would give them.

    The processes are forked from one that has imported the libraries already (tests/preload.py): ten seconds faster
    than `run_day`, which each train.py goes through once. With CUDA, which does not survive a fork, it is `run_day`.
    """
    if torch.cuda.is_available():
        return run_day(script, *flags, ranks=ranks, timeout=timeout, check=check, **env)
    return _fork(*_as_ranks(script, flags, ranks, env), timeout, check)


def start_ranks(
    script: str, *flags: object, folder: Path, ranks: int = 2, **env: str
) -> list[multiprocessing.process.BaseProcess]:
    """Start the processes of `run_ranks` and return them running; they write `folder`/stdout and /stderr."""
    return _start(*_as_ranks(script, flags, ranks, env), folder)


def _as_ranks(script: str, flags: tuple, ranks: int, env: dict[str, str]) -> tuple[list[list], list[dict[str, str]]]:
    """The command and the environment of each rank, as the launcher gives them."""
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    knows_rank = '"--local_rank"' in (ROOT / script).read_text()
    commands = [[script, *([f"--local_rank={rank}"] if knows_rank else []), *flags] for rank in range(ranks)]
    return commands, [env | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_warm(script: str, *flags: object, timeout: int = 300, check: bool = True, **env: str) -> Run:
    """Run `script` as plain python would, one process without a launcher, forked like those of `run_ranks`.

    `run_plain` is a fresh Python, for what a fork cannot show: what is imported, warnings, the way out.
    """
    if torch.cuda.is_available():
        return run_plain(script, *flags, timeout=timeout, check=check, **env)
    return _fork([[script, *flags]], [env], timeout, check)


def run_answer(day: str, answer: str, folder: Path, ranks: int = 1) -> Run:
    """Run the check of `day`'s exercise on its solution with `answer`, Python code that changes some of it."""
    script = folder / "answer.py"
    solution = (ROOT / day / "solution.py").read_text().replace("__file__", repr(str(ROOT / day / "solution.py")))
    script.write_text(solution.replace("\nif __name__", f"\n{answer}\n\nif __name__"))
    return run_ranks(script, ranks=ranks, check=False)


def launch_warm(ranks: int, *words: object, port: int | None = None) -> None:
    """Stands in for `bench.world.launch`, without the launcher's ten seconds."""
    run = run_ranks(*words, ranks=ranks, check=False)
    if run.code:
        raise UserError(f"error: {error_line(run)}")


def _fork(commands: list[list[object]], envs: list[dict[str, str]], timeout: int, check: bool) -> Run:
    """Fork a process for each command from the fork server; when one fails, or time is up, end them all."""
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(commands, envs, Path(folder))
        ends = time.monotonic() + timeout
        late = False
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes) and not late:
            time.sleep(0.05)
            late = time.monotonic() > ends
        told = re.search("^error: ", Path(folder, "stderr").read_text(), re.M)  # by rank 0, so that others need not
        for rank, process in enumerate(processes):  # as the launcher does: a failure, or the time-out, ends them all
            process.join(0 if late else 0.1 if told and rank else 3)
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        texts = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
        run = Run(next((code for code in codes if code), 0), *texts)
    assert not late, f"{commands[0]} ran longer than {timeout} s\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    if check:
        assert run.code == 0, f"exit codes {codes}\n{run.stdout[-2000:]}\n{run.stderr[-3000:]}"
    return run


def _start(commands: list[list[object]], envs: list[dict[str, str]], folder: Path) -> list:
    """Fork a process for each command; all write into the same two files in `folder`."""
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(["tests.preload"])
    processes = []
    for command, env in zip(commands, envs, strict=True):
        arguments = [str(word) for word in command], env, folder / "stdout", folder / "stderr"
        (folder / "stdout").touch()
        (folder / "stderr").touch()
        processes.append(warm.Process(target=_become, args=arguments))
        processes[-1].start()
    return processes


def _become(arguments: list[str], env: dict[str, str], stdout: Path, stderr: Path) -> None:
    """What each forked process does: become the script."""
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout.reconfigure(line_buffering=True, write_through=False)  # whole lines, with PYTHONUNBUFFERED as well
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = arguments
    sys.path[0] = str((ROOT / arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


def error_line(run: Run) -> str:
    """The one sentence that a failed run gave; behind the launcher's last lines it stands once more."""
    found = sorted(set(re.findall(r"^error: (.*)$", run.stderr, re.M)))
    assert len(found) == 1, f"want one error sentence, got {found}\n{run.stderr[-2000:]}"
    return found[0]
