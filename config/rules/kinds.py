"""Before the rules: is this a DeepSpeed config at all, a template, and who will read it?"""

import difflib
import json
import re

from config.rules.finding import Context, Finding, is_number, truthy, usable
from config.rules.names import ELSEWHERE, plain
from config.rules.reader import Quoteless
from config.rules.schema_file import kinds, schema, unwrap

MAX_BYTES = 1 << 20  # the largest config in DeepSpeed's own repository is 4 KiB


def words(text: str) -> set[str]:
    return set(text.split())


TRAINING_ARGUMENTS = words("""
    output_dir model_name_or_path learning_rate per_device_train_batch_size per_device_eval_batch_size
    num_train_epochs max_steps logging_steps save_steps eval_steps save_total_limit evaluation_strategy eval_strategy
    save_strategy logging_dir report_to lr_scheduler_type warmup_ratio warmup_steps overwrite_output_dir do_train
    do_eval dataset_name train_file dataset_path seed max_grad_norm weight_decay adam_beta1 adam_beta2 optim
    gradient_checkpointing remove_unused_columns dataloader_num_workers push_to_hub load_best_model_at_end
    max_seq_length tokenizer_name dataset deepspeed lora_r lora_alpha""")
OF_A_RUN = (
    words("""
    output_dir model_name_or_path per_device_train_batch_size num_train_epochs report_to evaluation_strategy
    eval_strategy save_strategy overwrite_output_dir do_train dataset_name train_file""")
)  # nobody adds them to a config
NEOX = words("""
    pipe-parallel-size model-parallel-size num-layers hidden-size num-attention-heads seq-length train-iters
    max-position-embeddings pos-emb no-weight-tying lr-decay-iters lr-decay-style data-path data-impl vocab-file
    merge-file checkpoint-activations partition-activations hidden-dropout attention-dropout eval-interval""")
# {keys that give a file away: what it is}
OTHER_FILES = (
    ({"architectures", "model_type", "hidden_size", "num_attention_heads", "vocab_size"}, 2, "a model's config.json"),
    ({"compute_environment", "deepspeed_config", "distributed_type", "fsdp_config", "num_processes"}, 2,
     "an Accelerate config; DeepSpeed's own config is another file, named in deepspeed_config_file"),
    ({"replace_with_kernel_inject", "kernel_inject", "max_out_tokens", "injection_policy", "checkpoint_dict"}, 1,
     "a config for deepspeed.init_inference(), which trains nothing"),
    ({"name", "version", "scripts", "dependencies", "devDependencies"}, 3, "a package.json"),
    ({"cells", "nbformat", "metadata"}, 2, "a notebook"),
)  # fmt: skip
PLACEHOLDER = re.compile(
    r"\$\{?\w+\}?|\{\{.*\}\}|\{%.*%\}|<[^<>]+>|%\(?\w+\)?[sd%]|@\w+@|__\w+__|\[\[.*\]\]|"
    r"[A-Z][A-Z0-9]*(_[A-Za-z0-9]+)*_?"
)
READERS = {"hf": "the Trainer or Accelerate", "trainer": "the Trainer", "accelerate": "Accelerate"}
NO_PLACEHOLDER = {"true", "false", "none", "null", "nan", "inf", "infinity", "yes", "no", "on", "off"}
UNQUOTED = re.compile(
    r"[:\[,]\s*(\$\{?\w+\}?|\{\{.*?\}\}|\{%.*?%\}|<\w+>|%\(?\w+\)?s|@\w+@|[A-Z][A-Z0-9_]{2,})\s*[,}\]\n]"
)


def as_text(source: bytes | str) -> str:
    """The text of a config. ValueError with one sentence for what cannot be one."""
    if isinstance(source, str):
        return source
    if len(source) > MAX_BYTES:
        raise ValueError(f"{len(source) / MAX_BYTES:.1f} MiB is no config: the largest in DeepSpeed itself has 4 KiB.")
    try:
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError("This is binary data, not a DeepSpeed config.")
    return text


def not_a_config(config: object) -> str | None:
    """One sentence when the JSON is plainly something else, or None."""
    if isinstance(config, list):
        return "This is a list; a DeepSpeed config is an object { ... }."
    if not isinstance(config, dict):
        return f"This is a single {type(config).__name__.lower().replace('quoteless', 'text')}, not a DeepSpeed config."
    if not config:
        return "This is empty: DeepSpeed needs at least a batch size."
    keys = [str(key) for key in config if key != "$schema"]
    root, removed = schema()["properties"], schema()["x-deepspeed"]["removed"][""]
    here = [k for k in keys if k in root or k in removed]
    sections = [k for k in here if isinstance(config.get(k), dict)]
    foreign = TRAINING_ARGUMENTS & set(keys)
    if len(NEOX & {k.replace("_", "-") for k in keys}) >= 3:
        return "This is a GPT-NeoX config: NeoX writes the DeepSpeed config from it, so check what it wrote."
    wrapped = next((k for k in ("deepspeed", "ds_config", "deepspeed_config") if isinstance(config.get(k), dict)), None)
    if wrapped and not sections and set(config[wrapped]) & set(root):
        return f"This holds a DeepSpeed config under the key {wrapped!r}: DeepSpeed wants it as a file of its own."
    if len(foreign) >= (2 if foreign & OF_A_RUN else 4) and len(foreign) > len(here):
        some = ", ".join([k for k in keys if k in foreign][:3])
        return f"This is a TrainingArguments file ({some}); the DeepSpeed config is what it names under 'deepspeed'."
    for names, least, what in OTHER_FILES:
        if len(names & set(keys)) >= max(least, len(sections)):
            return f"This is {what}."
    if here:
        return None
    known = {plain(name) for name in root}
    likely = [k for k in keys[:40] if plain(k) in known or difflib.get_close_matches(k.lower()[:60], root, 1, 0.8)]
    likely += [k for k in keys[:40] if k.lower() in ELSEWHERE and k.lower() not in ("name", "path")]
    if len(likely) * 2 < min(len(keys), 40):
        some = ", ".join(keys[:3])
        return f"This does not look like a DeepSpeed config: it has {some}, and no key that DeepSpeed reads."
    return None


