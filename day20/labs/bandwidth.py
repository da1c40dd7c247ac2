"""Day 20: bandwidth - bus bandwidth over sizes of four collectives, in the definitions of nccl-tests.

From the repository root, on CPU processes or GPUs; as root on a link of known speed:

    deepspeed --num_accelerators 2 day20/labs/bandwidth.py
    deepspeed --num_accelerators 2 day20/labs/bandwidth.py --sizes 4 64 1024 16384 262144 1048576 --calls 20
    deepspeed --num_accelerators 2 day20/labs/bandwidth.py --sockets
    python day20/labs/on_link.py "day20/labs/bandwidth.py" --placements AB --rates 100mbit 1gbit

Expect a row for each collective and size, and bandwidth.png: from what size on is it the link, and no longer the
start of a message, that counts? On a link a last column has the bytes that left the host, per byte of S.
Checked with torch 2.13.0. Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.link import INTERFACE, sent_over_link
from bench.table import Table
from bench.timing import slowest_median, time_step
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.plots import plt, save_plot
from common.run_log import default_run_dir
from day20.bandwidth import COLLECTIVES, SOCKETS, bus_share, make_collective

COLUMNS = {
    "KiB": "kib:d",
    "us": "us:,.0f",
    "algbw GB/s": "algbw:.3f",
    "busbw GB/s": "busbw:.3f",
    "left host": "left:.2f",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[4, 64, 1024, 8192], help="KiB: S of nccl-tests")
    parser.add_argument("--calls", type=int, default=1, help="calls between two looks at the clock")
    parser.add_argument("--repeats", type=int, default=5, help="times that are taken; the first is not counted")
    parser.add_argument("--sockets", action="store_true", help="NCCL over sockets: as between machines without RDMA")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day20"), help="folder for bandwidth.json and the plot")
    return parser.parse_args()


def measure(collective: str, kib: int, args: argparse.Namespace, device: torch.device) -> dict:
    """Time `collective` on S = `kib` KiB; on a link also count what leaves this host."""
    on_link = os.environ.get("GLOO_SOCKET_IFNAME") == INTERFACE
    call = make_collective(collective, kib * 1024, device)
    call()  # connections, buffers
    dist.barrier()
    before = sent_over_link() if on_link else 0
    dist.barrier()
    call()
    dist.barrier()
    sent = sent_over_link() - before if on_link else None

    def calls() -> None:
        for _ in range(args.calls):
            call()

    seconds = []
    for _ in range(args.repeats):
        dist.barrier()
        seconds.append(time_step(calls)[0] / args.calls)
    median = slowest_median(seconds, device, warm_up=1)
    algbw = kib * 1024 / median / 1e9
    row = {"collective": collective, "kib": kib, "us": 1e6 * median, "algbw": algbw}
    row["busbw"] = algbw * bus_share(collective, dist.get_world_size())
    return row | {"left": sent / (kib * 1024) if on_link else None}


def plot_curves(table: list[dict], path: Path, title: str) -> None:
    """Bus bandwidth against size, a line for each collective."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for collective in COLLECTIVES:
        points = [(row["kib"], row["busbw"]) for row in table if row["collective"] == collective]
        axes.semilogx(*zip(*points, strict=True), "o-", label=collective)
    axes.set(xlabel="KiB (S of nccl-tests)", ylabel="bus bandwidth, GB/s", title=title)
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    if min(args.sizes) < 1 or args.calls < 1 or args.repeats < 2:
        flags = f"--sizes {min(args.sizes)} --calls {args.calls} --repeats {args.repeats}"
        raise UserError(f"{flags}: at least 1 KiB, 1 call, 2 repeats")
    if args.sockets:
        os.environ |= SOCKETS
    device = join_world()
    ranks = dist.get_world_size()
    if ranks < 2:
        raise UserError("one rank sends nothing: start it on two or more")
    table = Table(Path(args.run_dir) / "bandwidth.json", COLUMNS, width=16, backend=dist.get_backend(), ranks=ranks)
    for collective in COLLECTIVES:
        for kib in args.sizes:
            with table.row(collective) as row:
                row |= measure(collective, kib, args, device)
    if dist.get_rank() == 0:
        plot_curves(table.rows, Path(args.run_dir) / "bandwidth.png", f"{ranks} ranks, {dist.get_backend()}")
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
