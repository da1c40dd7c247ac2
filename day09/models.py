"""Day 09: models - Llama, Qwen2 and Mixtral by size, with fresh weights, and one of them as a list for a pipeline.

    from day09.models import as_layers, build_model, next_token_loss

What day09/models.py builds are `transformers` models: AutoTP, AutoEP and Ulysses know their parts by name. GPT-2 is not
among them: its Conv1D is nothing that AutoTP cuts. Checked with transformers 5.20.
Source: transformers/models/{llama,qwen2,mixtral}/modeling_*.py
"""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from common.errors import UserError
from common.model import PRESETS, get_preset

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),  # the same with biases in q, k and v
    "mixtral": (MixtralConfig, MixtralForCausalLM),  # the MLP of each layer is four, and a router takes two of them
}
# For GPUs: the widths of Llama 3.2 1B and 3B, random weights.
LARGE = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8},
}


def shape_of(name: str) -> dict:
    """The fields of a `transformers` config for the size `name`: a preset of common/model.py, or 1b and 3b."""
    if name in LARGE:
        return {**LARGE[name], "intermediate_size": 8192, "max_position_embeddings": 4096}
    if name not in PRESETS:
        raise UserError(f"unknown size {name!r}; choose one of: {', '.join([*PRESETS, *LARGE])}")
    preset = get_preset(name)
    heads = {"num_attention_heads": preset.num_heads, "num_key_value_heads": preset.num_heads}
    size = {"hidden_size": preset.hidden, "num_hidden_layers": preset.num_layers, **heads}
    size["head_dim"] = preset.hidden // preset.num_heads  # Ulysses reads it, and Mixtral's own default is None
    return {**size, "intermediate_size": 3 * preset.hidden, "max_position_embeddings": preset.block_size}


def tokenizer_of(size: str) -> str:
    """Name of the tokenizer that goes with a size: the small ones have a small vocabulary."""
    return PRESETS[size].tokenizer if size in PRESETS else "gpt2"


def build_model(family: str, size: str, vocab_size: int, **changes: int) -> PreTrainedModel:
    """Build a model with fresh weights; `changes` are fields of its config. Call `torch.manual_seed` first.

    Input and output embedding are not tied. `model(input_ids=ids, labels=ids).loss` is the mean next-token
    cross-entropy in nats.
    """
    if family not in FAMILIES:
        raise UserError(f"unknown family {family!r}; choose one of: {', '.join(FAMILIES)}")
    config_class, model_class = FAMILIES[family]
    shape = {"vocab_size": vocab_size, **shape_of(size), "tie_word_embeddings": False, "use_cache": False}
    if family == "mixtral":
        shape |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = model_class(config_class(**(shape | changes)))
    model.loss_type = "ForCausalLM"
    return model


class _Layer(torch.nn.Module):
    """A decoder layer that needs nothing but the hidden states (B, T, H): what passes from stage to stage."""

    def __init__(self, layer: torch.nn.Module, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return self.layer(hidden, attention_mask=None, position_embeddings=self.rotary(hidden, places))


def as_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model as a list for `PipelineModule`: embedding, decoder layers, norm with output layer."""
    inner = model.model
    layers = [_Layer(layer, inner.rotary_emb) for layer in inner.layers]
    return [inner.embed_tokens, *layers, torch.nn.Sequential(inner.norm, model.lm_head)]


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each token's logits (B, T, V) with the next token of `labels` (B, T)."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
