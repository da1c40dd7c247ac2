"""Day 21: read a memory snapshot of PyTorch's CUDA allocator - what fills each segment, who asked, what happened.

    from day21.snapshot import draw, events_of, load, owners, summary

    snapshot = load("snapshot.pickle")          # of torch.cuda.memory._dump_snapshot(), or the smaller .gz
    print(summary(snapshot["segments"]))

A snapshot has `segments` (what cudaMalloc returned, cut into blocks) and `device_traces` (each request and release
since `_record_memory_history()`, with the Python stack of the request). A pickle may run code when it is loaded; this
reader takes plain values only. The simulator's `segments()` have the same form.
Checked with torch 2.13.0. Source: https://docs.pytorch.org/docs/stable/torch_cuda_memory.html
"""

import gzip
import io
import json
import pickle
import zlib
from collections import Counter
from pathlib import Path

from common.errors import UserError
from common.plots import plt, save_plot

FACTS = {"blocks", "segment_type", "total_size"}  # of each segment, what this module reads
COLOURS = {"active_allocated": "tab:blue", "active_awaiting_free": "tab:orange", "inactive": "lightgray"}


class PlainValues(pickle.Unpickler):
    """Lists, dicts, texts and numbers; a pickle that wants anything else is refused."""

    def find_class(self, module: str, name: str) -> type:
        raise UserError(f"the snapshot wants to load {module}.{name}: it is no plain snapshot, and may run code")


def load(path: str | Path) -> dict:
    """Read a snapshot: .pickle as PyTorch writes it, .json or .gz as `save` does. UserError when it is none."""
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        snapshot = PlainValues(io.BytesIO(raw)).load() if path.suffix == ".pickle" else json.loads(raw)
    except (OSError, EOFError, ValueError, zlib.error, pickle.UnpicklingError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: no snapshot ({error}); write one with torch.cuda.memory._dump_snapshot") from error
    if not isinstance(snapshot, dict) or "segments" not in snapshot:
        raise UserError(f"{path} has no `segments`: write one with torch.cuda.memory._dump_snapshot(path)")
    segments = snapshot["segments"]
    whole = isinstance(segments, list) and all(isinstance(s, dict) and s.keys() >= FACTS for s in segments)
    if not whole:
        raise UserError(f"{path}: a segment lacks one of {', '.join(sorted(FACTS))}; take torch's own, unchanged")
    return snapshot


def save(snapshot: dict, path: str | Path, frames: int = 3) -> None:
    """Write what this module reads of a snapshot as JSON in a .gz, with the `frames` innermost Python frames."""

    def shorten(entry: dict) -> dict:
        kept = [f for f in entry.get("frames", []) if f["filename"].endswith(".py")][:frames]
        short = [{**f, "filename": "/".join(Path(f["filename"]).parts[-3:])} for f in kept]
        keys = ("action", "addr", "address", "size", "requested_size", "state", "device_free")
        return {key: entry[key] for key in keys if key in entry} | ({"frames": short} if short else {})

    facts = ("address", "total_size", "allocated_size", "active_size", "segment_type", "is_expandable")
    segments = [
        {key: segment[key] for key in facts if key in segment} | {"blocks": [*map(shorten, segment["blocks"])]}
        for segment in snapshot["segments"]
    ]
    traces = [[shorten(entry | {"frames": []}) for entry in trace] for trace in snapshot.get("device_traces", [])]
    text = json.dumps({"segments": segments, "device_traces": traces}, separators=(",", ":"))
    Path(path).write_bytes(gzip.compress(text.encode(), mtime=0))


def summary(segments: list[dict]) -> list[dict]:
    """One row a pool and one for all: segments, reserved, allocated, free within segments, largest free block (bytes).

    `whole`: bytes of segments that nobody uses, which empty_cache() would return; the rest of `free` is fragments.
    """
    rows = []
    for case in ("small", "large", "all"):
        pool = [s for s in segments if case in ("all", s["segment_type"])]
        blocks = [block for segment in pool for block in segment["blocks"]]
        unused = [block["size"] for block in blocks if block["state"] == "inactive"]
        row = {"case": case, "segments": len(pool), "reserved_bytes": sum(s["total_size"] for s in pool)}
        row["allocated_bytes"] = sum(block["size"] for block in blocks if block["state"] == "active_allocated")
        row |= {"free_bytes": sum(unused), "largest_free_bytes": max(unused, default=0), "blocks": len(blocks)}
        row["whole_bytes"] = sum(s["total_size"] for s in pool if all(b["state"] == "inactive" for b in s["blocks"]))
        rows.append(row)
    return rows


def owners(segments: list[dict], inside: str = "") -> list[tuple[str, int]]:
    """Bytes in use by the innermost frame whose file has `inside` in its name, the most first.

    Without recorded history all of it is "unknown"; so is what was allocated before the recording began.
    """
    found = Counter()
    for block in (block for segment in segments for block in segment["blocks"]):
        if block["state"] == "active_allocated":
            frames = [f for f in block.get("frames", []) if inside in f["filename"] and f["filename"].endswith(".py")]
            frame = frames[0] if frames else None
            place = f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}" if frame else "unknown"
            found[place] += block["size"]
    return found.most_common()


def events_of(snapshot: dict, device: int = 0) -> list[tuple]:
    """The trace of one device as `day21.allocator.replay` takes it. UserError when no history was recorded."""
    traces = snapshot.get("device_traces", [])
    if len(traces) <= device or not traces[device]:
        raise UserError("the snapshot has no trace: call torch.cuda.memory._record_memory_history() before the steps")
    actions = {"alloc": "alloc", "free_completed": "free"}
    kept = [entry for entry in traces[device] if entry["action"] in actions]
    return [(actions[entry["action"]], entry["addr"], entry["size"]) for entry in kept]


def draw(segments: list[dict], path: str | Path, title: str, most: int = 40) -> None:
    """Draw the `most` largest segments as bars of blocks: in use, or free. `path`: a .png."""
    shown = sorted(segments, key=lambda segment: -segment["total_size"])[:most]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.22 * len(shown)))
    labels = {}
    for row, segment in enumerate(shown):
        start = segment["blocks"][0]["address"] if segment["blocks"] else 0
        for block in segment["blocks"]:
            span = [((block["address"] - start) / 2**20, block["size"] / 2**20)]
            bar = axes.broken_barh(span, (row - 0.4, 0.8), color=COLOURS[block["state"]], edgecolor="white", lw=0.4)
            labels.setdefault(block["state"], bar)
    for state, bar in labels.items():
        bar.set_label({"active_allocated": "in use", "inactive": "free"}.get(state, "waits for another stream"))
    left_out = f"; the largest {most} of {len(segments)}" if len(segments) > most else ""
    axes.set(xlabel="MiB from the start of the segment", ylabel="segment", title=title + left_out, yticks=[])
    axes.invert_yaxis()
    save_plot(figure, axes, path)
