"""Day 07: three ways to the same training step - DDP, FSDP2 (`fully_shard`) and DeepSpeed - for the labs to compare.

    from day07.loops import build_ddp, build_deepspeed, build_fsdp2     # each returns train_step(batch) -> loss

Checked with torch 2.13.0 and deepspeed 0.19.8.
Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

ADAMW = {"betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}  # as in the configs of this day


def build_ddp(model: torch.nn.Module, lr: float, bf16: bool):
    """Each rank holds everything in fp32; bf16 means autocast. Return (train_step(batch) -> loss, optimizer)."""
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **ADAMW)

    def forward(batch: dict) -> torch.Tensor:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=bf16):
            return wrapped(**batch).loss

    return make_train_step(forward, model, optimizer), optimizer


def blocks_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The transformer blocks of a GPT-2 or of a Llama, as `transformers` names them."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def build_fsdp2(model: torch.nn.Module, lr: float, bf16: bool):
    """Each rank holds 1/N of fp32 weights, gradients and states; a block is gathered (in bf16) while it computes."""
    device_type = next(model.parameters()).device.type
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if bf16 else MixedPrecisionPolicy()
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **ADAMW)
    return make_train_step(lambda batch: model(**batch).loss, model, optimizer), optimizer


def make_train_step(forward, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """Return train_step(batch) -> loss of plain PyTorch, clipped at 1.0. `forward(batch)` returns the loss."""

    def train_step(batch: dict) -> torch.Tensor:
        loss = forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return train_step


def build_deepspeed(model: torch.nn.Module, config: dict):
    """Return (train_step(batch) -> loss, engine)."""
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def train_step(batch: dict) -> torch.Tensor:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return train_step, engine
