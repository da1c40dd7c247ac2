"""Day 24, the answers. Run it like the exercise: python day24/solution.py. Source: notes.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day24.exercise import check, clear_errors


def hostfile() -> str:
    return "host-a slots=1\nhost-b slots=1\n"  # NAME slots=N; host-c is away; no host twice


def environment() -> str:
    return "GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1"  # no comment, no blank line, no export


def options(hostfile: str) -> list[str]:
    return ["--hostfile", hostfile, "--master_addr", "10.77.0.1"]


if __name__ == "__main__":
    with clear_errors():
        check(hostfile, environment, options)
