"""Day 12: a lean GPT-2 that keeps a GPU busy: the model that train.py and the other scripts of this day train.

    from day12.gpt import build_gpt, parameter_groups

What it leaves out of `transformers`' GPT-2, and why it is faster: no biases (as nanoGPT), Linear instead of Conv1D,
attention in one fused kernel, a vocabulary padded to a multiple of 128 (odd sizes miss the tensor cores).
Source: Radford et al. 2019 (GPT-2); https://github.com/karpathy/nanoGPT, model.py; PaLM, arXiv:2204.02311, appendix B.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from common.model import Preset, get_preset


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on a LayerNorm of the stream and added to it: (B, T, H) -> same."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden, bias=False), nn.LayerNorm(hidden, bias=False)
        self.attn_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.attn_proj = nn.Linear(hidden, hidden, bias=False)
        self.mlp_fc = nn.Linear(hidden, 4 * hidden, bias=False)
        self.mlp_proj = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, H / heads)
            for part in self.attn_qkv(self.ln_1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_proj(F.gelu(self.mlp_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 of `preset`'s shape. `vocab_size` is the tokenizer's; the embedding's is the next multiple of 128."""

    def __init__(self, preset: Preset, vocab_size: int) -> None:
        super().__init__()
        self.preset, self.vocab_size = preset, vocab_size
        self.recompute = False  # keep only each block's input, and compute the block again in the backward pass
        self.loss_chunks = 1  # more: this many parts of the logits one after the other, each computed again in backward
        self.fused_loss = False  # loss.py's kernel: needs CUDA
        self.narrow_stream = False  # under autocast: keep the stream between blocks in 16 bits as well
        self.wte = nn.Embedding(math.ceil(vocab_size / 128) * 128, preset.hidden)
        self.wpe = nn.Embedding(preset.block_size, preset.hidden)
        self.h = nn.ModuleList(Block(preset.hidden, preset.num_heads) for _ in range(preset.num_layers))
        self.ln_f = nn.LayerNorm(preset.hidden, bias=False)
        for name, parameter in self.named_parameters():  # GPT-2's: 0.02, and less where 2L layers add to the stream
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * preset.num_layers) if "proj" in name else 1))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> CausalLMOutput:
        """Ids (B, T) -> logits (B, T, V); with `labels` (B, T), which it shifts, the mean loss in nats instead."""
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        if self.narrow_stream and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        x = self.ln_f(x)
        if labels is None:
            return CausalLMOutput(logits=F.linear(x, self.wte.weight)[..., : self.vocab_size])
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # the last position has nothing to predict
        if self.fused_loss:
            from day12.loss import linear_cross_entropy  # here, because it needs Triton

            loss = linear_cross_entropy(x.flatten(0, 1), self.wte.weight, targets, self.vocab_size)
        elif self.loss_chunks == 1:
            loss = self._loss(x.flatten(0, 1), targets)
        else:
            parts = zip(x.flatten(0, 1).chunk(self.loss_chunks), targets.chunk(self.loss_chunks), strict=True)
            loss = sum(checkpoint(self._loss, part, target, use_reentrant=False) for part, target in parts)
        return CausalLMOutput(loss=loss / (labels.numel() - len(labels)))

    def _loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, self.wte.weight)[:, : self.vocab_size]  # ids that pad the vocabulary do not exist
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    @property
    def num_params(self) -> int:
        """Parameters with the vocabulary's padding, the tied embedding once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Operations a token of one training step: 6 a weight that multiplies, 12 L H T for attention: PaLM, app. B."""
        multiplied = self.num_params - self.wpe.weight.numel()
        return 6 * multiplied + 12 * self.preset.num_layers * self.preset.hidden * seq_len


def build_gpt(name: str, vocab_size: int) -> GPT:
    """Build the preset `name` with fresh weights. Call `torch.manual_seed` first."""
    return GPT(get_preset(name), vocab_size)


def to_transformers(model: GPT, eos_token_id: int) -> GPT2LMHeadModel:
    """The same weights as a `transformers` GPT-2, for `generate` and `save_pretrained`: its biases are zero."""
    preset = model.preset
    shape = {"n_layer": preset.num_layers, "n_head": preset.num_heads, "n_embd": preset.hidden}
    tokens = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id, "vocab_size": model.vocab_size}
    whole = GPT2LMHeadModel(GPT2Config(n_positions=preset.block_size, **shape, **tokens))
    whole.loss_type = "ForCausalLM"  # `transformers` does not derive it from this class's name, and warns
    names = {"attn_qkv": "attn.c_attn", "attn_proj": "attn.c_proj", "mlp_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}
    weights = {name: torch.zeros_like(tensor) for name, tensor in whole.state_dict().items()}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "c_" in name:
            tensor = tensor.T  # Conv1D keeps (in, out)
        weights[f"transformer.{name}"] = tensor[: model.vocab_size] if name == "wte.weight" else tensor
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    whole.load_state_dict(weights)
    return whole.eval()


def parameter_groups(model: torch.nn.Module) -> list[dict]:
    """AdamW's groups: matrices decay as the JSON says. LayerNorm's scales do not: they belong at 1, not at 0."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
