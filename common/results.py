"""Measured results: what machine, which versions, which command, what came out - as JSON for dayXX/results/."""

import json
import os
import platform
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("deepspeed", "torch", "transformers")


def machine() -> dict:
    """Return {"hardware": ..., "versions": ..., "date": ...} of this machine; no host name, no environment."""
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists() and (
        found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    ):
        cpu = found[1].strip()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        hardware = f"{len(names)} x {names[0]}"
        versions["cuda"] = torch.version.cuda
    else:
        hardware = f"{cpu}, {os.cpu_count()} cores"
    return {"hardware": hardware, "versions": versions, "date": date.today().isoformat()}


def write_results(path: str | Path, command: str, **values) -> None:
    """Write `values` with `command` and `machine()` to `path` as indented JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, **machine(), **values}, indent=2, ensure_ascii=False) + "\n")
