"""Which model is planned for: a preset, a config.json, a name on the Hub, or only a number of parameters.

    from config.models import named_model

    named_model("qwen2.5-7b"), named_model("./my_model"), named_model("Qwen/Qwen2.5-7B")

Nothing here needs torch; only for a kind of model that it does not know it asks `transformers` to count the parameters.
"""

import json
import os
import queue
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from config.memory import RUN, count_parameters, parameter_sizes
from config.presets import GPT2, PRESETS, find

# Shapes to assume when only --params is known: GPT-3's (Brown et al. 2020, table 2.1) and OPT's 30B and 66B.
SHAPES = [
    (125e6, 12, 768, 12), (350e6, 24, 1024, 16), (760e6, 24, 1536, 16), (1.3e9, 24, 2048, 32), (2.7e9, 32, 2560, 32),
    (6.7e9, 32, 4096, 32), (13e9, 40, 5120, 40), (30e9, 48, 7168, 56), (66e9, 64, 9216, 72), (175e9, 96, 12288, 96),
]  # fmt: skip
LLAMAS = ("llama", "mistral", "qwen", "qwen2", "qwen3")  # model_type of a config.json that is read as a Llama
HUB_SECONDS = 5  # to fetch a few kilobytes, in all


@dataclass(frozen=True)
class Model:
    """What the prediction needs to know: the shape, and the size of each parameter in the model's order."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    sizes: tuple[int, ...]
    family: str = "llama"  # "gpt2": LayerNorm, GELU; "llama": RMSNorm, gated MLP, and so Qwen and Mistral
    intermediate: int | None = None  # width of the MLP; None: 4h for GPT-2, 8h/3 for Llama
    kv_heads: int | None = None  # None: as many as heads
    fused_gelu: bool = False  # gelu_pytorch_tanh instead of GPT-2's gelu_new, which is written in Python
    attention: str = "sdpa"  # "eager" keeps the attention matrix
    head_dim: int | None = None  # None: hidden / heads
    positions: int = 0  # learned ones, of GPT-2
    tied: bool = False  # GPT-2's head always is
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def num_params(self) -> int:
        return sum(self.sizes)

    @property
    def mlp(self) -> int:
        """Width of the MLP."""
        return self.intermediate or (4 * self.hidden if self.family == "gpt2" else 8 * self.hidden // 3)

    def shape(self) -> dict:
        """Its part of a run (config.memory.RUN). What the shape does not explain of Ψ counts to the embedding."""
        shape = {
            "family": self.family, "layers": self.layers, "hidden": self.hidden, "heads": self.heads,
            "kv_heads": self.kv_heads or self.heads, "head_dim": self.head_dim or self.hidden // self.heads,
            "intermediate": self.mlp, "vocab": self.vocab, "positions": self.positions,
            "tied": int(self.tied or self.family == "gpt2"), "qkv_bias": int(self.qkv_bias),
            "qk_norm": int(self.qk_norm), "fused_gelu": int(self.fused_gelu), "attention": self.attention,
        }  # fmt: skip
        return {**shape, "extra": self.num_params - count_parameters({**RUN, **shape})}


def _counted(model: Model) -> Model:
    """The same with the sizes that its shape has."""
    sizes = tuple(parameter_sizes({**RUN, **model.shape(), "extra": 0}))
    return Model(**{**vars(model), "sizes": sizes})


def gpt2_model(name: str) -> Model:
    """GPT-2 with tied embeddings: Ψ = Vh + Th + L(12h² + 13h) + 2h, T the number of positions."""
    layers, h, heads, positions, vocab = GPT2[name]
    return _counted(Model(name, layers, h, heads, vocab, (), "gpt2", positions=positions, tied=True))


def assumed_model(num_params: int, layers=None, hidden=None, heads=None, vocab=None) -> Model:
    """A decoder of `num_params` parameters, its head tied: of the given shape, else of the nearest published one.

    Its MLP is as wide as makes a Llama of that shape so large.
    """
    _, near_layers, near_hidden, near_heads = min(SHAPES, key=lambda shape: abs(shape[0] / num_params - 1))
    layers, h, heads, vocab = layers or near_layers, hidden or near_hidden, heads or near_heads, vocab or 32000
    mlp = ((num_params - vocab * h - h) // layers - 4 * h * h - 2 * h) // (3 * h)
    if mlp < 1:
        raise UserError(
            f"{num_params:,} parameters leave nothing for the MLPs of {layers} layers once the {vocab:,} × {h:,} "
            "embedding and attention are counted: give --layers, --hidden and --vocab that belong together"
        )
    name = "shape of the nearest published model where not given"
    model = _counted(Model(name, layers, h, heads, vocab, (), intermediate=mlp, head_dim=h // heads, tied=True))
    first, *rest = model.sizes
    return Model(**{**vars(model), "sizes": (first + num_params - model.num_params, *rest)})  # rounding


def config_model(config: dict, name: str) -> Model:
    """The model that a config.json describes. Raises UserError where a number is missing, or for experts."""
    config = config.get("text_config") or config  # a model of pictures and text: the part that reads text
    kind = config.get("model_type")
    if experts := next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)), 0):
        raise UserError(f"{name} is a mixture of experts ({experts}: {config[experts]}), which the plan does not know")
    if kind == "gpt2":
        needed = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
        layers, hidden, heads, vocab, positions = (_number(config, key, name) for key in needed)
        fused = config.get("activation_function", "gelu_new") != "gelu_new"
        model = Model(name, layers, hidden, heads, vocab, (), "gpt2", config.get("n_inner"), fused_gelu=fused)
        return _counted(Model(**{**vars(model), "positions": positions, "tied": True}))
    if kind not in LLAMAS:
        return _counted_by_transformers(config, name)
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")
    layers, hidden, heads, vocab, mlp = (_number(config, key, name) for key in needed)
    return _counted(
        Model(
            name, layers, hidden, heads, vocab, (), intermediate=mlp // 2 if kind == "qwen" else mlp,
            kv_heads=config.get("num_key_value_heads"), head_dim=config.get("head_dim"),
            tied=bool(config.get("tie_word_embeddings", False)), qk_norm=kind == "qwen3",
            qkv_bias=kind in ("qwen", "qwen2") or bool(config.get("attention_bias")),
        )
    )  # fmt: skip


def _number(config: dict, key: str, name: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"the config of {name} has {key} {value!r}: the plan needs a whole number above 0 there")
    return value


def _counted_by_transformers(config: dict, name: str) -> Model:
    """For another kind of model: built without memory to count its parameters, then treated as a Llama."""
    known = f"the plan reads {', '.join(['gpt2', *LLAMAS])} itself"
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise UserError(f"{name}: model_type {config.get('model_type')!r}; {known}, others with transformers") from None
    try:
        built = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built)
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: {known}, and transformers makes no model of its config ({reason})") from None
    sizes = tuple(parameter.numel() for parameter in model.parameters())
    return Model(
        name, built.num_hidden_layers, built.hidden_size, built.num_attention_heads, built.vocab_size, sizes,
        intermediate=getattr(built, "intermediate_size", None), kv_heads=getattr(built, "num_key_value_heads", None),
        tied=bool(built.tie_word_embeddings),
    )  # fmt: skip


def named_model(name: str) -> Model:
    """The model of `--model`: a preset, a folder or its config.json, or org/name on the Hub."""
    if name.lower() in GPT2:
        return gpt2_model(name.lower())
    if preset := find(name):
        return config_model(preset, name)
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if path.is_file():
        return config_model(_parse(path.read_text(encoding="utf-8"), str(path)), name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(".json"):
        return config_model(_parse(_from_hub(name), f"the config.json of {name}"), name)
    raise UserError(
        f"unknown model {name!r}: neither one of {', '.join([*GPT2, *PRESETS])}, nor a folder with a config.json, "
        "nor org/name on the Hub"
    )


def _parse(text: str, where: str) -> dict:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{where} holds no object")
    return config


def _from_hub(name: str) -> str:
    """The text of a model's config.json: from the local cache, else in at most HUB_SECONDS from the Hub.

    `transformers` would try again and again for 45 s where there is no network.
    """
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    cached = sorted((home / "hub" / f"models--{name.replace('/', '--')}").glob("snapshots/*/config.json"))
    if cached:
        return cached[-1].read_text(encoding="utf-8")
    instead = "give the path of its config.json, or --params with --layers, --hidden, --heads and --vocab"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise UserError(f"{name} is no preset, and HF_HUB_OFFLINE forbids to ask the Hub: {instead}")
    answer = queue.SimpleQueue()

    def fetch() -> None:
        url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{name}/resolve/main/config.json"
        try:
            with urllib.request.urlopen(url, timeout=HUB_SECONDS) as page:
                answer.put(page.read().decode())
        except (OSError, ValueError) as error:
            answer.put(error)

    # in a thread: a timeout of urlopen counts for each of a host's addresses, and not for its name
    threading.Thread(target=fetch, daemon=True).start()
    try:
        got = answer.get(timeout=HUB_SECONDS)
    except queue.Empty:
        got = TimeoutError(f"no answer in {HUB_SECONDS} s")
    if isinstance(got, urllib.error.HTTPError) and got.code in (401, 403, 404):
        raise UserError(f"the Hub shows no config.json of {name} to everybody (HTTP {got.code}): {instead}")
    if isinstance(got, Exception):
        raise UserError(f"{name} is no preset, and the Hub is not reachable ({got}): {instead}")
    return got


def parse_count(text: str) -> int:
    """7e9, 7B, 7b, 350M, 1.3e9, 124_000_000 -> a number of parameters."""
    match = re.fullmatch(r"([\d.]+(?:e\+?\d+)?)([kmbt]?)", text.strip().lower().replace("_", "").replace(",", ""))
    try:
        count = int(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2]])
    except (TypeError, ValueError, OverflowError):  # no such form; two points; 1e400
        count = 0
    if count < 1:
        raise UserError(f"cannot read {text!r} as a number of parameters: write 7e9, 7B or 350M")
    return count
