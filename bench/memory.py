"""Measure and limit the memory of a rank: what autograd keeps, peaks, a limit on CPU and GPU, and freeing an engine.

    with saved_for_backward(model.parameters()) as saved:
        loss = engine(**batch).loss
    print(sum(saved.values()))                # bytes that the backward pass will need, by precision

Checked with deepspeed 0.19.8 and torch 2.13.0.
Source: https://docs.pytorch.org/docs/stable/autograd.html#saved-tensors-default-hooks; man 2 getrlimit, man 3 mallopt
"""

import ctypes
import gc
import os
import re
import resource
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from bench.held import live_tensors

NO_ROOM = re.compile(r"can't allocate memory|out of memory|Cannot allocate memory|bad_alloc|can't start new thread")


@contextmanager
def saved_for_backward(parameters: Iterable[torch.Tensor]) -> Iterator[dict[torch.dtype, int]]:
    """Count what autograd keeps of the forward passes within: {dtype: bytes}, complete when the block has ended.

    Each storage counts once. `parameters` lie in memory anyway and are left out; under ZeRO-3 they are looked up at
    the end, when they are gathered or not as they were.
    """
    kept: dict[int, tuple[torch.dtype, int]] = {}
    found: dict[torch.dtype, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = tensor.dtype, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    for dtype, size in kept.values():
        found[dtype] = found.get(dtype, 0) + size


def free(device: torch.device, keep: Collection[int]) -> None:
    """Empty what a case made on `device`: `engine.destroy()` leaves the tensors of stage 3 alive (0.19.8).

    `keep`: what was there before and is to stay, `live_tensors(device)` taken before the case. (Python objects from
    before a `gc.freeze()` stay as well.)
    """
    gc.collect()
    for address, tensor in live_tensors(device).items():
        if address not in keep and tensor.untyped_storage().resizable():
            tensor.untyped_storage().resize_(0)
    get_accelerator().empty_cache()


def status_bytes(name: str) -> int:
    """A figure of this process from Linux: VmData (private memory), VmRSS (in RAM), VmHWM (most so far), RssAnon."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def limit_memory(limit: int | None, device: torch.device) -> int:
    """Let this rank take `limit` bytes more from now on (None: all there is), and count its peak anew.

    Return the bytes that it holds already, which `peak_bytes` takes off. The limit is PyTorch's on a GPU, where a
    share of the card is the unit, and Linux's on a CPU, for private memory.
    """
    if device.type == "cpu":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**16)  # glibc: each tensor over 64 KiB its own mapping, given back when freed
        libc.malloc_trim(0)  # and the holes left by earlier ones are given back now: a tensor that fits one counts too
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + limit if limit else hard, hard))
        return status_bytes("VmRSS")
    get_accelerator().reset_peak_memory_stats()
    held = get_accelerator().memory_allocated()
    share = min(1.0, (held + limit) / get_accelerator().total_memory()) if limit else 1.0
    torch.get_device_module(device).set_per_process_memory_fraction(share, device)
    return held


def peak_bytes(device: torch.device, held: int = 0) -> int:
    """The most bytes that this rank has held since `limit_memory` returned `held`, less those."""
    most = status_bytes("VmHWM") if device.type == "cpu" else get_accelerator().max_memory_allocated()
    return most - held


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, in the words of PyTorch on GPUs, on CPUs, or of Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(NO_ROOM.search(str(error)))


@contextmanager
def out_of_memory_ends() -> Iterator[None]:
    """When memory runs out within: one line, `no memory: ...`, and this process ends at once.

    The other ranks wait for it in vain, and whoever started them ends them. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        sys.stdout.write(f"no memory: rank {os.environ['RANK']}: {what}\n")
        sys.stdout.flush()
        os._exit(1)
