"""Day 02, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day02/solution.py. Source: notes.md."""

import sys
from pathlib import Path

import deepspeed
import torch
from torch.nn.functional import mse_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day02.exercise import ACCUMULATION, MICRO_BATCH, check, clear_errors


def make_config(num_ranks: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }


def train_step(engine: deepspeed.DeepSpeedEngine, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for x, y in micro_batches:
        engine.backward(mse_loss(engine(x), y))
        engine.step()


if __name__ == "__main__":
    with clear_errors():
        check(make_config, train_step)
