"""GPT-2 models by name, built on `transformers`, so that checkpoints are interchangeable with Hugging Face."""

from dataclasses import dataclass

from transformers import GPT2Config, GPT2LMHeadModel

from common.errors import UserError


@dataclass(frozen=True)
class Preset:
    """Shape of a GPT-2: L layers, A heads, H hidden, T = block_size tokens of context; and its tokenizer."""

    num_layers: int
    num_heads: int
    hidden: int
    block_size: int = 1024
    tokenizer: str = "gpt2"


# The gpt2* rows are those of Radford et al. 2019, table 2 (parameter counts include the tied embedding).
PRESETS = {
    "tiny": Preset(2, 4, 128, block_size=128, tokenizer="bpe4096"),  # 0.94M: seconds on a CPU
    "tiny-zh": Preset(2, 4, 128, block_size=128, tokenizer="zh4096"),  # the same, for --corpus song_ci
    "mini": Preset(4, 8, 256, block_size=256, tokenizer="bpe4096"),  # 4.3M: minutes on a CPU
    "gpt2": Preset(12, 12, 768),  # 124M
    "gpt2-medium": Preset(24, 16, 1024),  # 355M
    "gpt2-large": Preset(36, 20, 1280),  # 774M
    "gpt2-xl": Preset(48, 25, 1600),  # 1.56B
    "gpt-8b": Preset(40, 32, 4096),  # 8.26B: the width of GPT-3 6.7B (Brown et al. 2020, table 2.1), 8 layers more
    "gpt-13b": Preset(40, 40, 5120),  # 12.9B: that of GPT-3 13B
}


def get_preset(name: str) -> Preset:
    """Return the preset called `name`; UserError lists the names there are."""
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]


def build_model(name: str, vocab_size: int, eos_token_id: int = 0) -> GPT2LMHeadModel:
    """Build the preset `name` with fresh weights, for `vocab_size` token ids. Call `torch.manual_seed` first.

    No dropout: two runs on the same batches then agree to rounding, which is what the tests compare.
    `model(input_ids=ids, labels=ids).loss` is the mean next-token cross-entropy in nats (the model shifts labels).
    """
    preset = get_preset(name)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=preset.block_size,
        n_layer=preset.num_layers,
        n_head=preset.num_heads,
        n_embd=preset.hidden,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        use_cache=False,  # keys and values of past tokens: for generation, useless in training
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # `transformers` does not derive it from this class's name, and warns
    return model
