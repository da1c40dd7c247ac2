"""Day 21: replay - a recorded run's requests for memory, given to PyTorch's allocator by its rules, on any machine.

From the repository root, one process, no GPU:

    python day21/labs/replay.py
    python day21/labs/replay.py --trace day21/results/trace_longest_first_2cpu.gz
    python day21/labs/replay.py --record runs/trace.gz --steps 4

Expect a row for each setting of the allocator: the most that tensors took, the most that was reserved for them, the
most that lay unused when still more was asked for, and the smallest device on which the run would have ended well. Then
replay.json, curve.png, and segments.png: the segments just before the last one was asked for. --record trains on this
machine and writes a trace: sequences of varying lengths, in fp32, on the CPU. A snapshot of a GPU is one as well.
Checked with torch 2.13.0. Source: c10/cuda/CUDACachingAllocator.cpp; day21/allocator.py has its rules.
"""

import argparse
import gzip
import json
import random
import sys
import zlib
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import machine
from bench.table import Table
from common.errors import UserError, clear_errors
from common.plots import plt, save_plot
from common.run_log import default_run_dir, show_path
from day21.allocator import MIB, SMALL, CachingAllocator, OutOfMemory, replay
from day21.peak import memory_events
from day21.shapes import add_shape_flags, build_shape
from day21.snapshot import draw, events_of, load, save

