"""Day 23: a LoRA adapter beside a frozen base: made, counted and saved, the same at every ZeRO stage.

    from day23.lora import add_lora, save_adapter     # day23/lora.py, with day22/pretrained.py

Checked with deepspeed 0.19.8 and peft 0.21.2. Source: https://huggingface.co/docs/peft/accelerate/deepspeed
"""

import importlib.util
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.errors import UserError
from day22.pretrained import locate, vocabulary_of


def add_lora(
    base: PreTrainedModel, rank: int, alpha: float, dropout: float = 0.0, targets=("all-linear",), **more: object
) -> PeftModel:
    """Freeze `base` and put y += alpha / r * B A x beside each target matrix. Seed first: A is drawn, B is zero.

    `more` goes to peft's LoraConfig: use_rslora, use_dora, modules_to_save. Of tied weights peft would train a copy at
    one end alone, so they are kept tied.
    """
    if rank < 1:
        raise UserError(f"--lora_rank {rank}: a bypass has at least rank 1")
    if alpha <= 0:
        raise UserError(f"--lora_alpha {alpha:g}: above 0, or the bypass counts nothing and never learns")
    if not 0 <= dropout < 1:
        raise UserError(f"--lora_dropout {dropout:g}: a share of the inputs, 0 to below 1")
    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    for target in set(targets) - {"all-linear"}:  # one of several that matches nothing is passed over by peft
        if not any(name == target or name.endswith(f".{target}") for name in names):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise UserError(f"--targets {target}: the model has no such matrix; it has {there}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if "all-linear" in targets else list(targets),  # all but the output layer
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.modules()),  # GPT-2 keeps its matrices transposed
        task_type="CAUSAL_LM",
        ensure_weight_tying=bool(more.get("modules_to_save")) and base.config.tie_word_embeddings,
        **more,
    )
    return get_peft_model(base, config)


def load_quantized(name: str, stage: int) -> PreTrainedModel:
    """The base in 4 bits of type NormalFloat, computed with in bf16; bitsandbytes holds the packed weights."""
    if not torch.cuda.is_available() or not importlib.util.find_spec("bitsandbytes"):
        raise UserError("--quantize needs an NVIDIA GPU and `pip install bitsandbytes`; leave it out for plain LoRA")
    if stage == 3:
        raise UserError("--quantize at stage 3: ZeRO would cut the packed weights; take stage 1 or 2, every rank whole")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    place = {"": get_accelerator().current_device_name()}
    base = AutoModelForCausalLM.from_pretrained(
        locate(name), quantization_config=four_bits, device_map=place, dtype=torch.bfloat16
    )
    base.config.use_cache = False
    return prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})


def numel(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole parameter; under ZeRO-3 the parameter itself is empty."""
    return getattr(parameter, "ds_numel", parameter.numel())


def held_bytes(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    """Bytes on this rank: weights, frozen and trained, and the optimizer's own copy of them and both moments."""
    own = {"frozen": 0, "trained": 0, "optimizer": 0}
    for parameter in engine.module.parameters():
        parts = {id(part): part for part in (parameter, getattr(parameter, "ds_tensor", parameter))}.values()
        size = sum(part.numel() * part.element_size() for part in parts)  # stage 3 keeps small ones whole besides
        own["trained" if parameter.requires_grad else "frozen"] += size
    for weight, state in engine.basic_optimizer.state.items():
        kept = [t for t in (weight, *state.values()) if torch.is_tensor(t)]
        own["optimizer"] += sum(t.numel() * t.element_size() for t in kept)
    return own


def save_adapter(model: PeftModel, base_name: str, folder: str | Path) -> None:
    """Write the adapter for `PeftModel.from_pretrained`, at every stage. Collective.

    At stage 3 every parameter is empty outside of its own forward pass: gathered first, or the file has shapes [0].
    Where tokens were added to the base its embedding is saved as well: nobody else has the new rows.
    """
    everything = list(model.named_parameters(remove_duplicate=False))  # peft asks for tied weights by both names
    kept = {name: p for name, p in everything if p.requires_grad}
    new_rows = model.get_input_embeddings().weight
    resized = model.config.get_text_config().vocab_size != vocabulary_of(base_name) and not new_rows.requires_grad
    if resized:  # and not trained, or it is among the trained ones anyway
        frozen = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
        kept |= {name: p for name, p in model.named_parameters() if id(p) in frozen}
    once = list({id(parameter): parameter for parameter in kept.values()}.values())
    with deepspeed.zero.GatheredParameters(once):  # before stage 3 this does nothing
        weights = {name: parameter.detach().cpu().clone() for name, parameter in kept.items()}
    if dist.get_rank() == 0:
        model.peft_config["default"].base_model_name_or_path = base_name
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=resized)
    dist.barrier()
