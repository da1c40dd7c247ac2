"""Day 03, the answer. Run it like the exercise: deepspeed --num_accelerators 2 day03/solution.py. Source: notes.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day03.exercise import check, clear_errors

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "weight_decay": 0.01, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": 100,
            "warmup_num_steps": 10,
            "warmup_min_lr": 0.0,
            "warmup_max_lr": 0.001,
            "warmup_type": "linear",  # the default, "log", rises steeply at first
        },
    },
    "zero_optimization": {"stage": 1},
}

if __name__ == "__main__":
    with clear_errors():
        check(CONFIG)
