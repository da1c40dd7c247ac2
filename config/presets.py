"""Shapes of public models, for a plan without a network: what a model's config.json says, as far as memory asks.

    from config.presets import PRESETS, find

    find("meta-llama/Llama-3.1-8B")     # or "llama-3.1-8b"

Source: the config.json in each model's repository on huggingface.co, named beside it; GPT-2: Radford et al. 2019.
A test counts the parameters of each and compares with what its page on huggingface.co says.
"""

LLAMA, QWEN1, QWEN2, QWEN3, MISTRAL = "llama", "qwen", "qwen2", "qwen3", "mistral"

# name: (repository, model_type, layers, hidden, heads, key-value heads, MLP, vocabulary, head tied, parameters)
_TABLE = {
    "tinyllama-1.1b": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", LLAMA, 22, 2048, 32, 4, 5632, 32000, 0, 1_100_048_384),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", LLAMA, 30, 576, 9, 3, 1536, 49152, 1, 134_515_008),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", LLAMA, 24, 2048, 32, 32, 8192, 49152, 1, 1_711_376_384),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", LLAMA, 32, 4096, 32, 32, 11008, 32000, 0, 6_738_415_616),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", LLAMA, 40, 5120, 40, 40, 13824, 32000, 0, 13_015_864_320),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", LLAMA, 80, 8192, 64, 8, 28672, 32000, 0, 68_976_648_192),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", LLAMA, 32, 4096, 32, 8, 14336, 128256, 0, 8_030_261_248),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B", LLAMA, 80, 8192, 64, 8, 28672, 128256, 0, 70_553_706_496),
    "llama-3.1-405b": ("meta-llama/Llama-3.1-405B", LLAMA, 126, 16384, 128, 8, 53248, 128256, 0, 405_853_388_800),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", LLAMA, 16, 2048, 32, 8, 8192, 128256, 1, 1_235_814_400),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", LLAMA, 28, 3072, 24, 8, 8192, 128256, 1, 3_212_749_824),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", MISTRAL, 32, 4096, 32, 8, 14336, 32000, 0, 7_241_732_096),
    "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", MISTRAL, 32, 4096, 32, 8, 14336, 32768, 0, 7_248_023_552),
    "mistral-nemo-12b": (
        "mistralai/Mistral-Nemo-Base-2407", MISTRAL, 40, 5120, 32, 8, 14336, 131072, 0, 12_247_782_400,
    ),
    "qwen-1.8b": ("Qwen/Qwen-1_8B", QWEN1, 24, 2048, 16, 16, 5504, 151936, 0, 1_836_828_672),
    "qwen-7b": ("Qwen/Qwen-7B", QWEN1, 32, 4096, 32, 32, 11008, 151936, 0, 7_721_324_544),
    "qwen-14b": ("Qwen/Qwen-14B", QWEN1, 40, 5120, 40, 40, 13696, 152064, 0, 14_167_290_880),
    "qwen-72b": ("Qwen/Qwen-72B", QWEN1, 80, 8192, 64, 64, 24576, 152064, 0, 72_287_920_128),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", QWEN2, 24, 896, 14, 2, 4864, 151936, 1, 494_032_768),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", QWEN2, 28, 1536, 12, 2, 8960, 151936, 1, 1_543_714_304),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B", QWEN2, 36, 2048, 16, 2, 11008, 151936, 1, 3_085_938_688),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", QWEN2, 28, 3584, 28, 4, 18944, 152064, 0, 7_615_616_512),
    "qwen2.5-14b": ("Qwen/Qwen2.5-14B", QWEN2, 48, 5120, 40, 8, 13824, 152064, 0, 14_770_033_664),
    "qwen2.5-32b": ("Qwen/Qwen2.5-32B", QWEN2, 64, 5120, 40, 8, 27648, 152064, 0, 32_763_876_352),
    "qwen2.5-72b": ("Qwen/Qwen2.5-72B", QWEN2, 80, 8192, 64, 8, 29568, 152064, 0, 72_706_203_648),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", QWEN3, 28, 1024, 16, 8, 3072, 151936, 1, 596_049_920),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", QWEN3, 28, 2048, 16, 8, 6144, 151936, 1, 1_720_574_976),
    "qwen3-4b": ("Qwen/Qwen3-4B", QWEN3, 36, 2560, 32, 8, 9728, 151936, 1, 4_022_468_096),
    "qwen3-8b": ("Qwen/Qwen3-8B", QWEN3, 36, 4096, 32, 8, 12288, 151936, 0, 8_190_735_360),
    "qwen3-14b": ("Qwen/Qwen3-14B", QWEN3, 40, 5120, 40, 8, 17408, 151936, 0, 14_768_307_200),
    "qwen3-32b": ("Qwen/Qwen3-32B", QWEN3, 64, 5120, 64, 8, 25600, 151936, 0, 32_762_123_264),
}  # fmt: skip
HEAD_DIM = {QWEN3: 128, MISTRAL: 128}  # where it is not hidden / heads

# GPT-2: (layers, hidden, heads, positions, vocabulary); tiny and mini are the course's own (common/model.py), the last
# two GPT-3's shapes with GPT-2's vocabulary.
GPT2 = {
    "tiny": (2, 128, 4, 128, 4096), "tiny-zh": (2, 128, 4, 128, 4096), "mini": (4, 256, 8, 256, 4096),
    "gpt2": (12, 768, 12, 1024, 50257),
    "gpt2-medium": (24, 1024, 16, 1024, 50257), "gpt2-large": (36, 1280, 20, 1024, 50257),
    "gpt2-xl": (48, 1600, 25, 1024, 50257), "gpt-8b": (40, 4096, 32, 1024, 50257),
    "gpt-13b": (40, 5120, 40, 1024, 50257),
}  # fmt: skip


def _as_config(row: tuple) -> dict:
    """A row of the table under the names that config.json has."""
    _, model_type, layers, hidden, heads, kv_heads, mlp, vocab, tied, _ = row
    return {
        "model_type": model_type, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": HEAD_DIM.get(model_type, hidden // heads),
        "intermediate_size": mlp * (2 if model_type == QWEN1 else 1),  # Qwen 1 counts both halves
        "vocab_size": vocab, "tie_word_embeddings": bool(tied),
    }  # fmt: skip


PRESETS = {name: _as_config(row) for name, row in _TABLE.items()}
PUBLISHED = {name: row[-1] for name, row in _TABLE.items()}  # parameters, by the model's page
REPOSITORIES = {row[0].lower(): name for name, row in _TABLE.items()}


def find(name: str) -> dict | None:
    """The config of a preset or of its repository, whatever the case of the letters; None when it is not here."""
    name = name.lower()
    return PRESETS.get(REPOSITORIES.get(name, name))
