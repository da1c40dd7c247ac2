"""Day 12: resource use - meters for what a device could do and what it did: data sheet, matrix product, utilisation.

    from day12.resources import peak_flops, utilisation_meter     # train.py logs them, labs/resources.py reads them

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 4.1 and appendix B.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up


# Dense bf16 FLOP/s by a part of the device's name. NVIDIA's data sheets print the figure "with sparsity", twice these.
PEAK_FLOPS = {
    "H100 80GB HBM3": 989e12,  # https://www.nvidia.com/en-us/data-center/h100/ (SXM; the PCIe card is slower)
    "H200": 989e12,  # https://www.nvidia.com/en-us/data-center/h200/
    "A100": 312e12,  # https://www.nvidia.com/en-us/data-center/a100/
}


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of `device` from the table above, None when it is not there."""
    name = getattr(torch.get_device_module(device), "get_device_name", str)(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def measured_flops(device: torch.device, size: int = 4096, seconds: float = 1.0) -> float:
    """FLOP/s of bf16 products of two size x size matrices, which cost 2 size^3 operations each."""
    size = 1024 if device.type == "cpu" else size
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)

    def ten_products() -> None:
        for _ in range(10):
            a @ a
        torch.get_device_module(device).synchronize()

    ten_products()  # warms up
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        ten_products()
        count += 10
    return count * 2 * size**3 / (time.perf_counter() - start)


def utilisation_meter(device: torch.device) -> tuple[Callable[[], int], str]:
    """Return (a function that reads the GPU's utilisation in percent, "") or (None, why there is none).

    It is the share of the last moments in which any kernel ran: 100 does not mean that the kernels were good ones.
    """
    if device.type == "cpu":
        return None, "the ranks are CPU processes"
    try:  # NVML, through the package nvidia-ml-py
        torch.get_device_module(device).utilization(device)
        return lambda: torch.get_device_module(device).utilization(device), ""
    except (AttributeError, ModuleNotFoundError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".split(". ")[0]
    try:
        uuid = f"GPU-{torch.get_device_module(device).get_device_properties(device).uuid}"
        query = ["nvidia-smi", f"--id={uuid}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]

        def read() -> int:
            return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)

        read()
        return read, ""
    except (AttributeError, OSError, subprocess.CalledProcessError, ValueError):
        return None, f"{reason}; pip install nvidia-ml-py"


def summary(usage: list[dict], why_no_utilisation: str) -> str:
    """Medians of a run's log lines after the first, which pays for starting up, as one line for the terminal."""
    middle = {key: median(row[key] for row in usage[1:] or usage) for key in usage[0] if usage[0][key] is not None}
    mfu = f"{middle['mfu']:.1%}" if "mfu" in middle else "unknown: no peak FLOP/s known for this device"
    gpu = f"{middle['gpu_utilisation']:.0f} %" if "gpu_utilisation" in middle else f"unknown: {why_no_utilisation}"
    return f"MFU {mfu} | data loader {middle['data_share']:.2%} of the time | GPU utilisation {gpu}"
