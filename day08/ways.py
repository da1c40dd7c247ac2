"""Day 08: one training step in five ways that differ in when, and how much, the ranks talk; for the labs to compare.

    from day08.ways import WAYS, build_step     # build_step("ddp", model) returns step(batch) -> loss

Checked with deepspeed 0.19.8 and torch 2.13.0. Source: day08/train.py, which shows each call; day08/ds_config*.json.
"""

from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from config.read import read_config

HERE = Path(__file__).resolve().parent
CONFIGS = {"zero0": "ds_config.json", "zero1": "ds_config_zero1.json", "zero2": "ds_config_zero2.json"}
WAYS = ("none", "hand", "ddp", *CONFIGS)
Step = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def build_step(way: str, model: torch.nn.Module, bucket_mib: int = 1) -> Step:
    """Return step(batch) -> loss for `model` on its device. Collective.

    none: each rank trains for itself. hand: all-reduces after backward, one a parameter. ddp: PyTorch's. zero0, zero1,
    zero2: DeepSpeed's stages. Buckets hold `bucket_mib` MiB of fp32 gradients (zero0's is never full: 500 million).
    """
    if way in CONFIGS:
        config = read_config(HERE / CONFIGS[way])
        config["zero_optimization"]["reduce_bucket_size"] = bucket_mib * 2**18  # elements
        return deepspeed_step(model, config)
    params = read_config(HERE / CONFIGS["zero0"])["optimizer"]["params"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=params["lr"], betas=params["betas"], weight_decay=params["weight_decay"]
    )
    wrapped = DistributedDataParallel(model, bucket_cap_mb=bucket_mib) if way == "ddp" else model

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = wrapped(**batch).loss
        loss.backward()
        for parameter in model.parameters() if way == "hand" else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def deepspeed_step(model: torch.nn.Module, config: dict) -> Step:
    """The same through DeepSpeed's engine, which is `step.engine`."""
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    step.engine = engine
    return step
