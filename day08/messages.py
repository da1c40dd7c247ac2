"""Day 08: which messages a training step sends, and whether it sent them while the backward pass still ran.

    from day08.messages import messages_of, summary

    messages, loss = messages_of(lambda: train_step(batch))
    print(summary(messages))                # 4 messages, 3 of them while backward ran | 937,472 elements

PyTorch's profiler sees them all, also those of DDP, which DeepSpeed's communication log does not know.
Checked with torch 2.13.0, gloo and NCCL. Source: https://docs.pytorch.org/docs/stable/profiler.html
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")
BACKENDS = ("gloo:", "nccl:", "hccl:", "xccl:")  # what a collective is called by its backend, "gloo:all_reduce"


@dataclass(frozen=True)
class Message:
    """A collective of one step: its name, the elements of its tensor, and whether backward was still computing."""

    name: str
    elements: int
    in_backward: bool


def messages_of(step: Callable[[], T]) -> tuple[list[Message], T]:
    """Run `step` under the profiler; return its collectives in order, and what it returned. It runs slower so."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        result = step()
    events = trace.events()
    computing = [event.time_range.end for event in events if event.name.startswith("autograd::engine")]
    sent = [event for event in events if event.name.startswith(BACKENDS)]
    found = []
    for event in sorted(sent, key=lambda event: event.time_range.start):
        elements = sum(prod(shape) for shape in event.input_shapes or [] if shape)
        found.append(Message(event.name, elements, event.time_range.start < max(computing, default=0)))
    return found, result


def summary(messages: list[Message]) -> str:
    """One line: how many, how many while backward ran, and how much."""
    early = sum(message.in_backward for message in messages)
    elements = sum(message.elements for message in messages)
    return f"{len(messages)} messages, {early} of them while backward ran | {elements:,} elements"
