"""Day 18: load checkpoints without running what is in them.

    from day18.loading import load_safely     # call it before engine.load_checkpoint or torch.load

Checked with deepspeed 0.19.8. Source: https://docs.pytorch.org/docs/stable/notes/serialization.html (weights_only).
"""

import os

import torch


def load_safely() -> None:
    """Let no checkpoint run code: DeepSpeed passes weights_only=False everywhere, this variable overrules it.

    The optimizer's files name a few of DeepSpeed's own classes. They are allowed, and nothing else is.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
