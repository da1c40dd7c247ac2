"""Measured results: what machine, which versions, which command, what came out - as JSON for dayXX/results/."""

import json
import os
import platform
import re
import shlex
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from common.run_log import show_path

PACKAGES = ("deepspeed", "torch", "transformers")


def machine() -> dict:
    """Return {"hardware": ..., "versions": ..., "date": ...} of this machine; no host name, no environment."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = found[1].strip() if found else platform.processor() or platform.machine()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if torch.accelerator.is_available():  # of any make
        kind = torch.accelerator.current_accelerator().type
        name = getattr(torch.get_device_module(kind), "get_device_name", lambda: kind)()
        hardware = f"{torch.accelerator.device_count()} x {name}"
        if torch.version.cuda:
            versions["cuda"] = torch.version.cuda
    else:
        hardware = f"{cpu}, {os.cpu_count()} cores"
    return {"hardware": hardware, "versions": versions, "date": date.today().isoformat()}


def this_command() -> str:
    """Return the command that started this process, as a reader would type it: `deepspeed ...` where a launcher did.

    Left out are --local_rank, which the launcher adds, and --run_dir: where results went says nothing about them.
    """
    script, *words = sys.argv
    while "--run_dir" in words:
        at = words.index("--run_dir")
        del words[at : at + 2]
    words = [word for word in words if not word.startswith(("--local_rank", "--run_dir="))]
    program = f"deepspeed --num_accelerators {os.environ['WORLD_SIZE']}" if "WORLD_SIZE" in os.environ else "python"
    return f"{program} {shlex.join([show_path(script), *words])}"


def write_results(path: str | Path, command: str, **values) -> None:
    """Write `values` with `command`, `machine()` and OMP_NUM_THREADS (None: not set) to `path` as indented JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {"command": command, **machine(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
    partial = path.with_suffix(".partial")  # renamed when whole: a run killed while it writes keeps the rows before
    partial.write_text(json.dumps(known | values, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)
