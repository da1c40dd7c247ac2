"""Day 04, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day04/solution.py. Source: notes.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day04.exercise import ADAMW, check, clear_errors

BASE = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5, "optimizer": ADAMW}

CONFIGS = {
    "clipping": BASE,  # gradient_clipping has two p
    "zero": BASE | {"zero_optimization": {"stage": 2}},  # stage belongs into its section
    "warm-up": BASE  # the section is called scheduler
    | {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.001, "warmup_num_steps": 10}}},
    "section": BASE | {"zero_optimization": {"stage": 1}},  # a section is an object, not a number
    "batch": BASE | {"gradient_accumulation_steps": 4},  # 32 = 4 x 4 x 2: leave train_batch_size to DeepSpeed
}

if __name__ == "__main__":
    with clear_errors():
        check(CONFIGS)
