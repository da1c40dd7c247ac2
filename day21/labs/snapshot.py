"""Day 21: snapshot - read a memory snapshot and draw it: segments, their blocks, and whose code holds the memory.

From the repository root, one process, no GPU:

    python day21/labs/snapshot.py
    python day21/labs/snapshot.py my_snapshot.pickle

Expect a row for the small pool, the large pool and all; the lines of code that hold the most; and what the simulator
(day21/allocator.py) makes of the snapshot's trace, beside what the GPU's allocator really reserved. Then snapshot.json
and segments.png. Without a file it reads the newest snapshot_*.gz in day21/results, if one is there; fragments.py
writes snapshots on a GPU.
Checked with torch 2.13.0. Source: https://docs.pytorch.org/docs/stable/torch_cuda_memory.html
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir
from day21.allocator import CachingAllocator, replay
from day21.snapshot import draw, events_of, load, owners, summary

COLUMNS = {
    "segments": "segments:d", "blocks": "blocks:d", "reserved MB": "reserved_bytes:MB",
    "in use MB": "allocated_bytes:MB",
    "free MB": "free_bytes:MB", "whole segments MB": "whole_bytes:MB", "largest free MB": "largest_free_bytes:MB",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="snapshot: .pickle, .json or .gz (default: the day's own)")
    parser.add_argument("--inside", default="", help="count only frames whose file name has this in it")
    parser.add_argument("--expandable", action="store_true", help="replay its trace with expandable segments")
    parser.add_argument("--run_dir", default=default_run_dir("day21"), help="folder for snapshot.json and segments.png")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    ours = sorted((HERE / "results").glob("snapshot_*.gz"))
    if not args.file and not ours:
        raise UserError("day21/results has no snapshot: name a file of torch.cuda.memory._dump_snapshot(path)")
    path = Path(args.file or ours[-1])
    snapshot = load(path)
    segments = snapshot["segments"]
    table = Table(Path(args.run_dir) / "snapshot.json", COLUMNS, width=10, snapshot=path.name)
    for row in summary(segments):
        table.add(row)
    holders = owners(segments, args.inside)
    print("held by:" if holders else "nothing is in use")
    for place, size in holders[:10]:
        print(f"{size / 1e6:12.2f} MB  {place}")
    table.save(holders=[{"place": place, "bytes": size} for place, size in holders])
    if any(snapshot.get("device_traces", [])):
        allocator = CachingAllocator(expandable=args.expandable)
        replay(events_of(snapshot), allocator)
        really = sum(segment["total_size"] for segment in segments)
        print(
            f"reserved at the end: {really / 1e6:.2f} MB on the GPU, {allocator.reserved / 1e6:.2f} MB by the simulator"
        )
        table.save(reserved_bytes=really, simulated_bytes=allocator.reserved, simulated_peak=allocator.peak_reserved)
    draw(segments, table.path.with_name("segments.png"), f"Segments of {path.name}")
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
