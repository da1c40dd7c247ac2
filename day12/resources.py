"""Day 12: resource use - how much of the hardware a run of train.py used, from its log.

    python day12/resources.py runs/day12/20261125-120000
    python day12/resources.py runs/day12/20261125-120000 --measure

Expect a table with tokens/s, model FLOP utilisation (MFU), data-loader share and GPU utilisation, and a plot beside
the log. MFU is work that the model needs, a second, over what the device could do: recomputed work does not count.
With --measure "could do" is not the data sheet's figure but a large matrix product, timed on this machine.
Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 4.1 and appendix B.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from common.plots import plt
from common.run_log import read_rows, show_path

# Dense bf16 FLOP/s by a part of the device's name. NVIDIA's data sheets print the figure "with sparsity", twice these.
PEAK_FLOPS = {
    "H100 80GB HBM3": 989e12,  # https://www.nvidia.com/en-us/data-center/h100/ (SXM; the PCIe card is slower)
    "H200": 989e12,  # https://www.nvidia.com/en-us/data-center/h200/
    "A100": 312e12,  # https://www.nvidia.com/en-us/data-center/a100/
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of day12/train.py")
    parser.add_argument("--measure", action="store_true", help="time a matrix product here, and take that as the peak")
    return parser.parse_args()


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


def main() -> None:
    args = parse_args()
    if not (Path(args.run) / "metrics.jsonl").exists():
        raise UserError(f"no log {args.run}/metrics.jsonl: name the run folder of a day12/train.py")
    rows = read_rows(args.run)
    setup = next((row for row in rows if "flops_per_token" in row), None)
    steps = [row for row in rows if "data_share" in row][1:]  # the first line pays for starting up
    if not setup or not steps:
        raise UserError(f"{args.run}/metrics.jsonl has no resource figures: it takes two log lines of day12/train.py")
    peak = setup["peak_flops"] and setup["peak_flops"] * setup["ranks"]
    if args.measure:  # what one rank can do here, with as many threads as it had
        peak = measured_flops(torch.accelerator.current_accelerator() or torch.device("cpu")) * setup["ranks"]
        print(f"measured: {peak / 1e12:.3f} TFLOP/s in bf16 matrix products, {setup['ranks']} ranks")
    for row in steps:
        row["mfu"] = peak and row["tokens_per_s"] * setup["flops_per_token"] / peak
    columns = {"tokens_per_s": ",.0f", "mfu": ".1%", "data_share": ".1%", "gpu_utilisation": ".0f"}
    show = {name: [row[name] for row in steps if row.get(name) is not None] for name in columns}
    print(f"{setup['num_params']:,} parameters, {setup['flops_per_token']:,} FLOPs a token, {len(steps)} log lines")
    for name, values in show.items():
        low, middle, high = (format(f(values), columns[name]) if values else "-" for f in (min, median, max))
        print(f"{name:16} min {low:>9} | median {middle:>9} | max {high:>9}" if values else f"{name:16} unknown")

    figure, axes = plt.subplots(figsize=(7, 3))
    for name, scale in {"mfu": 100, "data_share": 100, "gpu_utilisation": 1}.items():
        if show[name]:
            axes.plot([row["step"] for row in steps], [scale * value for value in show[name]], label=name)
    axes.set(xlabel="optimizer step", ylabel="percent", title="resource use")
    axes.legend()
    figure.savefig(Path(args.run) / "resources.png", dpi=120, bbox_inches="tight")
    print(f"plot: {show_path(args.run)}/resources.png")


if __name__ == "__main__":
    with clear_errors():
        main()
