"""Day 03, your turn: write a complete config from a description.

Fill in the TODO, then check yourself:

    deepspeed --num_accelerators 2 day03/exercise.py

It loads your config into an engine, reads back what DeepSpeed made of it, and follows the learning rate for 100
steps. The answer is in solution.py. Source: day03/notes.md, https://www.deepspeed.ai/docs/config-json/.
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import print0

# TODO: the config for this run. Global batch 64 on 2 ranks with micro-batches of 4. AdamW (torch_adam: true, so that
# nothing is compiled) with weight decay 0.01. The learning rate rises linearly from 0 to 0.001 over the first 10
# steps and falls linearly to 0 at step 100 (WarmupDecayLR). Gradients are clipped at norm 0.5. ZeRO stage 1.
# 写出这次训练的配置。2 个 rank 上全局批次 64，micro-batch 为 4。AdamW（torch_adam: true，这样什么也不用编译），权重衰
# 减 0.01。学习率在前 10 步从 0 线性升到 0.001，再线性下降，到第 100 步为 0（WarmupDecayLR）。梯度范数裁剪到 0.5。
# ZeRO-1。
CONFIG = {}


def check(config: dict) -> None:
    """Load `config`, train 100 steps, and compare what the engine says with the description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    join_world()
    if not config:
        raise UserError("not yet: TODO, CONFIG is empty. Start with train_micro_batch_size_per_gpu and an optimizer.")
    if "optimizer" not in config:
        raise UserError("not yet: CONFIG has no optimizer, so nothing would be trained.")
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    except Exception as error:  # whatever a config can do wrong
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"not yet: DeepSpeed refuses CONFIG: {type(error).__name__}: {reason}") from error

    def expect(what: str, got: object, want: object, key: str) -> None:
        if got != want:
            raise UserError(f"not yet: {what} is {got}, want {want}: look at {key}")

    expect("the micro-batch", engine.train_micro_batch_size_per_gpu(), 4, "train_micro_batch_size_per_gpu")
    expect("the global batch on 2 ranks", engine.train_batch_size() * 2 // engine.dp_world_size, 64, "accumulation")
    expect("the optimizer", type(engine.basic_optimizer).__name__, "AdamW", "optimizer.type")
    expect("the weight decay", engine.basic_optimizer.param_groups[0]["weight_decay"], 0.01, "optimizer.params")
    expect("gradient clipping", engine.gradient_clipping(), 0.5, "gradient_clipping")
    expect("the ZeRO stage", engine.zero_optimization_stage(), 1, "zero_optimization.stage")

    expect("the schedule", type(engine.lr_scheduler).__name__, "WarmupDecayLR", "scheduler.type")

    used = []  # the learning rate of each optimizer step
    while engine.global_steps < 100:
        if engine.is_gradient_accumulation_boundary():
            used.append(engine.get_lr()[0])
        engine.backward(engine(torch.ones(4, 8, device=engine.device)).square().mean())
        engine.step()
    for update in (1, 6, 11, 56, 99):  # counted from 0; DeepSpeed's schedules lag one update behind (see the notes)
        position = update - 1
        want = 0.001 * min(position / 10, (100 - position) / 90)
        if abs(used[update] - want) > 1e-6:
            got = f"update {update} used learning rate {used[update]:.6f}, want {want:.6f}"
            raise UserError(f"not yet: {got}: look at scheduler.params")
    print0("solved: the engine does what the description says")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(CONFIG)