def template(text: str) -> str | None:
    """One sentence for a file that cannot be parsed because its placeholders are still in it."""
    bare = re.sub(r'"(?:[^"\\\n]|\\.)*"(?=\s*:)', "", text)  # keys are no values
    found = [m for m in UNQUOTED.findall(bare) if m.lower() not in NO_PLACEHOLDER]
    return sentence_about(list(dict.fromkeys(found))) if found else None


def sentence_about(names: list[str]) -> str:
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"This is a template: {listed} {'is' if len(names) == 1 else 'are'} still to be filled in."


def is_placeholder(value: object, node: dict) -> bool:
    """Text where something is still to be filled in: bare, or quoted where no text can stand."""
    if not isinstance(value, str):
        return False
    word = value.rstrip(",").strip()
    if word.lower() in NO_PLACEHOLDER or not PLACEHOLDER.fullmatch(word):
        return False
    names = "string" in kinds(node) or ("anyOf" in node and not kinds(node))  # a word in capitals may be meant: SGD
    if word[0] in "${<%@_[":
        return len(word) > 1 and (isinstance(value, Quoteless) or not names or word[:2] == "{{")
    if isinstance(value, Quoteless):
        return "_" in word or not names
    return "_" in word and not names and bool(kinds(node))


def set_aside(c: Context) -> list[Finding]:
    """Take placeholders and numbers that no rule can compute with out of the config, and say so."""
    placeholders, found = [], []

    def walk(node, section, path):
        kept = {}
        for name, value in section.items():
            name = str(name)
            child = unwrap(node.get("properties", {}).get(name, {}))
            here = (*path, name)
            if isinstance(value, dict):
                kept[name] = walk(child, value, here)
            elif is_placeholder(value, child):
                placeholders.append((here, value))
            elif is_number(value) and not usable(value):
                found.extend(unusable(c, here, value))
                c.unfilled.add(".".join(here))
            elif isinstance(value, (list, tuple)) and not all(usable(v) for v in value if is_number(v)):
                found.extend(unusable(c, here, next(v for v in value if is_number(v) and not usable(v))))
                c.unfilled.add(".".join(here))
            else:
                kept[name] = list(value) if isinstance(value, tuple) else value
        return kept

    c.config = walk(schema(), c.config, ())
    c.unfilled |= {".".join(path) for path, _ in placeholders}
    if placeholders:
        names = list(dict.fromkeys(str(value).rstrip(",").strip() for _, value in placeholders))
        message = sentence_about(names)
        found.insert(0, c.error(".".join(placeholders[0][0]), message))
    return found


def unusable(c, path, value):
    """A number that is infinite, not a number, or larger than any counter."""
    dotted = ".".join(path)
    if dotted == "steps_per_print" and value == float("inf"):
        return  # Accelerate writes it, to keep DeepSpeed quiet
    if isinstance(value, float):
        what = "not a number" if value != value else "infinite (or beyond what a float holds)"
        yield c.error(dotted, f"The value is {what}: DeepSpeed crashes, or computes with it.", "Write a number.")
    else:
        message = f"An integer of {value.bit_length()} bits does not fit into the 64 that DeepSpeed and torch have."
        yield c.error(dotted, message, "Write a smaller number.")


def autos(config: object, path: tuple = ()):
    """Paths of all values that are "auto"."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from autos(value, (*path, str(name)))
    elif config == "auto":
        yield path


def filled_by_hugging_face(path: tuple) -> bool:
    node = schema()
    for name in path:
        node = unwrap(node.get("properties", {}).get(name, {}))
    return bool(node.get("x-hf-auto"))


def guess_mode(config: dict, name: str) -> tuple[str, tuple]:
    """(mode, the path of the "auto" that tells) for a config of which nobody said who reads it."""
    named = next((mode for mode in ("accelerate", "lightning", "trainer") if mode in name.lower()), None)
    tuning = config.get("autotuning")
    if isinstance(tuning, dict) and truthy(tuning.get("enabled")):
        trainer = "--per_device_train_batch_size" in str(tuning.get("arg_mappings"))
        return ("trainer", ("autotuning", "arg_mappings")) if trainer else ("deepspeed", ())
    found = next((path for path in autos(config) if filled_by_hugging_face(path)), ())
    if named == "lightning":
        return named, ()
    if found or name.endswith("_hf.json"):
        return ("accelerate" if "msamp" in config else named or "hf"), found
    return "deepspeed", ()


def strict_json(text: str) -> tuple[object, Finding | None]:
    """As transformers and Accelerate read it; the finding when they cannot."""
    try:
        return json.loads(text.removeprefix("\ufeff")), None  # keeps 2.0 a float, as they do
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        message = f"transformers and Accelerate read the file with json.load, which fails here ({error.args[0]})."
        fix = "No comments, trailing commas or unquoted text."
        return None, Finding("error", "", message, fix, line, "file/strict-json")
