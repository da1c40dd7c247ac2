"""Look into one step: record it with PyTorch's profiler, and add up what device and host did of it.

    events = trace_step(lambda: train_step(batch), Path("step.json"))
    busy_ms = union_ms(event for event in events if event.get("cat") == "kernel")

The file opens in https://ui.perfetto.dev. Checked with torch 2.13.0.
Source: https://docs.pytorch.org/docs/stable/profiler.html; the Trace Event Format of Chrome
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from torch.profiler import ProfilerActivity, profile

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events on a GPU


def trace_step(step: Callable[[], object], path: Path, repeats: int = 1) -> list[dict]:
    """Run `step` under the profiler, write the Chrome trace to `path`, return its events that have a duration (in us).

    On a GPU only the GPU and the calls of its runtime are recorded: recording each operator would slow the host.
    With several repeats the host can run ahead in the middle ones, as it does in training.
    """
    on_cpu = get_accelerator().device_name() == "cpu"
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            step()
        get_accelerator().synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
    return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def union_ms(events: Iterable[dict]) -> float:
    """Milliseconds in which at least one of the events was going on."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e3


def ms_by_kind(events: Iterable[dict], kinds: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Milliseconds of the events' own durations, by the first kind of which a word is in the name, else "other"."""
    spent = dict.fromkeys([*kinds, "other"], 0.0)
    for event in events:
        name = event["name"].lower()
        kind = next((kind for kind, words in kinds.items() if any(word in name for word in words)), "other")
        spent[kind] += event["dur"] / 1e3
    return spent


def longest_ms(events: Iterable[dict], count: int = 16) -> dict[str, float]:
    """The `count` names that took most milliseconds, longest first."""
    spent: dict[str, float] = {}
    for event in events:
        spent[event["name"][:70]] = spent.get(event["name"][:70], 0.0) + event["dur"] / 1e3
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:count])
