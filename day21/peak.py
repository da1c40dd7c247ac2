"""Day 21: the worst moment of a step, to the byte - by the profiler's memory events on CPU, by the allocator on a GPU.

    from day21.peak import memory_events, step_peak

A process' size says nothing here (345 MiB of imports, freed pages that stay); what PyTorch asked for does. On a CPU the
profiler notes each request and each release with its bytes: their running sum is the curve, its maximum the peak.
Checked with torch 2.13.0. Source: https://docs.pytorch.org/docs/stable/profiler.html (profile_memory)
"""

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def memory_events(step: Callable[[], object]) -> list[tuple[int, int]]:
    """Run `step` once on the CPU; return [(address, bytes), ...] in order, bytes negative where memory was freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    found, waiting = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:  # a tree: an event below each operator that asked for memory
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size))
    found.sort(key=lambda event: event[0])  # stable: events of the same nanosecond are seldom, and then in any order
    return [(address, size) for _, address, size in found]


def running_peak(events: list[tuple[int, int]]) -> int:
    """The largest running sum of the bytes of `events`, 0 at least."""
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return most


def step_peak(step: Callable[[], object], device: torch.device) -> int:
    """Bytes at the worst moment of `step()`, beyond what lay in memory before it. Call `step` once before, to warm up.

    On a GPU as the allocator counts them: each tensor rounded up to 512 bytes.
    """
    gc.collect()
    if device.type == "cpu":
        return running_peak(memory_events(step))
    accelerator = torch.get_device_module(device)
    accelerator.synchronize()
    accelerator.reset_peak_memory_stats()
    before = accelerator.memory_allocated()
    step()
    accelerator.synchronize()
    return accelerator.max_memory_allocated() - before
