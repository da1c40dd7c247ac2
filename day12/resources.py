"""Day 12: resource use - meters for what a device could do and what it did: data sheet, matrix product, utilisation.

    from day12.resources import UsageMeter, peak_flops     # train.py logs them, labs/resources.py reads them

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 4.1 and appendix B.
"""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from common.run_log import RunLog

# Dense bf16 FLOP/s by a device's name, as a regular expression for all of it: an H20 is no H200, a 4090 D no 4090, a
# part of a card (MIG) no card. Since Hopper, data sheets print the figure "with sparsity", twice these.
PEAK_FLOPS = {
    r"A(100|800)-(SXM4|PCIE)-\d+GB": 312e12,  # https://www.nvidia.com/en-us/data-center/a100/ (A800: see below)
    r"A(100|800) 80GB PCIe": 312e12,
    r"H100 80GB HBM3": 989e12,  # https://www.nvidia.com/en-us/data-center/h100/ (SXM)
    r"H200": 989e12,  # https://www.nvidia.com/en-us/data-center/h200/ (SXM)
    r"GeForce RTX 4090": 165.2e12,  # NVIDIA Ada GPU Architecture, appendix A: bf16 with fp32 accumulate
    # We found no data sheet of NVIDIA's for these, and take what verl/utils/flops_counter.py has, as for the A800:
    # https://github.com/volcengine/verl
    r"H800": 989e12,  # SXM
    r"H20(-3e)?": 148e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of `device` from the table above, None when it is not there."""
    name = getattr(torch.get_device_module(device), "get_device_name", str)(device).removeprefix("NVIDIA ")
    return next((peak for card, peak in PEAK_FLOPS.items() if re.fullmatch(card, name)), None)


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


class UsageMeter:
    """What a run uses of this rank's device between two log lines: MFU, the data loader's share, GPU utilisation."""

    def __init__(self, log: RunLog, flops_per_token: int, device: torch.device) -> None:
        self.log = log
        self.device = device
        self.flops = flops_per_token
        self.peak = peak_flops(device)
        self.gpu_utilisation, self.why_no_utilisation = utilisation_meter(device)
        self.rows: list[dict] = []
        self.data_s = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time within as the data loader's."""
        start = time.perf_counter()
        yield
        self.data_s += time.perf_counter() - start

    def row(self, tokens: int, loss: torch.Tensor) -> dict[str, float | None]:
        """The figures since the last log line, for the next one; `tokens` are those of the step that it is about."""
        float(loss)  # waits for the device
        seconds = time.perf_counter() - self.log.since
        mfu = self.peak and (self.log.tokens + tokens) / seconds * self.flops / self.peak
        busy = self.gpu_utilisation and self.gpu_utilisation()
        self.rows.append({"mfu": mfu, "data_share": self.data_s / seconds, "gpu_utilisation": busy})
        self.data_s = 0.0
        return self.rows[-1]

    def restart(self) -> None:
        """Leave out of the next row, and of the log's tokens/s, what was done since the last one."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        self.data_s = 0.0
        self.log.tokens = 0
        self.log.since = time.perf_counter()

    def summary(self) -> str:
        """Medians of the rows after the first, which pays for starting up, as one line for the terminal."""
        if not self.rows:
            return "resource use: unknown, the run was too short for a log line"
        rows = self.rows[1:] or self.rows
        middle = {key: median(row[key] for row in rows) for key in rows[0] if rows[0][key] is not None}
        mfu = f"{middle['mfu']:.1%}" if "mfu" in middle else "unknown: no peak FLOP/s known for this device"
        known = "gpu_utilisation" in middle
        gpu = f"{middle['gpu_utilisation']:.0f} %" if known else f"unknown: {self.why_no_utilisation}"
        return f"MFU {mfu} | data loader {middle['data_share']:.2%} of the time | GPU utilisation {gpu}"
