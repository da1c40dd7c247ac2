"""What a rank holds: the bytes of its live tensors, by walking them. Works on CPU and GPU alike."""

import gc
import time
from collections.abc import Iterable

import torch
from torch._subclasses import FakeTensor


def live_tensors(device: torch.device) -> dict[int, torch.Tensor]:
    """Return {address of the storage: a tensor in it} of all tensors alive on `device` in this process.

    Call it between steps: what autograd saved for a backward pass that is still to come is not visible to Python.
    Their bytes are what arithmetic predicts, unlike a process' size (345 MiB of imports) or an allocator's figure.
    """
    gc.collect()
    # type() and not isinstance(): some lazy objects import their whole package when asked for their class.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors = [t for t in tensors if type(t) is not FakeTensor]  # the compiler's: shapes without storage
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]  # unseen until Python code asks for them
    tensors = [t for t in map(_local, tensors) if t.device.type == device.type and t.layout == torch.strided]
    return {t.untyped_storage().data_ptr(): t for t in tensors if t.untyped_storage().nbytes()}


def settled_tensors(device: torch.device, apart_s: float = 0.2, looks: int = 10) -> dict[int, torch.Tensor]:
    """`live_tensors` once two looks, `apart_s` seconds apart, find the same; after collectives.

    gloo's threads (CPU ranks) let go of a message a moment after it has arrived, later on a busy machine.
    """
    found = live_tensors(device)
    for _ in range(looks if device.type == "cpu" else 0):
        before = set(found)
        del found  # or this look would keep alive what is to go
        time.sleep(apart_s)
        found = live_tensors(device)
        if set(found) == before:
            break
    return found


def live_tensor_bytes(device: torch.device) -> int:
    """Return the bytes of all tensors alive on `device` in this process once settled, each storage counted once."""
    return sum(tensor.untyped_storage().nbytes() for tensor in settled_tensors(device).values())


def bytes_by_kind(tensors: Iterable[torch.Tensor], **kinds: Iterable[torch.Tensor]) -> dict[str, int]:
    """Add up the storages of `tensors`: {kind: bytes, ..., "other": the rest}, each storage to the first kind named.

    `bytes_by_kind(settled_tensors(device).values(), parameters=model.parameters())`, say.
    """
    owner, found = {}, dict.fromkeys([*kinds, "other"], 0)
    for kind, members in kinds.items():
        for tensor in map(_local, members):
            owner.setdefault(tensor.untyped_storage().data_ptr(), kind)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[owner.get(storage.data_ptr(), "other")] += storage.nbytes()
    return found


def bucket_tensors(zero) -> list[torch.Tensor]:
    """Gradient buckets of DeepSpeed's ZeRO optimizer: lists at stages 1 and 2, a tensor or None at stage 3 (0.19.8)."""
    buffers = [bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()]
    return [flat for buffer in buffers for flat in ([buffer] if torch.is_tensor(buffer) else buffer or [])]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor (FSDP2's parameters are such); a plain tensor is its own part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