COLUMNS = {
    "allocated MB": "peak_allocated:MB", "reserved MB": "peak_reserved:MB", "unused MB": "unused:MB",
    "of reserved": "unused_share:.1%", "device calls": "device_calls:d", "fits in MB": "fits_in:MB",
}  # fmt: skip
CASES = {
    "default": {}, "max_split_size 64": {"max_split": 64 * MIB}, "max_split_size 20": {"max_split": 20 * MIB},
    "expandable": {"expandable": True},
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default=str(HERE / "results/trace_2cpu.gz"), help="a trace, or a snapshot")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="settings to replay with")
    parser.add_argument("--record", help="train here, and write a trace into this file (.gz)")
    parser.add_argument("--longest_first", action="store_true", help="with --record: the longest sequences come first")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps (not micro-batches)")
    add_shape_flags(parser, layers=4, hidden=256, heads=4, seq_len=512, micro_batch=8, vocab=4096)
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day21"), help="folder for replay.json and plots")
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    """A small run with plain PyTorch: sequences as long as the longest of a batch, another length in each."""
    model, _ = build_shape(args, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    lengths = [random.Random(args.seed + n).randrange(args.seq_len // 8, args.seq_len) for n in range(args.steps)]
    for length in sorted(lengths, reverse=True) if args.longest_first else lengths:
        ids = torch.randint(args.vocab, (args.micro_batch, length))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def write_trace(events: list[tuple[int, int]], path: Path, command: str) -> None:
    """Addresses are reused, so a request is named by its number: its bytes; a release: minus the number, minus 1."""
    numbers, trace = {}, []
    for address, size in events:
        if size > 0:
            numbers[address] = len(trace)
            trace.append(size)
        elif address in numbers:
            trace.append(-numbers.pop(address) - 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command, **machine(), "events": trace}, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_trace(path: str) -> list[tuple]:
    """Events for `replay`, of a trace that this lab wrote or of a memory snapshot. UserError for anything else."""
    try:
        packed = path.endswith(".gz")
        found = json.loads(gzip.decompress(Path(path).read_bytes())) if packed else load(path)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"--trace {path}: {error}; a trace (--record), or a memory snapshot") from None
    if isinstance(found, dict) and "segments" in found:
        return events_of(found)
    sizes = found.get("events") if isinstance(found, dict) else None
    if not isinstance(sizes, list) or not all(isinstance(size, int) for size in sizes):
        raise UserError(f"--trace {path} has no list of `events`: take a trace (--record), or a memory snapshot")
    if max(sizes, default=0) <= SMALL:
        raise UserError(f"--trace {path} asks for nothing above 1 MiB: no large segment, no figure to show")
    return [
        ("alloc", number, size) if size > 0 else ("free", -size - 1, 0) for number, size in enumerate(found["events"])
    ]


def smallest_device(events: list[tuple], least: int, most: int, **settings) -> int:
    """The least capacity, to 1 MiB, with which the trace runs to its end; more than `least`, `most` at most."""
    low, high = least // MIB, -(-most // MIB)
    while low < high:
        middle = (low + high) // 2
        try:
            replay(events, CachingAllocator(middle * MIB or 1, **settings))
            high = middle
        except OutOfMemory:
            low = middle + 1
    return high * MIB


def measure(events: list[tuple], settings: dict) -> tuple[dict, list[tuple[int, int]]]:
    """The row of one setting, and the curve."""
    allocator = CachingAllocator(**settings)
    curve = replay(events, allocator)
    before = [(0, 0), *curve]  # as it was when more was asked for; the small pool, 2 MiB at a time, is left out
    grows = [n for n, (_, reserved) in enumerate(curve) if reserved > before[n][1] and events[n][2] > SMALL]
    unused, at = max((before[n][1] - before[n][0], n) for n in grows)
    row = {"peak_allocated": allocator.peak_allocated, "peak_reserved": allocator.peak_reserved, "unused": unused}
    row |= {"unused_share": unused / before[at][1], "at": at, "device_calls": allocator.device_calls}
    return row | {
        "fits_in": smallest_device(events, allocator.peak_allocated * 9 // 10, allocator.peak_reserved, **settings)
    }, curve


def wasted_at_peak(curve: list[tuple[int, int]]) -> int:
    """Where reserved memory was last raised: the event at which more was taken although some lay unused."""
    most = max(reserved for _, reserved in curve)
    return next(n for n, (_, reserved) in enumerate(curve) if reserved == most)


def plot(curves: dict[str, list[tuple[int, int]]], path: Path) -> None:
    """Allocated once, reserved for each setting."""
    figure, axes = plt.subplots(figsize=(9, 4))
    for number, (case, curve) in enumerate(curves.items()):
        if not number:
            axes.fill_between(range(len(curve)), [a / 1e6 for a, _ in curve], alpha=0.4, label="allocated")
        axes.plot([reserved / 1e6 for _, reserved in curve], label=f"reserved, {case}")
    axes.set_ylim(0, 1.5 * max(reserved for curve in curves.values() for _, reserved in curve) / 1e6)
    axes.set(xlabel="requests and releases", ylabel="MB", title="What tensors take, and what is reserved for them")
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    if args.record:
        events = memory_events(lambda: train(args))
        words = [f"--steps {args.steps}", "--longest_first" * args.longest_first]
        write_trace(events, Path(args.record), " ".join(["python day21/labs/replay.py --record", *filter(None, words)]))
        print(f"{len(events)} requests and releases: {show_path(args.record)}")
        args.trace = args.record
    events = read_trace(args.trace)
    table = Table(
        Path(args.run_dir) / "replay.json", COLUMNS, width=20, trace=Path(args.trace).name, events=len(events)
    )
    curves = {}
    for case in args.cases:
        with table.row(case, settings=CASES[case]) as row:
            found, curves[case] = measure(events, CASES[case])
            row |= found
    plot(curves, table.path.with_name("curve.png"))
    allocator = CachingAllocator()
    last = wasted_at_peak(curves.get("default") or replay(events, CachingAllocator()))
    replay(events[:last], allocator)  # just before one more segment had to be asked for
    asked, free = events[last][2], allocator.reserved - allocator.allocated
    unused = [block["size"] for s in allocator.segments() for block in s["blocks"] if block["state"] == "inactive"]
    largest = max(unused, default=0)
    room = f"{free / 1e6:.1f} MB free, the largest block {largest / 1e6:.1f}"
    print(f"default, event {last}: {asked / 1e6:.1f} MB asked, {room}")
    draw(allocator.segments(), table.path.with_name("segments.png"), "Just before another segment was asked for", 30)
    save({"segments": allocator.segments()}, table.path.with_name("segments.gz"))  # labs/snapshot.py reads it
    table.save(last_event=last, asked_bytes=asked, free_bytes=free, largest_free_bytes=largest)
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
