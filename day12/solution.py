"""Day 12, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day12/solution.py. Source: notes.md."""

import sys
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day12.exercise import Preset, check, clear_errors


def flops_per_token(preset: Preset, padded_vocabulary: int) -> int:
    layer = 12 * preset.hidden**2  # 3 + 1 + 4 + 4
    weights = preset.num_layers * layer + padded_vocabulary * preset.hidden
    return 6 * weights + 12 * preset.num_layers * preset.hidden * preset.block_size


def mfu(rows: list[dict]) -> float:
    setup = next(row for row in rows if "flops_per_token" in row)
    tokens_per_s = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row][1:]
    return median(tokens_per_s) * setup["flops_per_token"] / (setup["peak_flops"] * setup["ranks"])


def parameter_groups(model: torch.nn.Module) -> list[dict]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


if __name__ == "__main__":
    with clear_errors():
        check(flops_per_token, mfu, parameter_groups)
