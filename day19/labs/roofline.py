"""Day 19: roofline - which operation is limited by arithmetic, which by memory, and how near it comes to its limit.

From the repository root, one process, no launcher, on a CPU or a GPU:

    python day19/labs/roofline.py
    python day19/labs/roofline.py --tokens 16384 --hidden 4096

Expect the machine's two ceilings, measured: a large matrix product, and a copy of a large tensor. Then a row for each
operation of a transformer's layer: FLOP per byte, what it reaches, what its roof is. roofline.json and roofline.png.
Source: Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785; https://jax-ml.github.io/scaling-book/roofline
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import time_step
from common.errors import UserError, clear_errors
from common.plots import plt, save_plot
from common.run_log import default_run_dir
from day19.flops import product_flops
from day19.slow import python_gelu

LENGTH, HEAD = 512, 64  # tokens of a sequence, width of a head


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="tokens in a batch (default 4096, on a GPU 16384)")
    parser.add_argument("--hidden", type=int, help="width of the model (default 768, on a GPU 4096)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each operation")
    parser.add_argument("--run_dir", default=default_run_dir("day19"), help="folder for roofline.json and .png")
    return parser.parse_args()


def operations(n: int, h: int, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[float, float, Callable]]:
    """{name: (operations, least bytes to read and write, call)} for n tokens of width h.

    Least bytes: every input once, every result once. Who writes intermediate results moves more, and lies below its
    roof. A tanh or an exp counts as one operation.
    """
    w = dtype.itemsize
    x, wide = torch.randn(n, h, device=device).to(dtype), torch.randn(n, 4 * h, device=device).to(dtype)
    weight = torch.randn(4 * h, h, device=device).to(dtype)
    q = torch.randn(n // LENGTH, h // HEAD, LENGTH, HEAD, device=device).to(dtype)
    num_weights = max(4 * h * h, 2**24)  # more than a cache holds
    state = torch.randn(num_weights, device=device, requires_grad=True)
    state.grad = torch.randn_like(state)
    adamw = torch.optim.AdamW([state], lr=1e-3, fused=True)
    return {
        "product": (2 * n * h * 4 * h, w * (n * h + 4 * h * h + n * 4 * h), lambda: F.linear(x, weight)),
        "product, 16 tokens": (2 * 16 * h * 4 * h, w * (16 * h + 4 * h * h + 64 * h), lambda: F.linear(x[:16], weight)),
        "attention, causal": (
            4 * n * LENGTH * h / 2, w * 4 * n * h, lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        ),
        "layer norm": (8 * n * h, w * 2 * n * h, lambda: F.layer_norm(x, (h,))),
        "GELU": (9 * n * 4 * h, w * 2 * n * 4 * h, lambda: F.gelu(wide, approximate="tanh")),
        "GELU in Python": (9 * n * 4 * h, w * 2 * n * 4 * h, lambda: python_gelu(wide)),
        "softmax": (4 * n * 4 * h, w * 2 * n * 4 * h, lambda: wide.softmax(-1)),
        "AdamW": (13 * num_weights, 4 * 7 * num_weights, adamw.step),  # reads w, g, m, v, writes w, m, v, in fp32
    }  # fmt: skip


def seconds_of(call: Callable, repeats: int, device: torch.device) -> float:
    """Seconds of one call: on a GPU of many in a row, so that starting one hides behind the one before."""
    calls = 1 if device.type == "cpu" else 20
    with torch.no_grad():
        return median([time_step(lambda: [call() for _ in range(calls)])[0] for _ in range(repeats + 1)][1:]) / calls


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second, read and written, of the best copy of a tensor that no cache holds.

    A CPU reads what it is about to overwrite: a copy moves half as much again as counted here, work in place does not.
    """
    source = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    runs = [time_step(lambda: target.copy_(source))[0] for _ in range(repeats + 1)]
    return 2 * source.numel() * source.element_size() / min(runs[1:])


def draw(rows: list[dict], peak: float, bandwidth: float, path: Path, title: str) -> None:
    """Dots under the roof, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(8, 5))
    least, most = min(row["intensity"] for row in rows) / 2, max(row["intensity"] for row in rows) * 2
    corner = peak / bandwidth
    axes.loglog(
        [least, corner, max(most, 2 * corner)], [least * bandwidth / 1e9, peak / 1e9, peak / 1e9], "k-", label="roof"
    )
    axes.axvline(corner, color="grey", linestyle=":", label=f"{corner:.0f} FLOP per byte")
    for row in rows:
        (dot,) = axes.loglog(row["intensity"], row["gflops"], "o")
        left = row["intensity"] > corner
        axes.annotate(
            row["case"], (row["intensity"], row["gflops"]), xytext=(-6 if left else 6, -4), textcoords="offset points",
            ha="right" if left else "left", color=dot.get_color(), fontsize=8,
        )  # fmt: skip
    axes.set(xlabel="FLOP per byte", ylabel="GFLOP/s", title=title)
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    device = torch.device(get_accelerator().current_device_name())
    on_cpu = device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    tokens, hidden = args.tokens or (4096 if on_cpu else 16384), args.hidden or (768 if on_cpu else 4096)
    if tokens % LENGTH or hidden % HEAD or min(tokens, hidden, args.repeats) < 1:
        sizes = f"--tokens {tokens} --hidden {hidden} --repeats {args.repeats}"
        raise UserError(f"{sizes}: multiples of {LENGTH} and {HEAD}, and at least one repeat")
    torch.manual_seed(0)
    peak, bandwidth = product_flops(device, dtype, 2048 if on_cpu else 8192), copy_bandwidth(device, args.repeats)
    print(f"{peak / 1e9:,.0f} GFLOP/s in {dtype}, {bandwidth / 1e9:,.1f} GB/s: {peak / bandwidth:.0f} FLOP per byte")
    columns = {"FLOP/byte": "intensity:,.2f", "GFLOP/s": "gflops:,.1f", "GB/s": "gb_per_s:,.1f"}
    columns |= {"roof GFLOP/s": "roof_gflops:,.1f", "of the roof": "share:.0%", "limit": "limit:"}
    facts = {"peak_gflops": peak / 1e9, "bandwidth_gb_per_s": bandwidth / 1e9, "corner": peak / bandwidth}
    table = Table(Path(args.run_dir) / "roofline.json", columns, width=20, dtype=str(dtype), **facts)
    for name, (flops, least_bytes, call) in operations(tokens, hidden, device, dtype).items():
        with table.row(name) as row:
            seconds, intensity = seconds_of(call, args.repeats, device), flops / least_bytes
            roof = min(peak, intensity * bandwidth)
            row |= {"intensity": intensity, "gflops": flops / seconds / 1e9, "roof_gflops": roof / 1e9}
            row |= {"gb_per_s": least_bytes / seconds / 1e9, "share": flops / seconds / roof}
            row["limit"] = "memory" if math.isclose(roof, intensity * bandwidth) else "arithmetic"
    title = f"{'CPU' if on_cpu else torch.get_device_module(device).get_device_name()}, {tokens} tokens of {hidden}"
    rows = [row for row in table.rows if "error" not in row]
    draw(rows, peak, bandwidth, Path(args.run_dir) / "roofline.png", title)
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
