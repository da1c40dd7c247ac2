"""Day 20: logger - DeepSpeed's comms logger beside nccl-tests: what it does not see, and which figures differ.

From the repository root, on four CPU processes or GPUs (two or more, an even number):

    deepspeed --num_accelerators 4 day20/labs/logger.py

Expect a row for each call: how many the logger counted, and its algbw and busbw divided by nccl-tests'. 1.00 would be
the same figure. Time cancels out: the logger's own latency is put into nccl-tests' formulas.
Checked with deepspeed 0.19.8. Source: deepspeed/utils/comms_logging.py (calc_bw_log), nccl-tests doc/PERFORMANCE.md.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.comm import comm

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir
from day20.bandwidth import bus_share

NUMEL = 2**18
COLUMNS = {
    "ranks": "ranks:d",
    "counted": "counted:d",
    "algbw ratio": "algbw_ratio:.2f",
    "busbw ratio": "busbw_ratio:.2f",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day20"), help="folder for logger.json")
    return parser.parse_args()


def compare(call: Callable[[], object], collective: str, size: int, ranks: int) -> dict:
    """Log one `call` of `collective` on S = `size` bytes among `ranks`; the logger's figures over nccl-tests'."""
    comm.configure(enabled=True, prof_all=True)
    comm.comms_logger.comms_dict.clear()
    call()
    logged = [entry for sizes in comm.comms_logger.comms_dict.values() for entry in sizes.values()]
    comm.configure(enabled=False)
    row = {"ranks": ranks, "counted": sum(entry[0] for entry in logged)}
    if not logged:
        return row | {"algbw_ratio": None, "busbw_ratio": None}
    _, (latency_ms, *_), (algbw_gbit, *_), (busbw_gbit, *_) = logged[0]
    algbw = size * 8 / (latency_ms * 1e-3) / 1e9
    return row | {
        "algbw_ratio": algbw_gbit / algbw,
        "busbw_ratio": busbw_gbit / (algbw * bus_share(collective, ranks)),
    }


def main() -> None:
    args = parse_args()
    device = join_world()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks % 2:
        raise UserError(f"{ranks} ranks do not make two groups: start it on 2, 4 or more")
    halves = [dist.new_group(list(range(first, first + ranks // 2))) for first in (0, ranks // 2)]
    half = halves[rank >= ranks // 2]
    whole, part = torch.ones(NUMEL, device=device), torch.ones(NUMEL // ranks, device=device)
    ds, size = deepspeed.comm, 4 * NUMEL
    calls = {
        "deepspeed.comm.all_reduce": (lambda: ds.all_reduce(whole), "all_reduce", ranks),
        "torch.distributed.all_reduce": (lambda: dist.all_reduce(whole), "all_reduce", ranks),
        "all_reduce, half the ranks": (lambda: ds.all_reduce(whole, group=half), "all_reduce", ranks // 2),
        "all_gather": (lambda: ds.all_gather_into_tensor(whole, part), "all_gather", ranks),
        "reduce_scatter": (lambda: ds.reduce_scatter_tensor(part, whole), "reduce_scatter", ranks),
        "all_to_all": (lambda: ds.all_to_all_single(torch.empty_like(whole), whole), "all_to_all", ranks),
    }
    if ranks == 2:
        del calls["all_reduce, half the ranks"]  # one rank alone sends nothing
    table = Table(Path(args.run_dir) / "logger.json", COLUMNS, width=30)
    for case, (call, collective, members) in calls.items():
        call()  # connections
        table.add({"case": case, **compare(call, collective, size, members)})
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
