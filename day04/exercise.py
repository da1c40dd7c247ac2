"""Day 04, your turn: repair five broken configs. DeepSpeed accepts three of them in silence and trains something else.

Edit CONFIGS below, then check yourself:

    deepspeed --num_accelerators 2 day04/exercise.py

It loads each config into an engine and compares what the engine does with what the comment asks for. The checker helps:
`python config/check.py FILE.json`. The answers are in solution.py. Source: day04/notes.md.
"""

import argparse
import os
import sys
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import print0

ADAMW = {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}}

# TODO: each entry has one mistake. The comment says what was meant.
# 每一份有一处错误，注释写明本意。
CONFIGS = {
    # gradients clipped at norm 0.5 / 梯度范数裁剪到 0.5
    "clipping": {"train_micro_batch_size_per_gpu": 4, "gradient_cliping": 0.5, "optimizer": ADAMW},
    # ZeRO stage 2
    "zero": {"train_micro_batch_size_per_gpu": 4, "stage": 2, "gradient_clipping": 0.5, "optimizer": ADAMW},
    # a learning rate that rises from 0 to 0.001 over 10 steps / 学习率在 10 步里从 0 升到 0.001
    "warm-up": {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "optimizer": ADAMW,
        "lr_scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.001, "warmup_num_steps": 10}},
    },
    # ZeRO stage 1
    "section": {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": ADAMW,
        "gradient_clipping": 0.5,
        "zero_optimization": 1,
    },
    # a global batch of 32 on two ranks, micro-batches of 4 / 两个 rank 上全局批次 32，micro-batch 为 4
    "batch": {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": ADAMW,
    },
}


def reading(name: str, engine: deepspeed.DeepSpeedEngine) -> object:
    """What the engine does about the thing that config `name` is about."""
    return {
        "clipping": engine.gradient_clipping(),
        "zero": engine.zero_optimization_stage(),
        "warm-up": engine.get_lr()[0],
        "section": engine.zero_optimization_stage(),
        "batch": engine.train_batch_size() // engine.dp_world_size,
    }[name]


MEANT = {"clipping": 0.5, "zero": 2, "warm-up": 0.0, "section": 1, "batch": 16}  # batch: sequences a rank


def check(configs: dict[str, dict]) -> None:
    """Load every config; UserError lists what each of them does instead of what was meant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    join_world()
    wrong = []
    for name, meant in MEANT.items():
        model = torch.nn.Linear(8, 8)
        try:
            engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=configs[name])
            got = reading(name, engine)
        except Exception as error:  # whatever a config can do wrong
            wrong.append(f"{name}: DeepSpeed refuses it ({' '.join(str(error).split())[:120] or repr(error)})")
            continue
        if got != meant:
            wrong.append(f"{name}: accepted in silence, but the engine has {got} and {meant} was meant")
        engine.destroy()
    if wrong:
        raise UserError(f"not yet: {len(wrong)} of {len(MEANT)} configs are wrong. " + "; ".join(wrong))
    print0(f"solved: all {len(MEANT)} configs do what was meant (on {os.environ['WORLD_SIZE']} ranks)")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(CONFIGS)
