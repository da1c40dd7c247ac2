"""Day 13: do the ranks still agree? Weights, random state, rate and step by hash; batches differ. A module.

    from day13.desync import check
    for line in check(engine, batch):     # [] when all is well. Collective; some bytes a tensor, whatever its size
        print0(line)

At ZeRO-3 a rank has parts of its own of the weights: there is nothing to compare, and they cannot drift apart.
Checked with deepspeed 0.19.8. Source: torch.distributed's broadcast of the first weights, deepspeed/runtime/engine.py.
"""

import hashlib
import random

import numpy as np
import torch
import torch.distributed as dist


def fingerprint(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits of a tensor's bytes and shape: one bit changed, another fingerprint."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes() + str(tuple(tensor.shape)).encode(), digest_size=8).hexdigest()


def state(engine, batch: dict[str, torch.Tensor]) -> dict[str, str]:
    """{what: fingerprint or value} of this rank, in the order in which a disagreement should be looked at."""
    others = {"numpy": np.random.get_state(), "python": random.getstate()}
    found = {"step": str(engine.global_steps), "learning rate": str(engine.get_lr())}
    found["random state of torch"] = fingerprint(torch.get_rng_state())
    for name, numbers in others.items():  # repr, for Python's own hash of None is another in each process
        found[f"random state of {name}"] = hashlib.blake2b(repr(numbers).encode(), digest_size=8).hexdigest()
    if engine.zero_optimization_stage() < 3:
        found |= {f"weight {name}": fingerprint(weight) for name, weight in engine.module.named_parameters()}
    found |= {f"buffer {name}": fingerprint(buffer) for name, buffer in engine.module.named_buffers()}
    found["batch"] = "".join(fingerprint(tensor) for tensor in batch.values())
    return found


def compare(states: list[dict[str, str]]) -> list[str]:
    """A line for each thing about which ranks disagree, or agree and must not: the batch. `states`: one a rank."""
    lines, weights = [], []
    for what in states[0]:
        values = [rank.get(what, "missing") for rank in states]
        if what == "batch":
            twins = [rank for rank, value in enumerate(values) if values.count(value) > 1]
            lines += [f"ranks {', '.join(map(str, twins))} read the same batch"] * bool(twins)
        elif len(set(values)) > 1:
            if what.startswith("weight "):
                weights.append(what.removeprefix("weight "))
            else:
                lines.append(
                    f"{what} differs: " + ", ".join(f"rank {rank} {value}" for rank, value in enumerate(values))
                )
    if weights:
        total = sum(what.startswith("weight ") for what in states[0])
        lines.append(f"{len(weights)} of {total} weights differ, the first is {weights[0]}")
    return lines


def check(engine, batch: dict[str, torch.Tensor]) -> list[str]:
    """What `compare` says of all ranks, on every rank. Collective."""
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, state(engine, batch))
    return compare(states)
