"""Day 08: what does an all-reduce cost? Measure sizes, fit alpha and bandwidth, hold them against the link's own speed.

On two hosts joined by links of known speed, made for this on one machine (root; CPU):

    python day08/labs/fit.py

On whatever joins your ranks or GPUs:

    deepspeed --num_accelerators 2 day08/labs/fit.py --sizes_mib 1 4 16 64 256

Expect a row for each size: measured and modelled milliseconds, bytes on the wire over 2(N-1)/N of the tensor's.
Checked with torch 2.13.0, gloo and NCCL. Source: day08/cost.py; man 8 tc-tbf.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.link import sent_over_link
from bench.results import this_command, write_results
from bench.table import Table
from bench.traffic import ring_share
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import print0
from common.run_log import default_run_dir, show_path
from day08.cost import MIB, SIZES, fit, measure_all_reduce, rate_bytes_per_s
from day08.wire import run_on_link, started_by_launcher

COLUMNS = {"ms": "ms:,.2f", "model ms": "model_ms:,.2f", "bus MB/s": "bus_bytes_per_s:MB", "wire/formula": "wire:.3f"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], help="speeds of the link, in tc's words")
    parser.add_argument("--sizes_mib", nargs="+", type=int, default=[1, 2, 4, 8], help="sizes of the tensor, MiB")
    parser.add_argument("--repeats", type=int, default=5, help="all-reduces of each size, of which the median counts")
    parser.add_argument("--rate", default=None, help="set for the ranks on a link: its speed")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day08"), help="folder for fit.json")
    return parser.parse_args()


def wire_share(size: int, device: torch.device) -> float:
    """Bytes that this host sends for one all-reduce, in units of what the ring sends: 2(N-1)/N of the tensor's."""
    tensor = torch.ones(size // 4, device=device)
    dist.barrier()
    before = sent_over_link()
    dist.all_reduce(tensor)
    dist.barrier()
    return (sent_over_link() - before) / (ring_share("all_reduce", dist.get_world_size()) * size)


def measure(args: argparse.Namespace) -> None:
    """What each rank does: all sizes, then the fit, then a row for each. Collective."""
    device = join_world()
    ranks = dist.get_world_size()
    sizes = [size for size in SIZES if size < MIB] + [size * MIB for size in args.sizes_mib]
    seconds = measure_all_reduce(sizes, device, args.repeats)
    cost = fit(seconds, ranks)
    table = Table(Path(args.run_dir) / "fit.json", COLUMNS, ranks=ranks)
    table.save(alpha_s=cost.alpha_s, bytes_per_s=cost.bytes_per_s)
    for size, spent in seconds.items():
        bus = ring_share("all_reduce", ranks) * size / spent
        row = {"case": f"{size // 1024:,} KiB", "ms": 1e3 * spent, "model_ms": 1e3 * cost.all_reduce_s(size, ranks)}
        table.add(row | {"bus_bytes_per_s": bus, "wire": wire_share(size, device) if args.rate else None})
    print0(f"alpha {1e3 * cost.alpha_s:.2f} ms | bandwidth {cost.bytes_per_s / 1e6:,.1f} MB/s | {ranks} ranks")
    dist.destroy_process_group()


def main() -> None:
    args = parse_args()
    if started_by_launcher():
        return measure(args)
    flags = ("--sizes_mib", *args.sizes_mib, "--repeats", args.repeats)
    found = run_on_link(args.rates, Path(args.run_dir), HERE / "labs/fit.py", *flags)
    write = partial(write_results, Path(args.run_dir) / "fit.json", this_command())
    table = [
        {
            "rate": rate,
            "nominal": rate_bytes_per_s(rate),
            "fitted": one["bytes_per_s"],
            "alpha_ms": 1e3 * one["alpha_s"],
        }
        | {"share": one["bytes_per_s"] / rate_bytes_per_s(rate), "wire": one["table"][-1]["wire"]}
        for rate, one in found.items()
    ]
    sizes = [{"rate": rate, **row} for rate, one in found.items() for row in one["table"]]
    write(table=table, sizes=sizes)
    for row in table:
        print0(f"{row['rate']}: {row['fitted'] / 1e6:.2f} of {row['nominal'] / 1e6:.2f} MB/s, {row['share']:.0%}")
    print0(f"table: {show_path(args.run_dir)}/fit.json")


if __name__ == "__main__":
    with clear_errors():
        main()
