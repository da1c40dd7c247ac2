"""Day 23: the same LoRA step in plain PyTorch and peft, for the labs to measure beside DeepSpeed's.

    from day23.torch_loop import build_torch     # returns train_step(batch, number of answer tokens) -> loss

Checked with torch 2.13.0 and peft 0.21.2. Source: https://huggingface.co/docs/peft/task_guides/lora_based_methods
"""

import math
from collections.abc import Callable

import torch
from peft import PeftModel

# What build_torch takes from the JSON.
READS = ["optimizer.params", "scheduler.params.warmup_num_steps", "scheduler.params.warmup_min_ratio"]
READS += ["gradient_clipping"]


def warmup_cosine(total: int, warmup: int, least: float, floor: float = 1e-4) -> Callable[[int], float]:
    """DeepSpeed's WarmupCosineLR, linear, as a factor of the step: 0 in the first step, as there (0.19.8)."""

    def factor(step: int) -> float:
        if step <= warmup:
            return least + (1 - least) * (step - 1) / warmup if step else 0.0
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def build_torch(model: PeftModel, config: dict, steps: int, bf16: bool) -> Callable[[dict, float], torch.Tensor]:
    """Return train_step(batch, answers in it) -> loss: AdamW of the JSON on what is trained, clipping, the schedule."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device_type = trained[0].device.type
    kwargs = {key: value for key, value in config["optimizer"]["params"].items() if key != "torch_adam"}
    optimizer = torch.optim.AdamW(trained, **kwargs, fused=True)
    plan = config["scheduler"]["params"]
    factor = warmup_cosine(steps, plan["warmup_num_steps"], plan["warmup_min_ratio"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def train_step(batch: dict, num_answers: float) -> torch.Tensor:
        with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
            loss = model(**batch, num_items_in_batch=num_answers).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config["gradient_clipping"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.detach()

    return train_step
