"""One typed config for the whole project: defaults < file < command line. From days 03, 04 (what a config must catch).

    python -m capstone.config capstone/configs/tiny.yaml train.steps=50

prints the resolved config. A wrong key is an error that names the nearest right one; a wrong value is one sentence.
Source: pydantic 2 (it comes with deepspeed), https://docs.pydantic.dev/latest/concepts/models/
"""

import argparse
import difflib
import hashlib
import json
import os
import re
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from common.errors import UserError, clear_errors
from common.model import PRESETS
from common.run_log import show_path
from config.check import check
from config.read import read_config

ROOT = Path(__file__).resolve().parents[1]
TINY = "capstone/configs/tiny.yaml"
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)  # a typo is an error; nothing changes after loading


class Data(Section):
    """What prepare.py reads and how; all but `folder` and `workers` decide what comes out."""

    sources: Annotated[list[str], Field(min_length=1)]  # files, folders, saved data sets, or hf:name[:config[:split]]
    folder: str = ""  # of the token shards; empty: RUN_DIR/data. Runs that share one name it
    text_key: str = "text"  # of JSON lines and data sets
    text_documents: Literal["file", "paragraph"] = "file"  # what one document of a .txt is
    encoding: str | None = None  # of text that is neither UTF-8 nor has a byte order mark: gb18030, cp1252, ...
    min_chars: Annotated[int, Field(ge=0)] = 200  # shorter documents are dropped
    min_letters: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of letters; below it a document is no text
    quality: Literal["none", "gopher"] = "none"  # rules for web text in English, by which more documents are dropped
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.8  # Jaccard similarity (of runs of 5 words) from which on
    decontaminate: list[str] = []  # evaluation texts, named as sources are, and held_out: what shares 13 words with one
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}  # of sources: how often training sees each document; else 1
    held_out_share: Share = 0.05  # of the documents
    chunk_mb: Annotated[float, Field(gt=0)] = 4.0  # of text (MB = 10^6 characters) that a worker has at a time
    shard_mb: Annotated[float, Field(gt=0)] = 64.0  # of text in a shard
    workers: Count = max(1, os.cpu_count() or 1)

    @field_validator("weights")
    @classmethod
    def of_sources(cls, weights: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        if unknown := [name for name in weights if name not in info.data.get("sources", [])]:
            raise ValueError(f"{unknown[0]!r} is none of data.sources")
        return weights


class Tokenizer(Section):
    name: str = "bpe4096"  # shipped in data/, a Hugging Face name, or a folder


class Model(Section):
    preset: Literal[tuple(PRESETS)] = "tiny"  # of common/model.py
    code: Literal["transformers", "lean"] = "transformers"  # lean: day 12's, fast on GPUs


class Train(Section):
    steps: Count = 300  # optimizer steps
    global_batch: Annotated[int, Field(ge=0)] = 0  # sequences a step, on any number of ranks; 0: what deepspeed says
    log_every: Count = 20
    eval_every: Count = 100  # optimizer steps between two held-out losses
    recompute: bool = False  # activation checkpointing: layers are computed again in the backward pass
    seed: Annotated[int, Field(ge=0)] = 0


class Checkpoint(Section):
    save_every: Count = 100  # optimizer steps between two checkpoints; the last step is saved as well
    keep_last: Count = 2  # and the one with the lowest held-out loss
    stop_at_nan: bool = True  # end at a loss, norm or weight that is not finite; false: go on, saving no such weights


class Monitor(Section):
    tensorboard: bool = True  # DeepSpeed's own writer, in RUN_DIR/tensorboard, with the loss
    port: Annotated[int, Field(ge=0, le=65000)] = 0  # rank r serves Prometheus metrics at port + r; 0: nobody does
    address: str = "127.0.0.1"  # to listen at; 0.0.0.0 where Prometheus runs on another machine
    memory_limit_gib: Annotated[float, Field(ge=0)] = 0  # of a rank; 0: the device's, on CPU the rank's share of RAM


class Evaluate(Section):
    """What evaluate.py measures on the held-out part."""

    max_blocks: Count = 512  # of the perplexity
    micro_batch: Count = 16  # sequences of a rank at a time
    items: Count = 200  # multiple choice
    choices: Annotated[int, Field(ge=2)] = 4
    context_tokens: Count = 64
    choice_tokens: Count = 32
    prompts: list[str] = ["The whale", "The people of the United States"]
    sample_tokens: Annotated[int, Field(ge=0)] = 40
    temperature: Annotated[float, Field(gt=0)] = 0.8


class Config(Section):
    """The whole project. Later days add sections; a section is a class above and a line here."""

    run_dir: str
    data: Data
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    monitor: Monitor = Monitor()
    deepspeed: dict[str, Any]  # handed to deepspeed.initialize; train.global_batch and monitor.tensorboard add to it
    evaluate: Evaluate = Evaluate()

    @property
    def run_path(self) -> Path:
        return ROOT / self.run_dir  # an absolute run_dir stays what it is

    @property
    def data_path(self) -> Path:
        return ROOT / self.data.folder if self.data.folder else self.run_path / "data"


def deepspeed_section(config: Config, ranks: int) -> dict[str, Any]:
    """A copy of the DeepSpeed section in which `ranks` ranks make up train.global_batch.

    The micro-batch of the section is the largest that fits in memory: it stays, or shrinks until the batch divides.
    """
    section, batch = deepcopy(config.deepspeed), config.train.global_batch
    if batch:
        largest = int(section.get("train_micro_batch_size_per_gpu", batch))
        micro = next((n for n in range(largest, 0, -1) if batch % (n * ranks) == 0), None)
        if micro is None:
            raise UserError(f"train.global_batch {batch} cannot be shared out among {ranks} ranks: take a multiple")
        section.pop("train_batch_size", None)
        section |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": batch // (micro * ranks)}
    return section


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in JSON (in YAML 1.1, which PyYAML reads, a string), and keys stand once."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"the key {min(twice)!r} stands there twice")
        return super().construct_mapping(node, deep)


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789."))


def read_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def find_file(name: str | Path) -> Path | None:
    return next((path for path in (Path(name), ROOT / name) if path.is_file()), None)


def read_deepspeed(name: str) -> dict[str, Any]:
    """The DeepSpeed section from a JSON file, checked by day 04's checker, which names the line of a mistake."""
    path = find_file(name)
    if path is None:
        raise UserError(f"deepspeed is {name!r}: neither a section nor a JSON file")
    refuse_errors(check(path), f"deepspeed={name}: deepspeed")
    return read_config(path)


def refuse_errors(findings: list, where: str) -> None:
    """What DeepSpeed itself would ignore, or reject in words that do not name the key: day 04."""
    if found := next((finding for finding in findings if finding.level == "error"), None):
        raise UserError(f"{where}{found.path and '.'}{found.path}: {found.message} {found.fix}".rstrip())


def load_config(file: str | Path = TINY, overrides: list[str] = (), ranks: int | None = None) -> Config:
    """Return the resolved config: defaults < `file` < `overrides`, each `section.key=value` with a YAML value.

    `deepspeed=FILE` takes the section from a DeepSpeed JSON; what comes after it changes single keys of that.
    """
    path = find_file(file)
    if path is None:
        raise UserError(f"config {str(file)!r} is not a file; {TINY} is one to copy")
    values = read_yaml(path.read_bytes(), str(file))
    if not isinstance(values, dict):
        raise UserError(f"config {str(file)!r} has no sections such as `data:` and `train:`")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise UserError(f"{override!r} is not of the form section.key=value")
        place, *path_to = name.split(".")[::-1]
        inner = values
        for key in reversed(path_to):
            inner = inner.setdefault(key, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            raise UserError(f"{override!r}: {name.rpartition('.')[0]} has no keys of its own")
        found = read_yaml(value, override)
        inner[place] = read_deepspeed(found) if name == "deepspeed" and isinstance(found, str) else found
    try:
        config = Config(**values)
    except ValidationError as error:
        raise UserError(f"config {str(file)!r}: {explain(error.errors()[0])}") from None
    refuse_errors(check(dict(config.deepspeed), ranks), f"config {str(file)!r}: deepspeed")
    return config


def known_keys(model: type[Section] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def explain(error: dict) -> str:
    """One sentence from a pydantic error: the key, the bad value, what to do."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = known_keys()
        last = key.rpartition(".")[2]
        same_name = [name for name in known if name.rpartition(".")[2] == last]  # right key, wrong section
        near = same_name or difflib.get_close_matches(key, known, 1, 0.5)
        siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
        return f"unknown key {key!r}; " + (f"do you mean {near[0]!r}?" if near else f"there are {', '.join(siblings)}")
    if error["type"] == "missing":
        return f"the key {key!r} is missing"
    said = error["msg"][0].lower() + error["msg"][1:]
    return f"{key} is {error['input']!r}: {said}"


def fingerprint(*parts: Any) -> str:
    """SHA-256 of anything that JSON can hold: the same values, the same fingerprint."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=lambda p: p.model_dump()).encode()).hexdigest()


def as_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=110)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """The two flags that every program of the capstone has. Read them with `parser.parse_intermixed_args()`."""
    parser.add_argument("--config", default=TINY, help="YAML config of the project")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that go before the file's")


def add_base_flags(parser: argparse.ArgumentParser) -> None:
    """The course's base flags beside them; all but --local_rank, the launcher's, are short names of keys."""
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON config")  # without it, the section of --config
    parser.add_argument("--steps", type=int, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", help="folder for metrics.jsonl and plots")
    add_config_flags(parser)


def resolve(args: argparse.Namespace, more: dict[str, object] | None = None) -> Config:
    """The config of `add_base_flags`' args, for the ranks that were launched: file < `more` < flags < overrides."""
    values = {"deepspeed": args.deepspeed_config, **(more or {})}
    values |= {"run_dir": args.run_dir and show_path(args.run_dir)}
    values |= {f"train.{name}": getattr(args, name) for name in ("steps", "log_every", "seed")}
    asked = [f"{key}={value}" for key, value in values.items() if value is not None]
    return load_config(args.config, [*asked, *args.overrides], int(os.environ["WORLD_SIZE"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=TINY, help="YAML config of the project")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that go before the file's")
    args = parser.parse_intermixed_args()
    print(as_yaml(load_config(args.config, args.overrides)), end="")


if __name__ == "__main__":
    with clear_errors():
        main()
