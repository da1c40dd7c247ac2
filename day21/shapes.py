"""Day 21: models of any shape for its labs - GPT-2, Llama, Qwen 2 from flags, random, and the plan's word for each.

    from day21.shapes import add_shape_flags, build_shape, random_ids

    add_shape_flags(parser, layers=16, hidden=256, heads=4, seq_len=256, micro_batch=2, vocab=512)  # the defaults
    model, shape = build_shape(args, device)     # a transformers model; config/plan.py's Model of it

`build_shape` and `random_ids` take these flags and --seed.

Checked with transformers 5.20. Source: config/plan.py (layer_bytes), which says what each shape keeps.
"""

import argparse

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from common.errors import UserError
from config.plan import Model


def add_shape_flags(
    parser: argparse.ArgumentParser, layers: int, hidden: int, heads: int, seq_len: int, micro_batch: int, vocab: int
) -> None:
    """Add the flags of `build_shape` to `parser`, with these defaults."""
    parser.add_argument("--family", choices=["gpt2", "llama"], default="gpt2", help="GPT-2's layers, or Llama's")
    parser.add_argument("--layers", type=int, default=layers, help="number of layers")
    parser.add_argument("--hidden", type=int, default=hidden, help="hidden size")
    parser.add_argument("--heads", type=int, default=heads, help="attention heads")
    parser.add_argument("--seq_len", type=int, default=seq_len, help="tokens a sequence")
    parser.add_argument("--micro_batch", type=int, default=micro_batch, help="sequences a rank and micro-step")
    parser.add_argument("--vocab", type=int, default=vocab, help="vocabulary size")
    parser.add_argument("--intermediate", type=int, help="width of the MLP (default: 4h in GPT-2, 8h/3 in Llama)")
    parser.add_argument("--kv_heads", type=int, help="Llama's heads of keys and values (default: as many as heads)")
    parser.add_argument("--bf16", action="store_true", help="weights and activations in bf16")


def build_shape(
    args: argparse.Namespace, device: torch.device | str, attention: str = "sdpa", fused_gelu: bool = False
) -> tuple[PreTrainedModel, Model]:
    """The model that the flags describe, with weights from --seed, and config/plan.py's Model of it. No dropout."""
    for name in ("layers", "hidden", "heads", "seq_len", "micro_batch", "vocab"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: take 1 or more")
    if args.hidden % args.heads:
        raise UserError(f"--hidden {args.hidden} cannot be cut into {args.heads} heads")
    torch.manual_seed(args.seed)
    same = {"vocab_size": args.vocab, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    same |= {"attn_implementation": attention, "dtype": torch.bfloat16 if args.bf16 else torch.float32}
    gpt2 = args.family == "gpt2"
    with torch.device(device):
        if gpt2:
            names = {"n_layer": args.layers, "n_embd": args.hidden, "n_head": args.heads, "n_positions": args.seq_len}
            names |= dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0) | {"n_inner": args.intermediate}
            gelu = "gelu_pytorch_tanh" if fused_gelu else "gelu_new"
            model = GPT2LMHeadModel(GPT2Config(**names, **same, activation_function=gelu))
        else:
            names = {"num_hidden_layers": args.layers, "hidden_size": args.hidden, "num_attention_heads": args.heads}
            names |= {"num_key_value_heads": args.kv_heads or args.heads, "max_position_embeddings": args.seq_len}
            names["intermediate_size"] = args.intermediate or args.hidden * 8 // 3
            names["tie_word_embeddings"] = tied = getattr(args, "tied", False)
            kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
            config, built = kinds[args.family]
            model = built(config(**names, **same))
    model = model.to(same["dtype"]).train()
    model.loss_type = "ForCausalLM"  # `transformers` does not derive it from this class's name, and warns
    sizes = tuple(parameter.numel() for parameter in model.parameters())
    shape = Model(
        args.family, args.layers, args.hidden, args.heads, args.vocab, sizes, "gpt2" if gpt2 else "llama",
        intermediate=args.intermediate, kv_heads=args.kv_heads, fused_gelu=fused_gelu, attention=attention,
        positions=args.seq_len if gpt2 else 0, tied=gpt2 or tied, qkv_bias=args.family == "qwen2",
    )  # fmt: skip
    return model, shape


def random_ids(args: argparse.Namespace, device: torch.device | str) -> torch.Tensor:
    """Ids of shape (micro_batch, seq_len): what memory holds does not depend on the text."""
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(args.vocab, (args.micro_batch, args.seq_len), generator=generator).to(device)
