"""Day 01: is this machine ready? Versions, devices, compilers and DeepSpeed ops, and what to do about what is missing.

    python day01/labs/check_env.py

Each row says OK, - (optional and absent: what waits for it) or MISSING (training cannot run). The exit code is 0 when
nothing is MISSING. The op rows are those of `ds_report`, explained.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/tutorials/advanced-install/
"""

import argparse
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

TESTED = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.20.0", "datasets": "5.2.0"}
# What each compiled op is for. All are built on first use (JIT); this course's CPU runs need none of them.
OPS = {
    "fused_adam": "one-kernel AdamW; not used when the config says torch_adam: true",
    "cpu_adam": "AdamW on the CPU for optimizer offload (day 07)",
    "async_io": "NVMe offload (day 07); needs libaio: sudo apt-get install libaio-dev",
    "deepspeed_shm_comm": "faster all-reduce between CPU ranks of one machine; the course leaves it to gloo",
}


# Backend -> whose. gloo and nccl (NVIDIA) have run this course; the others are what DeepSpeed's accelerator/ names.
BACKENDS = {
    "gloo": "CPU ranks",
    "nccl": "NVIDIA; RCCL on AMD",
    "hccl": "Ascend, Intel Gaudi",
    "cncl": "Cambricon",
    "xccl": "Intel GPUs",
    "ccl": "Intel, oneCCL",
    "tccl": "Tecorigin",
    "bccl": "Biren",
}


class Row(NamedTuple):
    """One line of the report; `required` rows decide the exit code, the others say what waits for them."""

    name: str
    value: object
    ready: bool
    advice: str = ""
    required: bool = False

    def __str__(self) -> str:
        status = "OK" if self.ready else "MISSING" if self.required else "-"
        return f"{self.name:22} {self.value!s:30.30} {status:8}{'' if self.ready else self.advice}".rstrip()


def find(program: str) -> str | None:
    """The path of `program`, beside this Python (where pip puts ninja) or on the PATH."""
    return shutil.which(program, path=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}")


def version_line(program: str, *flags: str) -> str | None:
    """The line with a version number that `program` prints, or None when it is not there or fails."""
    if not (path := find(program)):
        return None
    done = subprocess.run([path, *flags], capture_output=True, text=True)
    return next((line for line in done.stdout.splitlines() if re.search(r"\d\.\d", line)), None)


def check_packages() -> Iterator[Row]:
    """Python and the packages that training needs; a version other than the tested one is shown as such."""
    version = platform.python_version()
    yield Row("Python", version, sys.version_info >= (3, 10), "3.10 or newer is needed", required=True)
    for package, tested in TESTED.items():
        try:
            version = importlib.import_module(package).__version__
        except ImportError as error:
            yield Row(package, error, False, "pip install -r requirements.txt", required=True)
        else:
            yield Row(package, version if version.startswith(tested) else f"{version} (tested: {tested})", True)


def check_devices() -> Iterator[Row]:
    """Accelerators, their driver, and the backend that carries messages between ranks."""
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    backend = accelerator.communication_backend_name()
    yield Row("accelerator", accelerator.device_name(), True)
    if on_cpu:
        yield Row("CPU cores", os.cpu_count(), os.cpu_count() > 1, "one core trains, slowly")
        backend = "gloo"  # what ranks use here: ccl, which DeepSpeed takes where it is installed, is Intel's library
    else:
        for index in range(accelerator.device_count()):
            memory = accelerator.total_memory(index) / 2**30
            yield Row(f"device {index}", torch.get_device_module().get_device_name(index), True)
            yield Row(f"device {index} memory", f"{memory:.1f} GiB", True)
    if torch.version.cuda and not on_cpu:  # NVIDIA's; AMD's build of torch calls itself cuda as well
        driver = version_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        yield Row("driver", driver or "unknown", bool(driver), "nvidia-smi is not on the PATH")
        yield Row("CUDA of torch", torch.version.cuda, True)
    ready = torch.distributed.is_available() and torch.distributed.is_backend_available(backend)
    shown = f"{backend} ({BACKENDS.get(backend, 'ask its maker')})"
    yield Row("communication backend", shown, ready, "this build of torch has no such backend: reinstall torch", True)
    for name, advice in (("bf16", "use fp16, or fp32"), ("fp16", "use bf16, or fp32")):
        supported = bool(getattr(accelerator, f"is_{name}_supported")())
        yield Row(name, "supported" if supported else "not supported", supported, advice)


def check_build_tools() -> Iterator[Row]:
    """What DeepSpeed's just-in-time builds need, and the shared memory that worker processes need."""
    absent = "not found"
    gxx = version_line("g++", "--version")
    yield Row("g++", gxx or absent, bool(gxx), "only to build ops: sudo apt-get install g++")
    ninja = find("ninja")
    yield Row("ninja", "ninja" if ninja else absent, bool(ninja), "only to build ops: pip install ninja")
    nvcc = re.search(r"release ([\d.]+)", version_line("nvcc", "--version") or "")
    advice = "only to build ops for NVIDIA GPUs: the CUDA toolkit of the version that torch was built with"
    yield Row("nvcc (CUDA compiler)", nvcc[1] if nvcc else absent, bool(nvcc), advice)
    shm = shutil.disk_usage("/dev/shm").total / 2**30 if os.path.isdir("/dev/shm") else 0
    yield Row("/dev/shm", f"{shm:.1f} GiB", shm >= 1, "data workers and NCCL want 1 GiB: docker run --shm-size=8g")


def check_ops() -> Iterator[Row]:
    """Which of DeepSpeed's compiled ops could be built here (the table of `ds_report`)."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    for name, purpose in OPS.items():
        builder = ALL_OPS.get(name)  # which ops there are depends on the accelerator
        ready = builder is not None and builder.is_compatible()
        yield Row(f"op {name}", "can be built" if ready else "cannot be built", ready, purpose)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for check in (check_packages, check_devices, check_build_tools, check_ops):
        missing = []
        for row in check():
            print(row)
            missing += [row.name] if row.required and not row.ready else []
        if missing:
            sys.exit(f"\nnot ready: {', '.join(missing)} missing")
    print("\nready to train")


if __name__ == "__main__":
    main()
