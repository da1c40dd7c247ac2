"""Day 02, your turn: convert a training step with gradient accumulation to the DeepSpeed engine.

Fill in the two TODOs, then check yourself, on two ranks:

    deepspeed --num_accelerators 2 day02/exercise.py

It compares your weights with plain PyTorch's on the same batches, and says what is still wrong, or "solved".
The answers are in solution.py. Source: day02/notes.md.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
from torch.nn.functional import mse_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import print0

MICRO_BATCH, ACCUMULATION, STEPS = 4, 3, 2


def make_config(num_ranks: int) -> dict:
    """A DeepSpeed config: SGD with lr 0.1, no clipping, micro-batches of 4, 3 of them an optimizer step."""
    # TODO 1: batch keys, "gradient_clipping": 0.0 (DeepSpeed clips at 1.0 when you say nothing), "optimizer".
    # 写一份 DeepSpeed 配置：SGD，lr 0.1，不裁剪，micro-batch 为 4，3 个组成一个优化器步。要写批次的键、
    # "gradient_clipping": 0.0（不写时 DeepSpeed 按 1.0 裁剪）和 "optimizer"。
    raise NotImplementedError


def train_step(engine: deepspeed.DeepSpeedEngine, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """One optimizer step over `micro_batches`, a list of (inputs, targets), with loss mse_loss(engine(x), y).

    What plain PyTorch did here:
        for x, y in micro_batches:
            (mse_loss(model(x), y) / len(micro_batches)).backward()
        optimizer.step(); optimizer.zero_grad()
    """
    # TODO 2: forward, engine.backward and engine.step. How often is each called? Who divides the loss?
    # 对 micro_batches（(输入, 目标) 的列表）做一个优化器步，损失是 mse_loss(engine(x), y)。前向、engine.backward、
    # engine.step 各调用几次？损失由谁来除？
    raise NotImplementedError


def check(make_config: Callable, train_step: Callable) -> None:
    """Train a small linear model both ways; UserError says what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    join_world()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    reference = copy.deepcopy(model)
    data = torch.randn(STEPS, ACCUMULATION, world, MICRO_BATCH, 4)  # three inputs and a target; the same on every rank

    config = make_config(world)
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    except Exception as error:  # whatever a config can do wrong
        reason = str(error).splitlines() or [""]
        raise UserError(f"not yet: TODO 1, DeepSpeed refuses {config}: {type(error).__name__}: {reason[0]}") from error
    if engine.optimizer is None:
        raise UserError(f'not yet: TODO 1, no "optimizer" in {config}')
    batch = engine.train_batch_size()
    if batch != MICRO_BATCH * ACCUMULATION * world:
        want = f"{MICRO_BATCH} x {ACCUMULATION} x {world}"
        raise UserError(f"not yet: TODO 1, the global batch is {batch}, want {want}: micro-batch, accumulation, ranks")
    if engine.gradient_clipping():
        clipping = engine.gradient_clipping()
        raise UserError(f'not yet: TODO 1, gradients are clipped at {clipping}: "gradient_clipping": 0.0 stops that')
    settings = engine.basic_optimizer.param_groups[0]
    if type(engine.basic_optimizer) is not torch.optim.SGD or settings["lr"] != 0.1:
        raise UserError(
            f"not yet: TODO 1, the optimizer is {type(engine.basic_optimizer).__name__} with lr {settings['lr']},"
            " want SGD with lr 0.1"
        )
    for step in range(STEPS):
        batches = [block[rank].to(engine.device) for block in data[step]]
        train_step(engine, [(block[:, :3], block[:, 3:]) for block in batches])

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for block in data:
        optimizer.zero_grad()
        mse_loss(reference(block[..., :3]), block[..., 3:]).backward()  # the whole global batch at once
        optimizer.step()
    if engine.global_steps != STEPS:
        raise UserError(
            f"not yet: TODO 2, {engine.global_steps} optimizer steps were made, want {STEPS}: engine.step() counts"
            " micro-batches, so call it after every engine.backward()"
        )
    moved = torch.cat([p.detach().cpu().flatten() for p in engine.module.parameters()])
    want = torch.cat([p.detach().flatten() for p in reference.parameters()])
    if not torch.allclose(moved, want, atol=1e-6):
        raise UserError(
            f"not yet: TODO 2, the weights differ from plain PyTorch's by {(moved - want).abs().max():.1e}:"
            " engine.backward() already divides by the accumulation steps"
        )
    print0("solved: the same weights as plain PyTorch")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(make_config, train_step)
