"""Day 08: the data does not divide by the ranks: what happens at the end of an epoch? Four ways on a tiny data set.

From the repository root, on two CPU processes or two GPUs (the lab itself uses the CPU and gloo):

    deepspeed --num_accelerators 2 day08/labs/uneven.py

Expect a row for each way: batches of each rank, sequences trained twice, sequences left out, and how the epoch ended.
Checked with torch 2.13.0. Source: https://docs.pytorch.org/tutorials/advanced/generic_join.html
"""

import argparse
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import join_world
from common.errors import clear_errors
from common.run_log import default_run_dir

MICRO_BATCH = 2
COLUMNS = {"batches": "batches:s", "twice": "twice:d", "left out": "left_out:d", "the epoch": "ended:s"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patience", type=float, default=5.0, help="seconds that a rank waits for the others")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day08"), help="folder for uneven.json")
    return parser.parse_args()


def batches_of(way: str, count: int) -> list[list[int]]:
    """The numbers of the sequences in this rank's batches, of `count` that there are."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if way in ("sampler", "drop_last"):  # DeepSpeed's `training_data=` uses the first
        sampler = DistributedSampler(range(count), shuffle=False, drop_last=way == "drop_last")
        return [batch.tolist() for batch in DataLoader(range(count), MICRO_BATCH, sampler=sampler, drop_last=False)]
    mine = list(range(rank, count, ranks))  # no sampler: as it comes
    return [mine[i : i + MICRO_BATCH] for i in range(0, len(mine), MICRO_BATCH)]


def epoch(ddp: DistributedDataParallel, batches: list[list[int]], joined: bool) -> str:
    """Train on the batches; return how it ended on this rank."""
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    with Join([ddp], enable=joined):
        for batch in batches:
            loss = ddp(torch.randn(len(batch), 4)).square().mean()
            try:
                loss.backward()
            except RuntimeError as error:
                return "timed out" if "imed out" in str(error) else str(error).splitlines()[0]
            optimizer.step()
            optimizer.zero_grad()
    return "complete"


def main() -> None:
    args = parse_args()
    join_world()
    ranks = dist.get_world_size()
    count = 4 * MICRO_BATCH * ranks + 1  # one more than can be shared
    table = Table(Path(args.run_dir) / "uneven.json", COLUMNS, ranks=ranks, sequences=count)
    for way in ("sampler", "drop_last", "Join", "as it comes"):
        # a group of its own: after a time-out it is of no more use
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.patience))
        ddp = DistributedDataParallel(torch.nn.Linear(4, 1), process_group=group)
        batches = batches_of(way, count)
        mine = (batches, epoch(ddp, batches, joined=way == "Join"))
        found = [None] * ranks
        dist.all_gather_object(found, mine, group=table.judges)
        trained = [number for batches, _ in found for batch in batches for number in batch]
        row = {"case": way, "batches": " ".join(str(len(batches)) for batches, _ in found)}
        row |= {"twice": len(trained) - len(set(trained)), "left_out": count - len(set(trained))}
        table.add(row | {"ended": next((end for _, end in found if end != "complete"), "complete")})
        del ddp
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
