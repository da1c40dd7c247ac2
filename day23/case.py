"""Day 23: case - the engine of one case of the labs that set full tuning beside LoRA, compare.py and choose.py.

    from day23.case import CONFIGS, build_engine     # day23/case.py

Checked with deepspeed 0.19.8 and peft 0.21.2. Source: deepspeed/runtime/engine.py, day 22's and this day's JSON
"""

import argparse
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers.integrations import HfDeepSpeedConfig

from config.read import read_config
from day22.pretrained import load_model
from day23.lora import add_lora

HERE = Path(__file__).resolve().parent
CONFIGS = {"full": HERE.parent / "day22/ds_config.json", "lora": HERE / "ds_config.json"}


def build_engine(kind: str, lr: float, steps: int, args: argparse.Namespace, **lora) -> deepspeed.DeepSpeedEngine:
    """Of `kind` "full" or "lora" (then `lora` goes to add_lora), with this peak rate and number of steps. Collective.

    args: pretrained, stage, fp32 and seed, the labs' flags.
    """
    config = read_config(CONFIGS[kind])
    config["zero_optimization"] |= {"stage": args.stage}
    config["optimizer"]["params"]["lr"] = lr
    config["scheduler"]["params"]["total_num_steps"] = steps
    config["bf16"] = {"enabled": not args.fp32}
    if get_accelerator().device_name() != "cpu":
        config["optimizer"]["params"].pop("torch_adam", None)  # FusedAdam, compiled on first use
    alive = HfDeepSpeedConfig(config)  # noqa: F841 - as in train.py
    model = load_model(args.pretrained, torch.float32 if args.fp32 else torch.bfloat16)
    torch.manual_seed(args.seed)
    if kind == "lora":
        model = add_lora(model, **lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]
