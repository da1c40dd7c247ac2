"""The model: `transformers`' GPT-2 (day 02), or day 12's lean one with all that made it fast. Days 02 and 12.

Both end as the same `transformers` folder. `lean` initialises other weights than `transformers` does: another run.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from transformers import GPT2LMHeadModel

from capstone.config import Config
from common.model import build_model, get_preset
from day12.gpt import GPT, build_gpt, to_transformers
from day17.checkpoints import all_or_none, write_whole


def build(config: Config, vocab_size: int, eos_token_id: int) -> torch.nn.Module:
    """Fresh weights. Call `torch.manual_seed` first."""
    if config.model.code == "lean":
        model = build_gpt(config.model.preset, vocab_size)
        model.recompute = config.train.recompute
        return model
    model = build_model(config.model.preset, vocab_size, eos_token_id)
    if config.train.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The optimizer's groups. Day 12's for its lean model: LayerNorm's scales, its only vectors, do not decay."""
    parameters = list(model.parameters())
    if not isinstance(model, GPT):
        return [{"params": parameters}]
    matrices, vectors = ([p for p in parameters if (p.dim() == 1) == is_vector] for is_vector in (False, True))
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def flops_per_token(config: Config, model: torch.nn.Module) -> float:
    """Operations a token of one training step, by the formula of day 12."""
    shape = get_preset(config.model.preset)  # ds_numel: what a parameter has in all, under ZeRO-3
    num_params = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    multiplied = num_params - shape.block_size * shape.hidden  # the table of positions is looked up
    return 6 * multiplied + 12 * shape.num_layers * shape.hidden * shape.block_size


def speed_up(engine: deepspeed.DeepSpeedEngine) -> Callable[[], AbstractContextManager]:
    """Day 12's ladder for the lean model on a GPU; return the context for evaluation, whose shapes are not compiled."""
    model = engine.module
    if not isinstance(model, GPT) or engine.device.type == "cpu":
        return nullcontext
    model.narrow_stream, model.fused_loss = True, engine.device.type == "cuda"
    if model.fused_loss:
        torch.backends.cuda.enable_flash_sdp(False)  # cuDNN's attention is faster on Hopper
    engine.compile()
    return lambda: torch.compiler.set_stance("force_eager")


def as_transformers(model: torch.nn.Module, eos_token_id: int) -> GPT2LMHeadModel:
    return to_transformers(model, eos_token_id) if isinstance(model, GPT) else model


def save_model(config: Config, engine: deepspeed.DeepSpeedEngine, tokenizer, facts: dict[str, Any]) -> None:
    """The weights as a `transformers` folder, whole or not there, with what they were trained with. Collective.

    Under ZeRO-3 each parameter is made whole by itself and goes to rank 0's host memory: all at once would not fit
    where ZeRO-3 was needed.
    """
    final, weights = config.run_path / "model", {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if engine.global_rank == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    with all_or_none("saving the model", final.parent):
        if engine.global_rank == 0:
            model, partial = build(config, len(tokenizer), tokenizer.eos_token_id), final.with_name("partial_model")
            for name, parameter in model.named_parameters():
                parameter.data = weights.pop(name)
            shutil.rmtree(partial, ignore_errors=True)
            as_transformers(model, tokenizer.eos_token_id).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            write_whole(partial / "training.json", json.dumps(facts, indent=2))
            partial.rename(final)
