"""Day 12: the fastest single-GPU training step in plain PyTorch that we can write, for the labs to measure beside ours.

    from day12.torch_loop import build_torch     # returns train_step(batch) -> loss

Checked with torch 2.13.0. Source: https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html
"""

import torch

from day07.loops import make_train_step

ADAMW = {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}  # as in ds_config_gpt2.json


def build_torch(model: torch.nn.Module, compiled: bool):
    """Return train_step(batch) -> loss: bf16 autocast over fp32 weights, clipping, fused AdamW."""
    device_type = next(model.parameters()).device.type
    groups = [  # weight decay on matrices alone
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAMW, fused=True)
    if compiled:
        model.compile()

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(device_type, torch.bfloat16):
            return model(**batch).loss

    return make_train_step(forward, model, optimizer)
