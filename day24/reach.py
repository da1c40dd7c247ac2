"""Day 24: ask the hosts of a hostfile over ssh - do they answer, what do they say, how fast do they send.

    from day24.reach import ask, ask_all, hosts_of, send_seconds     # the supervisor and labs/preflight.py do

Checked with deepspeed 0.19.8, OpenSSH 9.2. Source: deepspeed/launcher/runner.py (fetch_hostfile), man 5 ssh_config.
"""

import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deepspeed.launcher.runner import fetch_hostfile
from deepspeed.utils import logger

from common.errors import UserError

# No password prompts, and no waiting for a host that is gone: 3 s for the connection, 6 s of silence within one.
OPTIONS = [
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=3",
    "-o",
    "ServerAliveInterval=2",
    "-o",
    "ServerAliveCountMax=3",
]


@dataclass
class Answer:
    """What a host said, or why it did not; `seconds` the question took."""

    text: str
    problem: str | None
    seconds: float


def hosts_of(hostfile: str | Path) -> dict[str, int]:
    """{host: slots}, read by DeepSpeed's own reader. UserError for a file that is not there or not right."""
    if not Path(hostfile).is_file():  # DeepSpeed only warns, and trains on this machine alone (issue 4907)
        raise UserError(f"no hostfile {str(hostfile)!r}; day 24's lab writes runs/lab/hostfile, and removes it on exit")
    logger.disabled = True  # it would print the whole file before the sentence
    try:
        slots = dict(fetch_hostfile(str(hostfile)))
    except ValueError as error:
        raise UserError(f"{hostfile}: {str(error).rstrip('.')}; a line reads: host-a slots=8") from error
    finally:
        logger.disabled = False
    if idle := [host for host in slots if not slots[host]]:
        raise UserError(f"{hostfile}: {idle[0]} has slots=0; leave the line out, or give it a rank")
    return slots


def ask(host: str, command: str, stdin: bytes = b"", timeout: float = 15) -> Answer:
    """Run a shell command on `host` over ssh."""
    start = time.perf_counter()
    try:
        done = subprocess.run(["ssh", *OPTIONS, host, command], input=stdin, capture_output=True, timeout=timeout)
        problem = (done.stderr.decode() or f"exit code {done.returncode}").strip() if done.returncode else None
        text = done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired:
        text, problem = "", f"no answer within {timeout:g} s"
    return Answer(text, problem and problem.splitlines()[-1], time.perf_counter() - start)


def ask_all(commands: dict[str, str], timeout: float = 15) -> dict[str, Answer]:
    """Ask {host: command} all at once."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return dict(
            zip(commands, pool.map(lambda host: ask(host, commands[host], timeout=timeout), commands), strict=True)
        )


def send_seconds(hosts: list[str], num_bytes: int) -> dict[str, float]:
    """{host: seconds that `num_bytes` from it took}, over ssh to or from this host, its start taken off.

    What this host sends goes to each other one; the fastest counts, so that a slow receiver is not taken for it.
    """
    here, seconds = platform.node(), {}
    for host in (host for host in hosts if host != here):
        start = min(ask(host, "true").seconds for _ in range(2))
        seconds[host] = max(0.0, ask(host, f"head -c {num_bytes} /dev/zero", timeout=60).seconds - start)
        there = max(0.0, ask(host, "wc -c", bytes(num_bytes), timeout=60).seconds - start)
        seconds[here] = min(there, seconds.get(here, there))
    return seconds
