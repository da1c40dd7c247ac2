#!/usr/bin/env python3
"""What will DeepSpeed 0.19.8 really do with this config?

    python config/check.py my.json [more.json ...] [--world_size 8] [--hf] [--json]

DeepSpeed reads its top level and half of its sections with dict.get: a typo there is silently ignored and another run
is trained. The other half is validated, with errors that rarely name the line. This file names the line, says what
would happen, and how to repair it, in a tenth of a second and without importing torch or deepspeed.

--hf          for the Hugging Face Trainer and Accelerate, which fill in some (not all!) values that are "auto";
              a file called *_hf.json is checked so without it
--world_size  number of ranks, so that the batch arithmetic can be checked exactly
Exit code     1 when there are errors, 2 when a file cannot be read, 0 otherwise.

    error    DeepSpeed rejects it, crashes later, or trains something other than what is written
    warning  it runs, but probably not as meant
    note     worth knowing

From Python:  from config.check import check
              for finding in check("my.json", world_size=8): print(finding)

Types, ranges and unknown keys come from ds_config.schema.json beside this file (generated from DeepSpeed by
make_schema.py); everything that one key alone cannot tell is a small function in RULES.
"""

import argparse
import difflib
import json
import operator
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

SCHEMA_FILE = Path(__file__).with_name("ds_config.schema.json")
LEVELS = ("error", "warning", "note")
MAX_BYTES = 1 << 20  # the largest config in DeepSpeed's own repository is 4 KiB


@dataclass
class Finding:
    level: str  # "error", "warning" or "note"
    path: str  # "zero_optimization.stage"; "" for the whole file
    message: str  # what DeepSpeed does with it
    fix: str = ""  # what to write instead
    line: int | None = None  # None when a dict was checked

    def __str__(self):
        where = f"line {self.line}: " if self.line else ""
        return f"{self.level}: {where}{self.path}: {self.message}" + (f" Fix: {self.fix}" if self.fix else "")


# --- reading: hjson as DeepSpeed reads it, remembering lines --------------------------------------------------------


class ParseError(ValueError):
    def __init__(self, message, text, pos):
        super().__init__(message)
        self.line = text.count("\n", 0, pos) + 1


class Quoteless(str):
    """Text that hjson took without quotes: everything up to the end of the line, commas and all."""


SKIP = re.compile(r"(?:[ \t\r\n]+|#[^\r\n]*|//[^\r\n]*|/\*.*?\*/)*", re.S)
ESCAPE = r"\\(?:[\"'\\/bfnrt]|u[0-9a-fA-F]{4})"
STRING = {q: re.compile(rf"{q}((?:[^{q}\\\x00-\x1f]|{ESCAPE})*){q}") for q in "\"'"}
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?[ \t]*$")
BARE_KEY = re.compile(r"[^\s:{}\[\],]+")


class Reader:
    """A small hjson parser: JSON, comments, trailing and missing commas, unquoted keys and values.

    Not config/read.py, which knows no lines and needs hjson: findings name the line, duplicate keys are all of them
    listed, and this file runs where neither DeepSpeed nor the rest of the repository is installed.
    `lines` maps the path of every key and list item to its line; `duplicates` lists (path, line) of repeated keys.
    """

    def __init__(self, text):
        self.text = text.lstrip("\ufeff")
        self.pos = 0
        self.lines = {(): 1}
        self.duplicates = []

    def read(self):
        first = self.peek()
        if first == "":
            return {}
        value = self.value(()) if first in "{[" else self.without_braces()
        if self.peek():
            self.fail("there is text after the end of the config")
        return value

    def without_braces(self):
        try:
            return self.object((), "")  # hjson also takes a file without the outer braces
        except ParseError as error:
            self.pos = 0
            self.peek()
            value = self.value(())  # or with a single value, which is no config but parses
            if self.peek():
                raise error
            return value

    def fail(self, message, pos=None):
        raise ParseError(message, self.text, self.pos if pos is None else pos)

    def peek(self):
        """Skip white space and comments; the next character, or "" at the end."""
        self.pos = SKIP.match(self.text, self.pos).end()
        if self.text.startswith("/*", self.pos):
            self.fail("a /* comment is never closed")
        return self.text[self.pos : self.pos + 1]

    def value(self, path):
        char = self.peek()
        if char == "{":
            self.pos += 1
            return self.object(path, "}")
        if char == "[":
            self.pos += 1
            return self.array(path)
        if char and char in "\"'":
            return self.string(char)
        return self.quoteless()

    def object(self, path, end):
        result = {}
        start = self.pos
        while True:
            char = self.peek()
            if char == end:
                self.pos += len(end)
                return result
            if char == "":
                self.fail('a "{" is never closed', max(start - 1, 0))
            line = self.text.count("\n", 0, self.pos) + 1
            name = self.key(char)
            if self.peek() != ":":
                self.fail(f'expected ":" after the key {name!r}')
            self.pos += 1
            here = (*path, name)
            if name in result:
                self.duplicates.append((here, line))
            self.lines[here] = line
            result[name] = self.value(here)
            if self.peek() == ",":
                self.pos += 1

    def key(self, char):
        if char in "\"'":
            return self.string(char)
        match = BARE_KEY.match(self.text, self.pos)
        if not match:
            self.fail(f"expected a key, found {char!r}")
        self.pos = match.end()
        return match.group()

    def array(self, path):
        items = []
        start = self.pos
        while True:
            char = self.peek()
            if char == "]":
                self.pos += 1
                return items
            if char == "":
                self.fail('a "[" is never closed', start - 1)
            here = (*path, len(items))
            self.lines[here] = self.text.count("\n", 0, self.pos) + 1
            items.append(self.value(here))
            if self.peek() == ",":
                self.pos += 1

    def string(self, quote):
        if self.text.startswith("'''", self.pos):
            end = self.text.find("'''", self.pos + 3)
            if end < 0:
                self.fail("a ''' string is never closed")
            body = self.text[self.pos + 3 : end]
            self.pos = end + 3
            return textwrap.dedent(body).strip()  # hjson's own indentation rule is finer; nobody's value needs it
        match = STRING[quote].match(self.text, self.pos)
        if not match:
            self.fail("a string is never closed, runs over the end of its line, or holds a bad escape")
        self.pos = match.end()
        as_json = re.sub(r"\\.|\"", lambda m: {"\\'": "'", '"': '\\"'}.get(m[0], m[0]), match[1])
        return json.loads(f'"{as_json}"')

    def quoteless(self):
        """A number, true, false or null; anything else is text up to the end of the line."""
        start = self.pos
        if self.text[start : start + 1] in set("{}[],:") | {""}:
            self.fail("expected a value")
        end = start
        while True:
            char = self.text[end : end + 1]
            eol = char in ("", "\r", "\n")
            if eol or char in ",}]#" or self.text.startswith(("//", "/*"), end):
                word = self.text[start:end]
                if word.strip() in ("true", "false", "null"):
                    self.pos = end
                    return {"true": True, "false": False, "null": None}[word.strip()]
                number = NUMBER.match(word)
                if number:
                    self.pos = end
                    if not (number[1] or number[2]):
                        return int(word)
                    real = float(word)  # hjson turns 5e8 and 2.0 into integers, json does not
                    return int(real) if abs(real) < 1e10 and real == int(real) else real
                if eol:
                    self.pos = end
                    return Quoteless(word.strip())
            end += 1


# --- the schema -----------------------------------------------------------------------------------------------------

_schema = {}


def schema():
    if not _schema:
        _schema.update(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    return _schema


def unwrap(node):
    """The keys that Hugging Face fills are {"anyOf": [the real schema, {"const": "auto"}]}."""
    return {**node, **node["anyOf"][0]} if "anyOf" in node and "const" in node["anyOf"][1] else node


def kinds(node):
    found = node.get("type", [])
    return found if isinstance(found, list) else [found]


def known_paths(node=None, prefix=()):
    """Every key of the schema with its path, for "this belongs into ..."."""
    for name, child in (node or schema())["properties"].items():
        yield (*prefix, name)
        if "properties" in unwrap(child):
            yield from known_paths(unwrap(child), (*prefix, name))


def plain(name):
    return re.sub(r"[^a-z0-9]", "", name.lower())


# Names from torch, the Trainer, Accelerate, FSDP and older DeepSpeed, under what they are called here ("!": advice)
FOREIGN = {
    "optimizer.params.lr": "lr learning_rate base_lr",
    "optimizer.params.betas": "betas adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.params.eps": "eps epsilon adam_epsilon adam_eps",
    "optimizer.params.weight_decay": "weight_decay wd decay l2",
    "optimizer.params.momentum": "momentum",
    "optimizer.type": "optim optimizer_type optimizer_name",
    "scheduler": "lr_scheduler lr_schedule lr_schedular",
    "scheduler.type": "lr_scheduler_type scheduler_type",
    "scheduler.params.warmup_max_lr": "max_lr",
    "scheduler.params.warmup_min_lr": "min_lr",
    "scheduler.params.warmup_num_steps": "warmup_steps warmup num_warmup_steps warmup_iters warmup_ratio",
    "scheduler.params.total_num_steps": "max_steps total_steps num_training_steps train_steps max_train_steps",
    "type": "name",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size "
    "micro_batch_size_per_gpu train_micro_batch_size train_micro_batch_size_per_device micro_batch mbs",
    "train_batch_size": "batch_size global_batch_size effective_batch_size total_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accumulation_steps gas "
    "accumulate_grad_batches accumulation_steps",
    "gradient_clipping": "max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clip gradient_clip_val max_norm",
    "bf16.enabled (or fp16.enabled)": "mixed_precision precision dtype torch_dtype half_precision amp_dtype",
    "fp16": "float16 half",
    "torch_autocast": "autocast",
    "zero_optimization": "zero zero_config zero_optimizer zero_opt fsdp_config",
    "zero_optimization.stage": "zero_stage zero3 zero2 zero1 sharding_strategy fsdp",
    "zero_optimization.offload_optimizer": "offload cpu_offload",
    "zero_optimization.offload_optimizer.device": "offload_optimizer_device",
    "zero_optimization.offload_param.device": "offload_param_device",
    "zero_optimization.reduce_bucket_size": "allreduce_bucket_size bucket_size",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "zero3_save_16bit_model save_16bit_weights",
    "tensor_parallel.autotp_size": "tp_size tensor_parallel_size tensor_model_parallel_size mp_size tp",
    "expert_parallel.autoep_size": "ep_size expert_parallel_size",
    "sequence_parallel_size": "sp_size",
    "activation_checkpointing": "activation_checkpoint",
    "communication_data_type": "fp32_allreduce allreduce_always_fp32",
    "steps_per_print": "logging_steps log_interval print_steps print_every",
    "csv_monitor": "csv_logger csv",
    "wandb.project": "wandb_project",
    "compile": "torch_compile",
    "partition_activations": "partitioned_activations",
    "check_grad_overflow": "check_overflow",
    "intra_op_parallelism": "thread_count",
    "team": "entity",
    "output_path": "output_dir log_dir",
    "enabled": "enable use",
    "nvme_path": "path",
    "expert_parallel": "moe",
    "!There is no key: call model.gradient_checkpointing_enable() in your code.": "gradient_checkpointing",
    "!There is no key: PipelineModule(num_stages=...) decides.": "num_stages pipeline_parallel_size pp_size",
    "!There is no DeepSpeed key: it belongs in your code.": "seed num_epochs epochs num_train_epochs max_epochs model",
    "!It belongs in Accelerate's own config file.": "zero3_init_flag deepspeed_multinode_launcher num_processes",
    "!The launcher decides: deepspeed --num_gpus ... --num_nodes ...": "num_gpus num_nodes local_rank world_size n_gpu",
    "!Its sections (tensorboard, wandb, csv_monitor, comet) stand at the top level.": "monitor monitor_config",
}
ELSEWHERE = {old: new for new, olds in FOREIGN.items() for old in olds.split()}
# Keys that DeepSpeed ignores and that a config may carry nevertheless: its own docs have them, or another library does
TOLERATED = {
    ("aio", "thread_count"): "warning: DeepSpeed 0.19.8 reads intra_op_parallelism instead and ignores this one.",
    ("fp32_allreduce",): "warning: removed long ago and ignored; communication_data_type: fp32 does it today.",
    ("allreduce_always_fp32",): "warning: removed long ago and ignored; use communication_data_type: fp32.",
    ("hifloat8",): "warning: in the documentation, but newer than DeepSpeed 0.19.8, which ignores it.",
    ("msamp",): "note: read by Accelerate (FP8 through MS-AMP), not by DeepSpeed.",
    ("inference",): "note: read by transformers, not by deepspeed.initialize().",
    ("autotuning", "start_step"): "warning: ignored; the key is called start_profile_step.",
    ("autotuning", "end_step"): "warning: ignored; the key is called end_profile_step.",
}


# --- what the rules see ---------------------------------------------------------------------------------------------


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def truthy(value):
    """As pydantic reads a boolean: 1 and "yes" are true as well."""
    return value is True or value == 1 or (isinstance(value, str) and value.lower() in ("true", "yes", "on", "1"))


class Context:
    """The config, and what several rules ask of it."""

    def __init__(self, config, lines, world_size, hf):
        self.config, self.lines, self.world_size, self.hf = config, lines, world_size, hf
        self.tuning = truthy(self.get("autotuning.enabled"))  # the autotuner replaces "auto" and lists of candidates
        zero = config.get("zero_optimization")
        stage = self.get("zero_optimization.stage", 0)
        self.zero = zero if isinstance(zero, dict) else {}
        if isinstance(zero, bool):
            stage = int(zero)  # the deprecated form
        self.stage_unknown = self.tuning or (hf and stage == "auto")
        self.stage = 1 if stage is True else int(stage) if str(stage) in ("1", "2", "3") else 0
        self.fp16 = truthy(self.get("fp16.enabled"))
        self.bf16 = truthy(self.get("bf16.enabled", self.get("bfloat16.enabled")))
        self.pipeline = "pipeline" in config

    def get(self, path, default=None):
        node = self.config
        for part in path.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return node

    def section(self, path):
        found = self.get(path)
        return found if isinstance(found, dict) else {}

    def offload(self, what):
        """Device of offload_optimizer or offload_param: "none", "cpu" or "nvme"."""
        old = {"optimizer": "cpu_offload", "param": "cpu_offload_param"}[what]
        device = "cpu" if truthy(self.zero.get(old)) else "none"
        return self.section(f"zero_optimization.offload_{what}").get("device", device)

    def bf16_optimizer(self):
        """The one ZeRO-1 mode that runs in BF16_Optimizer (runtime/engine.py _do_optimizer_sanity_check)."""
        fp32 = str(self.get("data_types.grad_accum_dtype")).removeprefix("torch.") in ("fp32", "float32", "float")
        return self.bf16 and fp32 and self.stage == 1 and self.offload("optimizer") == "none"

    def other_than_cpu_adam(self):
        """How to get DeepSpeedCPUAdam, when the optimizer section asks for something else under offload."""
        kind = self.get("optimizer.type")
        if isinstance(kind, str) and kind.lower() not in ("adam", "adamw"):
            return 'Use "type": "AdamW".'
        return "Delete torch_adam." if self.get("optimizer.params.torch_adam") else ""

    def line(self, path):
        keys = tuple(path.split(".")) if path else ()
        while keys not in self.lines and keys:
            keys = keys[:-1]
        return self.lines.get(keys)

    def find(self, level, path, message, fix=""):
        return Finding(level, path, message, fix, self.line(path))

    def error(self, path, message, fix=""):
        return self.find("error", path, message, fix)

    def warning(self, path, message, fix=""):
        return self.find("warning", path, message, fix)

    def note(self, path, message, fix=""):
        return self.find("note", path, message, fix)


# --- one key at a time: the schema ----------------------------------------------------------------------------------

CONSTRUCTORS = {("optimizer", "params"), ("scheduler", "params")}  # their keys are checked by the rules below
STRICT_BOOLEANS = {  # used with |, isinstance or `in`: anything but true and false raises
    "wall_clock_breakdown", "flops_profiler.enabled", "checkpoint.parallel_write.pipeline_stage",
    "pipeline.pipe_partitioned", "pipeline.grad_partitioned"}  # fmt: skip
OUT_OF_RANGE = {  # what happens, where DeepSpeed does not simply raise at initialize()
    "gradient_clipping": "DeepSpeed accepts it and silently does not clip at all",
    "gradient_predivide_factor": "every gradient is divided by it: ZeroDivisionError or reversed signs",
    "optimizer.params": "torch refuses it, DeepSpeed's own kernels compute with it",
    "optimizer.params.betas": "torch refuses it, DeepSpeed's own kernels compute with it",
    "optimizer.params.lr": "torch refuses it, DeepSpeed's own kernels train uphill with it",
    "scheduler.params.total_num_steps": "accepted, and the learning rate is at its end from the start",
    "scheduler.params.warmup_min_lr": "accepted, and training starts uphill",
    "scheduler.params.warmup_max_lr": "accepted, and trains uphill",
    "pipeline.activation_checkpoint_interval": "treated as 0",
    "tensor_parallel.autotp_size": "accepted, and AutoTP stays off",
    "aio": "accepted, until the first read or write",
}


def walk(c, node, value, path=(), lax=False) -> Iterator[Finding]:
    """Compare a value with its schema. `lax`: the section is a pydantic model, which converts "2" and "true"."""
    dotted = ".".join(map(str, path))
    node = unwrap(node)
    if value == "auto" and isinstance(value, str):
        yield from auto(c, node, dotted, lax)
        return
    if c.tuning and isinstance(value, list) and path[0] == "zero_optimization":
        return  # candidates for the autotuner
    verdict = type_problem(node, value, lax, dotted)
    if verdict:
        yield c.find(verdict[0], dotted, verdict[1], verdict[2])
        if verdict[0] == "error":
            return
    if isinstance(value, dict) and "properties" in node:
        for name, child in value.items():
            here = (*path, name)
            if name in node["properties"]:
                pydantic = node["x-unknown"] == "reject" and path not in CONSTRUCTORS
                yield from walk(c, node["properties"][name], child, here, pydantic)
            elif path not in CONSTRUCTORS and node.get("additionalProperties") is False:
                yield from unknown_key(c, node, name, here)
    elif isinstance(value, list) and "items" in node:
        for i, item in enumerate(value):
            yield from walk(c, node["items"], item, (*path, i), lax)
    yield from range_problem(c, node, value, dotted, lax)
    if node.get("deprecated") and value is not None and dotted != "zero_optimization.legacy_stage1":
        yield c.warning(
            dotted, "Deprecated, though still converted.", node["deprecationMessage"].removeprefix("Deprecated: ")
        )


def auto(c, node, path, lax):
    """ "auto" is a Hugging Face placeholder; DeepSpeed itself knows it in a handful of keys only."""
    known = "auto" in (node.get("x-only-string"), node.get("default")) or "auto" in node.get("enum", [])
    if c.tuning or (c.hf and node.get("x-hf-auto")) or (known and not c.hf):
        return
    if c.hf:
        yield c.error(
            path,
            'Nobody fills this in: Accelerate raises ValueError when an "auto" that it has no value for is left.',
            "Write a value, or leave the key out for DeepSpeed's default.",
        )
    elif lax and "object" not in kinds(node):
        default = json.dumps(node.get("default"))
        off = path.endswith(("stage", "enabled", "device"))
        filled = " Only Hugging Face fills this in (check with --hf)." if node.get("x-hf-auto") else ""
        message = f'DeepSpeed drops "auto" in silence and uses the default, {default}.{filled}'
        yield c.find("error" if off else "warning", path, message, "Write a value.")
    else:
        filled = "Only Hugging Face fills this in (check with --hf); " * bool(node.get("x-hf-auto")) + "DeepSpeed"
        yield c.error(path, f'{filled} takes "auto" as a plain string, and crashes or misreads it.', "Write a value.")


class Misfit:
    """A value that may not be of the JSON type that its key wants, and the sentences about it."""

    WANT = {"object": "a section {...}", "array": "a list", "integer": "an integer", "boolean": "true or false"}

    def __init__(self, node, value, lax, path):
        self.node, self.value, self.lax, self.path = node, value, lax, path
        self.allowed = kinds(node)
        wants = " or ".join(self.WANT.get(kind, f"a {kind}") for kind in self.allowed if kind != "null")
        self.shown = json.dumps(value)
        self.hint = ""
        if isinstance(value, Quoteless):
            self.shown = f"the text {self.shown}"
            self.hint = " (hjson reads unquoted text up to the end of the line, comma included)"
        self.fix = f"Write {wants}."
        if isinstance(value, str) and value.startswith(("True", "False")):
            self.fix = f"Write {wants} (true and false are lower case in JSON)."
        elif (switch := {bool: "enabled", int: "stage"}.get(type(value))) in node.get("properties", {}):
            self.fix = f'Write {{"{switch}": {self.shown}}}.'
        early = lax or "object" in self.allowed or path in STRICT_BOOLEANS
        when = "raises at initialize()" if early else "does not check it, and crashes or misreads it when it is used"
        self.rejects = f"{self.shown}{self.hint} is not {wants}: DeepSpeed {when}."

    def error(self, message=None):
        return "error", message or self.rejects, self.fix

    def warning(self, message):
        return "warning", message, self.fix


def type_problem(node, value, lax, path):
    """(level, what happens, fix) when the JSON type is wrong, else None."""
    misfit = Misfit(node, value, lax, path)
    if not misfit.allowed:
        return None
    if isinstance(value, bool):
        return boolean_problem(misfit)
    if value is None:
        return null_problem(misfit)
    if isinstance(value, (int, float)):
        return number_problem(misfit)
    if isinstance(value, str):
        return text_problem(misfit)
    return None if ("array" if isinstance(value, list) else "object") in misfit.allowed else misfit.error()


def boolean_problem(m):
    if "boolean" in m.allowed:
        return None
    if "object" in m.allowed and m.path == "zero_optimization":
        return "warning", f"Deprecated form: {m.shown} means stage {int(m.value)}.", 'Write {"stage": 1}.'
    if m.allowed[0] in ("integer", "number") and m.path != "fp16.loss_scale":
        return m.error(f"{m.shown} is taken as the number {int(m.value)}.")
    return m.error()


def null_problem(m):
    if "null" in m.allowed:
        return None
    if m.allowed == ["boolean"] and not m.lax and m.path not in STRICT_BOOLEANS:
        return m.warning("null counts as false.")
    return m.error(f"{m.rejects[:-1]}; null does not mean the default.")


def number_problem(m):
    if "number" in m.allowed or ("integer" in m.allowed and isinstance(m.value, int)):
        return None
    if "integer" in m.allowed:
        if m.lax and abs(m.value) >= 2**63:
            return m.error(f"{m.shown} does not fit into 64 bits: DeepSpeed raises at initialize().")
        if m.value != int(m.value):
            kept = "raises at initialize()" if m.lax else "keeps the fraction and computes with it"
            return m.error(f"{m.shown} is not an integer: DeepSpeed {kept}.")
        if m.path.startswith("scheduler."):
            return m.error(f"{m.shown} is a float, and DeepSpeed insists on an integer: ValueError.")
        if not m.lax and m.path.startswith(("train_", "gradient_acc")):
            return m.warning(f"{m.shown} stays a float, and so does the batch size.")
        return None
    if "boolean" in m.allowed:
        if m.value in (0, 1):
            return m.warning(f"{m.shown} is taken as {str(bool(m.value)).lower()}.")
        return m.error(None if m.lax else f"{m.shown} counts as true.")
    return m.error()


def text_problem(m):
    only = m.node.get("x-only-string")
    if "string" in m.allowed and not (only and m.value != only):
        return None
    if {"integer", "number"} & set(m.allowed):
        pattern = r"\s*[+-]?\d+(_\d+)*(\.0*)?\s*" if "integer" in m.allowed else r"\s*[+-]?[\d.]+([eE][+-]?\d+)?\s*"
        if m.lax and not m.node.get("x-no-coercion") and not only and re.fullmatch(pattern, m.value):
            return m.warning(f"{m.shown} is converted by DeepSpeed, but not by others who read the file.")
        return m.error()
    if "boolean" in m.allowed and not only:
        if m.lax and m.value.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"):
            return m.warning(f"{m.shown}{m.hint} is converted by DeepSpeed, but not by others who read the file.")
        if m.lax or m.path in STRICT_BOOLEANS:
            return m.error()
        message = f"{m.shown}{m.hint} is a non-empty string and counts as true, whatever it says."
        return m.warning(message) if m.value.lower() in ("true", "yes", "on", "1") else m.error(message)
    return m.error()


def range_problem(c, node, value, path, lax):
    if "enum" in node and value not in node["enum"] and not isinstance(value, bool):
        if lax and isinstance(value, str) and value in map(str, node["enum"]):
            return  # "2" for 2: already reported as converted
        options = [o for o in node["enum"] if o is not None]
        options = list(dict.fromkeys(o.lower() if isinstance(o, str) else o for o in options))
        near = difflib.get_close_matches(value.lower(), map(str, options), 1) if isinstance(value, str) else []
        effect = "DeepSpeed raises at initialize()" + " when fp16 or bf16 is on" * (path == "data_types.buffer_dtype")
        if path == "scheduler.params.warmup_type":
            effect = 'DeepSpeed logs a warning and uses "log"'
        elif path == "tensor_parallel.preset_model":
            effect = "DeepSpeed finds no such preset and silently goes on without"
        elif path.startswith("autotuning"):
            effect = "the autotuner does not know it"
        hint = f" Did you mean {near[0]!r}?" if near else ""
        yield c.error(path, f"{json.dumps(value)} is none of {', '.join(map(str, options))}: {effect}.{hint}")
    if isinstance(value, list) and "minItems" in node and len(value) != node["minItems"]:
        yield c.error(path, f"Needs {node['minItems']} numbers and has {len(value)}: the optimizer crashes.")
    if value == "" and node.get("minLength"):
        yield c.error(path, "Must not be empty: DeepSpeed raises at initialize().")
    if lax and isinstance(value, str) and {"integer", "number"} & set(kinds(node)):
        value = float(value)  # what pydantic makes of "3"
    if not is_number(value):
        return
    limits = [("minimum", ">=", operator.ge), ("exclusiveMinimum", ">", operator.gt),
              ("maximum", "<=", operator.le), ("exclusiveMaximum", "<", operator.lt)]  # fmt: skip
    for name, sign, holds in limits:
        if name in node and not holds(value, node[name]):
            effect = OUT_OF_RANGE.get(path) or OUT_OF_RANGE.get(path.rpartition(".")[0])
            effect = effect or "DeepSpeed raises at initialize()"
            yield c.error(path, f"{value} is out of range (must be {sign} {node[name]}): {effect}.")


def unknown_key(c, node, name, path):
    """Removed, misspelt, at the wrong level, borrowed from another library, or unheard of."""
    dotted, parent = ".".join(map(str, path)), ".".join(map(str, path[:-1]))
    rejected = node["x-unknown"] == "reject"
    if not rejected and re.match(r"_|//|#|\$schema$|comment", name):
        return  # people write comments as keys, and where DeepSpeed ignores them that works
    removed = schema()["x-deepspeed"]["removed"].get(parent, {})
    if name in removed:
        text = re.sub(r"\s*See https://\S+", "", removed[name])
        yield c.error(
            dotted, f"Removed from DeepSpeed, which refuses the config even when it is off: {text}", "Delete it."
        )
        return
    if path in TOLERATED:
        level, text = TOLERATED[path].split(": ", 1)
        yield c.find(level, dotted, text[0].upper() + text[1:])
        return
    effect = "DeepSpeed raises at initialize()" if rejected else "DeepSpeed ignores it in silence"
    yield c.error(dotted, f"Unknown key: {effect}.", suggest(node["properties"], name, path))


def suggest(siblings, name, path=()):
    """The most likely key behind a wrong one."""
    here = {plain(s): s for s in siblings}
    parent = ".".join(map(str, path[:-1]))
    if plain(name) in here:
        return f"Did you mean {here[plain(name)]!r}?"
    wanted = ELSEWHERE.get(plain(name)) or ELSEWHERE.get(name.lower())
    if wanted and parent and (wanted in siblings or wanted.removeprefix(parent + ".") in siblings):
        return f"It is called {wanted.removeprefix(parent + '.')} here."
    if wanted and wanted[0] == "!":
        return wanted[1:]
    if wanted and ("." in wanted or (not parent and wanted in siblings)):
        return f"Write it as {wanted}."
    if name in ("enabled", "type", "params"):
        return f'This section has no "{name}".'
    close = difflib.get_close_matches(name.lower(), siblings, 1, 0.82)
    if close:
        return f"Did you mean {close[0]!r}?"
    others = [p for p in known_paths() if p[:-1] != path[:-1] and p[0] != "bfloat16"]
    same = sorted((p for p in others if p[-1] == name), key=lambda p: (p[: len(path) - 1] != path[:-1], len(p)))
    if same:
        return f"It belongs in {'.'.join(same[0][:-1])}." if len(same[0]) > 1 else "It belongs at the top level."
    close = difflib.get_close_matches(name.lower(), siblings, 1, 0.65)
    if close:
        return f"Did you mean {close[0]!r}?"
    close = difflib.get_close_matches(name.lower(), [p[-1] for p in others if len(p[-1]) > 5], 1, 0.85)
    if close:
        return f"Did you mean {'.'.join(next(p for p in others if p[-1] == close[0]))}?"
    return "Delete it" + ("." if parent else ", or start its name with _ if it is your own remark.")


# --- several keys together: the rules -------------------------------------------------------------------------------


def batch_arithmetic(c) -> Iterator[Finding]:
    """runtime/config.py, _set_batch_related_parameters and _batch_assertion"""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (c.get(n) for n in names)
    if total is None and micro is None:
        message = "No batch size: DeepSpeed raises AssertionError at initialize()."
        yield c.error(
            "train_micro_batch_size_per_gpu", message, "Give train_micro_batch_size_per_gpu or train_batch_size."
        )
        return
    given = [v for v in (total, micro, steps) if v is not None]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in given) or total is None:
        return  # "auto", or reported already, or nothing that could disagree
    shares = (micro or 1) * (steps or 1)
    formula = " x ".join(n for n, v in zip(names[1:], (micro, steps), strict=True) if v)
    if total % shares and not c.world_size:
        message = f"{total} is no multiple of {shares} ({formula}): AssertionError on any number of ranks."
        yield c.error("train_batch_size", message, f"{total - total % shares or shares} or {total + -total % shares}.")
        return

    def fits(ranks):
        return total == shares * ranks if micro and steps else total % (shares * ranks) == 0

    sequence, tensor = c.get("sequence_parallel_size", 1), c.get("tensor_parallel.autotp_size", 0)
    ranks = c.world_size
    if isinstance(sequence, int) and sequence > 1 and ranks:
        ranks = ranks // sequence or None
    if ranks is None:
        if micro and steps:
            groups = " data-parallel groups" if c.pipeline or sequence != 1 else " ranks"
            message = f"With all three batch numbers given this runs on exactly {total // shares}{groups}."
            yield c.note("train_batch_size", message, "Leave train_batch_size out to run on any number.")
    elif not fits(ranks):
        message = f"train_batch_size {total} != {formula} x {ranks} ranks = {shares * ranks}"
        if not (micro and steps):
            message = f"train_batch_size {total} is no multiple of {formula and formula + ' x '}{ranks} ranks"
        message += ": DeepSpeed raises AssertionError at initialize()."
        if isinstance(tensor, int) and tensor > 1 and ranks % tensor == 0 and fits(ranks // tensor):
            message = f"Fits only with an mpu passed: DeepSpeed counts all {ranks} ranks, tensor-parallel ones too."
            yield c.warning("train_batch_size", message)
        elif c.pipeline and any(ranks % k == 0 and fits(ranks // k) for k in range(2, ranks + 1)):
            stages = next(k for k in range(2, ranks + 1) if ranks % k == 0 and fits(ranks // k))
            yield c.note("train_batch_size", f"Fits {ranks} ranks with {stages} pipeline stages only.")
        else:
            want = shares * ranks if total < shares * ranks or (micro and steps) else total - total % (shares * ranks)
            yield c.error("train_batch_size", message, f"{want}, or leave train_batch_size out.")


def world_size_divides(c) -> Iterator[Finding]:
    """runtime/config.py (world size / sequence_parallel_size), utils/groups.py (tensor parallel mesh)"""
    for path in ("tensor_parallel.autotp_size", "sequence_parallel_size", "expert_parallel.autoep_size",
                 "zero_optimization.zero_hpz_partition_size"):  # fmt: skip
        size = c.get(path)
        if path.endswith("hpz_partition_size") and is_number(size) and c.world_size and size > c.world_size:
            continue  # silently cut down to the world size
        if c.world_size and isinstance(size, int) and size > 1 and c.world_size % size:
            yield c.error(path, f"{size} does not divide the {c.world_size} ranks.")


def precision(c) -> Iterator[Finding]:
    """runtime/config.py, runtime/engine.py (_do_optimizer_sanity_check, backward)"""
    which = "bf16" if c.get("bf16") is not None else "bfloat16"
    if c.fp16 and c.bf16:
        yield c.error(f"{which}.enabled", "fp16 and bf16 are both on: DeepSpeed raises AssertionError.", "Keep one.")
    if "bfloat16" in c.config:
        if c.get("bf16") is not None:
            yield c.warning("bfloat16", "Not read, because bf16 is there.", "Delete it.")
        else:
            level = "warning" if c.hf else "note"
            yield c.find(level, "bfloat16", "The old name of bf16; transformers does not know it.", "Call it bf16.")
    compiled = truthy(c.get("compile.deepcompile"))
    if c.stage == 0 and not c.stage_unknown and not (c.fp16 and c.bf16):
        if c.fp16:
            message = (
                "fp16 without ZeRO: backward() scales the loss for ZeRO optimizers only, but the step still divides "
                "the gradients by the loss scale (65536): they arrive that much too small."
            )
            yield c.error("fp16.enabled", message, "Use ZeRO stage 1, or torch_autocast.")
        elif c.bf16 and not c.pipeline:
            message = (
                "bf16 without ZeRO: creating the optimizer state runs a step on zero gradients, so Adam's step count "
                "starts at 1, so about ten early updates are too short (0.744, 0.858, 0.910 … of ZeRO-1's with the "
                "default betas)."
            )
            level = "warning" if compiled else "error"
            yield c.find(level, f"{which}.enabled", message, "Use ZeRO stage 1, or torch_autocast.")


def torch_autocast(c) -> Iterator[Finding]:
    """runtime/torch_autocast.py, runtime/engine.py _do_optimizer_sanity_check"""
    autocast = truthy(c.get("torch_autocast.enabled"))
    if autocast and truthy(c.zero.get("zero_quantized_weights")):
        path = "zero_optimization.zero_quantized_weights"
        yield c.error(path, "Not together with torch_autocast: DeepSpeed raises AssertionError.", "Keep one.")
    if autocast and (c.fp16 or c.bf16):
        message = "On together with fp16/bf16, which cast the weights: nothing is left for autocast to do."
        yield c.error("torch_autocast.enabled", message, "Keep one.")
    if autocast and "dtype" not in c.section("torch_autocast"):
        message = "Without dtype PyTorch's own default applies: float16 on CUDA, and then without loss scaling."
        yield c.warning("torch_autocast.dtype", message, 'Add "dtype": "bfloat16".')
    if autocast and c.stage > 0 and c.get("torch_autocast.dtype") in ("fp16", "float16", "torch.float16", "half"):
        message = (
            "float16 autocast with ZeRO: gradients are clipped before the loss scale is taken off them, and after an "
            "overflow the scale never falls."
        )
        yield c.error("torch_autocast.dtype", message, "ZeRO stage 0, or bfloat16.")
    modules = c.get("torch_autocast.lower_precision_safe_modules")
    for i, module in enumerate(modules if isinstance(modules, list) else []):
        if isinstance(module, str) and "." not in module:
            path = f"torch_autocast.lower_precision_safe_modules.{i}"
            yield c.error(path, f"{module!r} cannot be imported: DeepSpeed raises ValueError.", f'"torch.nn.{module}"')
    if autocast and c.get("torch_autocast.dtype") in ("fp32", "float32", "torch.float32", "float"):
        yield c.warning("torch_autocast.dtype", "Autocast to float32 does nothing.", '"bfloat16"')


def loss_scale(c) -> Iterator[Finding]:
    """runtime/fp16/loss_scaler.py, runtime/config.py"""
    if truthy(c.get("fp16.auto_cast")) and not c.fp16 and c.get("fp16.enabled") != "auto":
        message = "Works although fp16 is off: inputs become float16, the model stays as it is, and forward() raises."
        yield c.error("fp16.auto_cast", message, "Delete it.")
    scale, power = c.get("fp16.loss_scale", 0), c.get("fp16.initial_scale_power", 16)
    if c.fp16 and is_number(power) and (power >= 128 or power > 32 or power < 0):
        message = f"An exponent: the first loss scale is 2**{power}" + (", which overflows." if power >= 128 else ".")
        yield c.find("error" if power >= 128 else "warning", "fp16.initial_scale_power", message, "16 is usual.")
    if is_number(scale) and scale > 0:
        if scale != 1 and (scale < 1 or int(scale) & (int(scale) - 1) or scale != int(scale)):
            yield c.note("fp16.loss_scale", f"A static scale of {scale} is no power of two and rounds the gradients.")
        if str(c.get("optimizer.type")).lower() == "lamb":
            yield c.error("fp16.loss_scale", "Lamb requires dynamic loss scaling: DeepSpeed raises.", "0")
    if c.fp16 and scale == 0:
        for name in ("loss_scale_window", "min_loss_scale"):
            value = c.get(f"fp16.{name}", 1)
            if is_number(value) and value <= 0:
                yield c.error(f"fp16.{name}", f"{value} must be > 0 with dynamic loss scaling: DeepSpeed raises.")


def low_precision_states(c) -> Iterator[Finding]:
    """runtime/config.py _do_error_check; runtime/zero/stage_1_and_2.py and stage3.py _configure_master_weights"""
    states = truthy(c.get("bf16.bf16_optimizer_states"))
    for path in ("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"):
        if not truthy(c.get(path)) or c.stage_unknown:
            continue
        if c.stage == 0:
            yield c.error(path, "Needs ZeRO stage 1, 2 or 3: DeepSpeed raises AssertionError.")
        elif path[0] == "b" and c.bf16_optimizer():
            yield c.warning(path, "Ignored: stage 1 with grad_accum_dtype fp32 runs in BF16_Optimizer.", "Use stage 2.")
        elif c.offload("optimizer") == "none" and not (path[0] == "b" and states):
            fix = 'Add "offload_optimizer": {"device": "cpu"}' + " or bf16_optimizer_states" * (path[0] == "b") + "."
            yield c.error(path, "Needs optimizer offload with DeepSpeedCPUAdam: DeepSpeed raises AssertionError.", fix)
        elif c.offload("optimizer") != "none" and c.other_than_cpu_adam():
            yield c.error(path, "Needs DeepSpeedCPUAdam: DeepSpeed raises AssertionError.", c.other_than_cpu_adam())
    if states and not truthy(c.get("bf16.bf16_master_weights_and_grads")):
        yield c.error("bf16.bf16_optimizer_states", "Requires bf16_master_weights_and_grads: DeepSpeed raises.")


def data_types(c) -> Iterator[Finding]:
    """runtime/engine.py get_data_types, _assert_valid_mixed_precision_config, _do_optimizer_sanity_check"""
    model = "fp16" if c.fp16 else "bf16" if c.bf16 else "fp32"
    for name in ("grad_accum_dtype", "param_dtype"):
        raw = str(c.get(f"data_types.{name}", model)).removeprefix("torch.")
        names = {"float": "fp32", "float32": "fp32", "half": "fp16", "float16": "fp16", "bfloat16": "bf16"}
        asked = names.get(raw, raw)
        if asked in ("fp16", "bf16", "fp32") and asked != model and not c.hf:
            if name == "param_dtype":
                message = f"{raw} conflicts with the model's type, {model}: DeepSpeed raises AssertionError."
                yield c.error("data_types.param_dtype", message, "Leave it out.")
            elif c.stage == 0 and not c.stage_unknown and not c.pipeline:
                message = f"At ZeRO-0 gradients accumulate in the model's type ({model}): NotImplementedError."
                yield c.error("data_types.grad_accum_dtype", message)


ZERO3_KEYS = re.compile(r"stage3_|zero_hpz|zero_quantized|sub_group_size$|leaf_module$|memory_efficient_linear$")


def zero_stage(c) -> Iterator[Finding]:
    """runtime/zero/config.py; runtime/engine.py _configure_zero_optimizer"""
    zero = c.zero
    at = "zero_optimization"
    if zero and "stage" not in zero:
        yield c.warning(f"{at}.stage", "No stage, so ZeRO stays off (stage 0).", 'Add "stage": 1, 2 or 3.')
    if not zero or c.stage_unknown:
        return
    known = schema()["properties"][at]["properties"]
    idle = [k for k in zero if ZERO3_KEYS.match(k) and k in known and zero[k] not in ("auto", known[k].get("default"))]
    if c.stage < 3 and idle:
        others = f" (and {', '.join(idle[1:])})" if idle[1:] else ""
        yield c.warning(f"{at}.{idle[0]}", f"Does nothing at stage {c.stage}: read at stage 3 only{others}.")
    for key, model_key in ((k, k.removeprefix("stage3_")) for k in zero if k.startswith("stage3_")):
        if model_key in zero:
            yield c.error(f"{at}.{model_key}", f"The same as {key}: DeepSpeed raises when both are there.", "Keep one.")
    if c.stage == 3 and not any(
        truthy(zero.get(k)) or zero.get(k) == "auto" for k in zero if k.endswith("bit_weights_on_model_save")
        or k.endswith("fp16_weights_on_model_save")):  # fmt: skip
        message = "save_16bit_model() writes nothing and returns False; the HF Trainer saves a ZeRO checkpoint instead."
        fix = 'Add "stage3_gather_16bit_weights_on_model_save": true, or convert checkpoints with zero_to_fp32.py.'
        yield c.warning(f"{at}.stage3_gather_16bit_weights_on_model_save", message, fix)
    if truthy(zero.get("legacy_stage1")):
        yield c.error(f"{at}.legacy_stage1", "No longer supported: DeepSpeed raises at initialize().", "Delete it.")
    if c.stage == 3 and truthy(zero.get("elastic_checkpoint")):
        yield c.warning(f"{at}.elastic_checkpoint", "Ignored at stage 3.", "Use Universal Checkpointing.")
    bucket = zero.get("allgather_bucket_size", 2)
    if c.stage in (1, 2) and isinstance(bucket, int) and bucket % 2:
        yield c.error(f"{at}.allgather_bucket_size", f"{bucket} is odd: DeepSpeed raises AssertionError.", "Even.")
    if str(zero.get("compute_grad_norm")).lower() in ("false", "0"):
        clip = c.get("gradient_clipping", 1.0)
        if c.stage not in (1, 2):
            yield c.error(f"{at}.compute_grad_norm", "false works with stage 1 and 2 only: DeepSpeed raises.")
        elif is_number(clip) and clip > 0:
            source = "" if "gradient_clipping" in c.config else " by default"
            message = f"false needs gradient_clipping 0, and it is {clip}{source}: DeepSpeed raises ValueError."
            yield c.error(f"{at}.compute_grad_norm", message, 'Add "gradient_clipping": 0.0.')
        elif c.bf16_optimizer():
            yield c.error(f"{at}.compute_grad_norm", "false does not go with bf16 and fp32 accumulation: ValueError.")
        elif c.offload("optimizer") != "none" or zero.get("zenflow"):
            yield c.error(f"{at}.compute_grad_norm", "false does not go with offload_optimizer or zenflow: ValueError.")
    if c.stage >= 2 and zero.get("reduce_scatter", True) and c.get("gradient_allreduce_op", "mean") != "sum":
        for key, neutral in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
            if c.get(key, neutral) not in (neutral, "auto"):
                yield c.error(key, f"ZeRO-{c.stage} with reduce_scatter cannot do that: AssertionError.", "Delete it.")
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        if is_number(zero.get(key)) and 0 < zero[key] < 1000:
            yield c.warning(
                f"{at}.{key}", f"{zero[key]} elements, not megabytes: a message for every few numbers.", "5e8"
            )


def zenflow(c) -> Iterator[Finding]:
    """runtime/zenflow/; runtime/zero/config.py"""
    settings = c.zero.get("zenflow")
    at = "zero_optimization.zenflow"
    if not isinstance(settings, dict) or c.stage_unknown:
        return
    if c.offload("optimizer") == "none":
        message = "ZenFlow needs optimizer offload: DeepSpeed raises ValueError."
        yield c.error(at, message, 'Add "offload_optimizer": {"device": "cpu"}.')
    elif c.stage == 0:
        yield c.error(at, "At stage 0 the first step crashes (no attribute 'reduce_gradients').")
    elif c.other_than_cpu_adam():
        message = "ZenFlow builds its own AdamW from these optimizer params: TypeError."
        yield c.error(at, message, c.other_than_cpu_adam())
    automatic = settings.get("select_strategy", "auto") == "auto"
    if automatic == isinstance(settings.get("select_interval", "auto"), int):
        message = 'A number goes with select_strategy "step" or "epoch", and "auto" with "auto": DeepSpeed raises.'
        yield c.error(f"{at}.select_interval", message)


def offload(c) -> Iterator[Finding]:
    """runtime/zero/offload_config.py, runtime/zero/stage_1_and_2.py, runtime/swap_tensor/"""
    devices = []
    for what in ("optimizer", "param"):
        path = f"zero_optimization.offload_{what}"
        section, device = c.section(path), c.offload(what)
        old = "cpu_offload" if what == "optimizer" else "cpu_offload_param"
        where = path if section else f"zero_optimization.{old}"
        devices.append(device)
        ratio = section.get("ratio", 1.0)
        if is_number(ratio) and 0 <= ratio < 1 and not c.stage_unknown:
            if c.stage < 3:
                yield c.error(f"{path}.ratio", "Partial offload works at stage 3 only: DeepSpeed raises.", "1.0")
            elif device != "none" and c.other_than_cpu_adam():
                message = "Partial offload works with DeepSpeedCPUAdam only: DeepSpeed raises AssertionError."
                yield c.error(f"{path}.ratio", message, c.other_than_cpu_adam())
        if f"offload_{what}" in c.zero and c.zero.get(old, "auto") != "auto":  # false counts as well
            yield c.error(
                f"zero_optimization.{old}", f"Not together with offload_{what}: AssertionError.", "Delete it."
            )
        if device not in ("cpu", "nvme"):
            if section and "device" not in section:
                yield c.warning(f"{path}.device", 'Without "device" nothing is offloaded.', 'Add "device": "cpu".')
            continue
        if c.stage_unknown:
            continue
        if what == "param" and c.stage < 3:
            yield c.error(where, f"Ignored in silence at stage {c.stage}: only stage 3 offloads parameters.")
        elif c.stage == 0:
            yield c.error(where, "ZeRO is off: nothing is offloaded, and Adam is swapped for DeepSpeedCPUAdam.")
        elif device == "nvme" and c.stage < 3:
            yield c.error(f"{path}.device", f"At stage {c.stage} nvme silently means cpu; only stage 3 writes to NVMe.")
        elif device == "nvme" and not section.get("nvme_path"):
            message = "NVMe without a path: DeepSpeed raises (expected str, bytes or os.PathLike object, not NoneType)."
            yield c.error(f"{path}.nvme_path", message, 'Add "nvme_path": "/local_nvme".')
        if truthy(section.get("super_offload")) and c.stage < 3:
            yield c.warning(f"{path}.super_offload", f"Does nothing at stage {c.stage}: read at stage 3 only.")
        if "pin_memory" not in section and section:
            yield c.note(
                f"{path}.pin_memory",
                "pin_memory is on by default since 0.19.5; with little host memory set it to false.",
            )
    if "aio" in c.config and "nvme" not in devices and c.get("aio") and not c.tuning:
        yield c.note("aio", "Does nothing without offload to nvme.")


def needs_cuda(c) -> Iterator[Finding]:
    """runtime/swap_tensor/aio_config.py, runtime/zero/partition_parameters.py (quantizer op), runtime/data_pipeline"""
    for path in ("aio.use_gds", "zero_optimization.zero_quantized_weights", "compile.deepcompile",
                 "zero_optimization.zero_quantized_nontrainable_weights"):  # fmt: skip
        if truthy(c.get(path)) and (c.stage == 3 or "zero_" not in path):
            message = "Takes effect only when your code calls engine.compile()." if path[0] == "c" else ""
            yield c.note(path, message or "Works on CUDA only: on CPU ranks DeepSpeed raises at initialize().")
    for section, needed in (("data_sampling.curriculum_learning", "curriculum_metrics"),
                            ("data_sampling.dynamic_batching", "max_tokens"),
                            ("data_routing.random_ltd", "total_layer_num")):  # fmt: skip
        path = f"data_efficiency.{section}"
        if truthy(c.get(f"{path}.enabled")) and needed not in c.section(path):
            yield c.error(f"{path}.{needed}", "Missing: DeepSpeed raises at initialize().")


def communication(c) -> Iterator[Finding]:
    """runtime/config.py _do_error_check; runtime/engine.py _do_sanity_check; runtime/pipe/engine.py"""
    if str(c.get("gradient_allreduce_op")).lower() == "sum":
        bad = [n for n, on in (("ZeRO stage 3", c.stage == 3), ("ZenFlow", c.zero.get("zenflow")),
                               ("DeepCompile", truthy(c.get("compile.deepcompile")))) if on]  # fmt: skip
        if bad:
            yield c.error(
                "gradient_allreduce_op", f'"sum" is not supported with {bad[0]}: DeepSpeed raises ValueError.'
            )
    if c.get("managed_gradient_accumulation") is False:
        if c.stage < 2 and truthy(c.zero.get("overlap_comm")):
            message = "false goes with overlap_comm at stage 2 and 3 only: AssertionError."
            yield c.error("managed_gradient_accumulation", message)
        if c.pipeline:
            yield c.error("managed_gradient_accumulation", "false is not supported with pipeline parallelism.")
    if c.pipeline and c.stage >= 2:
        message = f"A PipelineModule refuses ZeRO-{c.stage} (AssertionError); any other model ignores this section."
        yield c.error("pipeline", message, "ZeRO stage 1, or no pipeline section.")
    if c.get("steps_per_print") == 0 and c.get("steps_per_print") is not None:
        yield c.error(
            "steps_per_print", "0 crashes the first step with ZeroDivisionError.", "Leave it out to be quiet."
        )
    elif is_number(c.get("steps_per_print")) and c.get("steps_per_print") < 0:
        yield c.warning("steps_per_print", "A negative number does not silence the report.", "Leave it out.")
    size = c.get("tensor_parallel.autotp_size", 0)
    if "autotp" in str(c.get("compile.passes", "")) and not (is_number(size) and size > 1):
        yield c.error("compile.passes", "The autotp pass needs tensor_parallel.autotp_size > 1.")


def backend(c, kind, params):
    """Which constructor DeepSpeed will call (runtime/engine.py _configure_basic_optimizer), and what it takes."""
    table = schema()["x-deepspeed"]["optimizers"]
    name = str(kind).lower()
    on_cpu = c.offload("optimizer") in ("cpu", "nvme")
    if name in ("adam", "adamw"):
        if params.get("torch_adam"):
            chosen = "torch.Adam" if name == "adam" and params.get("adam_w_mode", True) is False else "torch.AdamW"
        else:
            chosen = "DeepSpeedCPUAdam" if on_cpu else "FusedAdam"
        popped = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
        return chosen, set(table[chosen]["params"]) - {"adamw_mode"} | popped
    chosen = {
        "adagrad": "DeepSpeedCPUAdagrad" if on_cpu else "torch.Adagrad",
        "lamb": "FusedLamb",
        "lion": "DeepSpeedCPULion" if on_cpu else "FusedLion",
        "muon": "Muon",
    }.get(name, f"torch.{kind}")
    return (chosen, set(table[chosen]["params"])) if chosen in table else (None, set())


def optimizer(c) -> Iterator[Finding]:
    """runtime/engine.py _configure_basic_optimizer, _do_optimizer_sanity_check"""
    section = c.get("optimizer")
    if section is None and not c.hf and not c.tuning and "optimizer" not in c.config:
        message = "No optimizer here: pass one to deepspeed.initialize(), or "
        effect = {0: "backward() raises.", 3: "the first step crashes."}.get(c.stage, "ZeRO raises at initialize().")
        yield c.note("optimizer", message + effect)
    if not isinstance(section, dict):
        return
    kind, params = section.get("type"), section.get("params")
    if kind is None:
        fix = 'Add "type": "AdamW".' if "name" not in section else 'Rename "name" to "type".'
        yield c.error("optimizer.type", "Without a type the whole section is ignored: there is no optimizer.", fix)
        return
    if not isinstance(kind, str):
        yield c.error("optimizer.type", f"{json.dumps(kind)} is not a name: DeepSpeed crashes.", '"AdamW"')
        return
    params = params if isinstance(params, dict) else {}
    chosen, allowed = backend(c, kind, params)
    if kind.lower() in ("muadam", "muadamw", "musgd"):
        yield c.note("optimizer.type", f"{kind} needs the mup package; without it DeepSpeed raises UnboundLocalError.")
    elif chosen is None:
        yield from unknown_optimizer(c, kind)
        return
    if not params and not isinstance(section.get("params"), str):
        yield c.warning(
            "optimizer.params", "No params: the optimizer trains with its default learning rate.", '"params": {...}'
        )
    for name in params:
        path = f"optimizer.params.{name}"
        if name == "max_grad_norm":
            yield c.error(path, "DeepSpeed raises ValueError.", "Set gradient_clipping at top level.")
        elif chosen and name not in allowed:
            effect = "ignores it in silence" if chosen == "Muon" else "raises TypeError (unexpected keyword)"
            tip = ""
            if chosen in ("FusedAdam", "DeepSpeedCPUAdam") and name in ("foreach", "fused", "capturable", "maximize"):
                tip = 'A torch option: add "torch_adam": true.'
            yield c.error(
                path, f"{chosen} {effect}.", tip or suggest(sorted(allowed), name, ("optimizer", "params", name))
            )
    yield from optimizer_values(c, kind, chosen, params)
    lower = kind.lower()
    untested = chosen in ("FusedLamb",) or lower.startswith("mu") and chosen is None or str(chosen).startswith("torch.")
    untested = untested and chosen not in ("torch.Adam", "torch.AdamW", "torch.Adagrad")
    if untested and c.stage > 0 and not c.stage_unknown and not c.get("zero_allow_untested_optimizer"):
        message = f"{kind} is untested with ZeRO: DeepSpeed raises AssertionError."
        yield c.error("optimizer.type", message, 'Add "zero_allow_untested_optimizer": true, or use AdamW.')
    if lower == "adam" and params.get("adam_w_mode", True) is True and params.get("weight_decay") not in (None, 0):
        message = '"Adam" is AdamW (decoupled weight decay) in DeepSpeed unless adam_w_mode is false.'
        yield c.note("optimizer.type", message)
    if lower == "adamw" and params.get("adam_w_mode") is False:
        yield c.warning("optimizer.params.adam_w_mode", "Ignored: type AdamW stays AdamW.", 'Use "type": "Adam".')


def unknown_optimizer(c, kind):
    removed = {"onebitadam": "AdamW", "zerooneadam": "AdamW", "onebitlamb": "Lamb"}
    aliases = {"fusedadam": "AdamW", "deepspeedcpuadam": "AdamW with offload_optimizer", "cpuadam": "AdamW",
               "fusedlamb": "Lamb", "fusedlion": "Lion", "paged_adamw": "AdamW", "adamw_torch": "AdamW",
               "adamw_hf": "AdamW", "adamw_torch_fused": "AdamW", "adamw8bit": "AdamW"}  # fmt: skip
    names = {o.split(".")[-1] for o in schema()["x-deepspeed"]["optimizers"]} - {"FusedAdam", "FusedLamb", "FusedLion"}
    names |= {"Lamb", "Lion"}
    same = next((n for n in sorted(names) if plain(n) == plain(kind)), None)
    near = [same] if same else difflib.get_close_matches(kind, sorted(names), 1)
    if kind.lower() in removed:
        fix = f'Removed from DeepSpeed 0.19. Use "{removed[kind.lower()]}".'
    elif kind.lower() in aliases:
        fix = f"Use {aliases[kind.lower()]}: DeepSpeed picks the implementation itself."
    else:
        fix = "Use AdamW, Adam, Adagrad, Lamb, Lion, Muon or a torch.optim class."
        fix = f'Did you mean "{near[0]}"?' if near else fix
    message = f"{kind} is not a supported DeepSpeed optimizer: AssertionError."
    yield c.error("optimizer.type", message, fix)


def optimizer_values(c, kind, chosen, params):
    lr = params.get("lr")
    if params and "lr" not in params and chosen != "Muon" and kind.lower() not in ("adadelta", "adafactor"):
        yield c.note("optimizer.params.lr", "No lr: the optimizer's default is used (1e-3 for Adam and AdamW).")
    if is_number(lr) and lr >= 1 and kind.lower() not in ("adadelta", "lbfgs", "musgd", "sgd", "rprop"):
        yield c.warning("optimizer.params.lr", f"{lr} is a very large learning rate.", "1e-5 to 1e-3 is usual.")
    if lr == 0 and is_number(lr) and "scheduler" not in c.config:
        yield c.error("optimizer.params.lr", "0: nothing is trained.", "1e-5 to 1e-3 is usual.")
    if isinstance(params.get("eps"), list) and kind.lower() != "adafactor":
        yield c.error("optimizer.params.eps", f"{kind} takes one number: TypeError.", "1e-8")
    decay = params.get("weight_decay")
    if is_number(decay) and decay >= 1:
        yield c.warning("optimizer.params.weight_decay", f"{decay} is very large.", "0.01 to 0.1 is usual.")
    if chosen == "FusedAdam" and truthy(params.get("amsgrad")):
        yield c.error("optimizer.params.amsgrad", "FusedAdam raises RuntimeError on it.", '"torch_adam": true')


def scheduler(c) -> Iterator[Finding]:
    """runtime/lr_schedules.py; runtime/engine.py _scheduler_from_config"""
    section = c.get("scheduler")
    if not isinstance(section, dict):
        return
    kind, params = section.get("type"), section.get("params")
    if kind is None:
        fix = 'Rename "name" to "type".' if "name" in section else 'Add "type": "WarmupLR".'
        yield c.error(
            "scheduler.type", "Without a type the whole section is ignored: the learning rate is constant.", fix
        )
        return
    table = schema()["x-deepspeed"]["schedulers"]
    ours = isinstance(kind, str) and kind in table
    known = table.get(kind) or table.get(f"torch.{kind}") if isinstance(kind, str) else None
    if not known:
        near = {n.lower(): n for n in table if not n.startswith("torch.")}
        hf = {"linear": "WarmupDecayLR", "cosine": "WarmupCosineLR", "constant_with_warmup": "WarmupLR",
              "warmupcosinedecaylr": "WarmupCosineLR", "warmuplineardecaylr": "WarmupDecayLR"}  # fmt: skip
        low = str(kind).lower()
        guess = hf.get(low) or near.get(low) or next(iter(difflib.get_close_matches(str(kind), near.values(), 1)), None)
        fix = f'Did you mean "{guess}"?' if guess else f"One of {', '.join(near.values())}."
        yield c.error("scheduler.type", f"DeepSpeed does not recognize LR scheduler {kind}: AssertionError.", fix)
        return
    if not isinstance(params, dict):
        if params is None and "params" not in section:
            message = "No params: DeepSpeed raises TypeError (argument after ** must be a mapping, not NoneType)."
            yield c.error("scheduler.params", message, 'Add "params": {...}.')
        return
    for name in params:
        if name not in known["params"]:
            fix = suggest(known["params"], name, ("scheduler", "params", name))
            if kind == "WarmupLR" and name == "total_num_steps":
                fix = "WarmupLR never decays: use WarmupDecayLR or WarmupCosineLR, or leave it out."
            if kind == "WarmupCosineLR" and name.startswith(("warmup_m", "lr")):
                fix = "It scales optimizer.params.lr by warmup_min_ratio ... 1 ... cos_min_ratio."
            yield c.error(f"scheduler.params.{name}", f"{kind} raises TypeError (unexpected keyword).", fix)
    missing = [n for n in known["required"] if n not in params]
    if missing:
        message = f"{kind} needs {', '.join(missing)}: DeepSpeed raises TypeError."
        yield c.error(f"scheduler.params.{missing[0]}", message)
    wrapped = (c.stage > 0 and not c.stage_unknown) or c.fp16 or c.bf16
    if not ours and wrapped:
        message = f"torch's {kind} wants a torch optimizer and gets DeepSpeed's wrapper: TypeError at initialize()."
        yield c.error("scheduler.type", message, "Use WarmupCosineLR or WarmupDecayLR, or pass the scheduler in code.")
    yield from scheduler_values(c, kind, params)


def scheduler_values(c, kind, params):
    warmup, total = params.get("warmup_num_steps", 1000), params.get("total_num_steps")
    if kind in ("WarmupDecayLR", "WarmupCosineLR") and is_number(warmup) and is_number(total) and 0 < total < warmup:
        source = "" if "warmup_num_steps" in params else " (the default)"
        yield c.warning(
            "scheduler.params.warmup_num_steps",
            f"{warmup} warmup steps{source} in a run of {total}: lr never gets to its maximum.",
        )
    lr, top, low = c.get("optimizer.params.lr"), params.get("warmup_max_lr"), params.get("warmup_min_lr", 0)
    if kind == "WarmupDecayLR" and top is None and "warmup_max_lr" not in params and is_number(lr) and lr != 0.001:
        message = f"WarmupDecayLR without warmup_max_lr climbs to its own default, 0.001, not to the optimizer's {lr}."
        yield c.error("scheduler.params.warmup_max_lr", message, f'Add "warmup_max_lr": {lr}.')
    if kind in ("WarmupLR", "WarmupDecayLR") and is_number(lr) and is_number(top) and lr != top:
        yield c.note("scheduler.params.warmup_max_lr", f"The schedule wins: lr goes to {top}, and {lr} is never used.")
    if is_number(top) and is_number(low) and low > top:
        yield c.warning(
            "scheduler.params.warmup_min_lr", f"{low} is above warmup_max_lr {top}: lr falls during warmup."
        )
    cycle = params.get("cycle_min_lr"), params.get("cycle_max_lr")
    if kind == "OneCycle" and all(map(is_number, cycle)) and cycle[0] > cycle[1]:
        yield c.warning("scheduler.params.cycle_min_lr", f"{cycle[0]} is above cycle_max_lr {cycle[1]}: upside down.")
    if is_number(top) and top >= 1:
        yield c.warning("scheduler.params.warmup_max_lr", f"{top} is a very large learning rate.")


def does_nothing(c) -> Iterator[Finding]:
    """Sections that are read but have no effect as written (runtime/activation_checkpointing/checkpointing.py,
    monitor/, runtime/pipe/engine.py, and every section with an "enabled" that is false by default)"""
    for name, value in c.config.items():
        node = unwrap(schema()["properties"].get(name, {}))
        switch = unwrap(node.get("properties", {}).get("enabled", {}))
        if not isinstance(value, dict) or switch.get("default") is not False or c.tuning:
            continue
        others = [k for k in value if k in node["properties"] and k != "enabled"]
        if "enabled" not in value and others and not any(plain(k) in ("enable", "enabled") for k in value):
            yield c.warning(f"{name}.enabled", 'Off: there is no "enabled": true in it.', 'Add "enabled": true.')
        elif value.get("enabled") is False and name in ("fp16", "bf16") and others:
            yield c.note(f"{name}.enabled", f"Off, so {', '.join(others[:3])}{' ...' * (len(others) > 3)} do nothing.")
    active = c.section("activation_checkpointing")
    if active:
        message = (
            "Does nothing by itself: only deepspeed.checkpointing.configure() in your code reads it, and only "
            "deepspeed.checkpointing.checkpoint() obeys it."
        )
        level = "warning" if any(truthy(v) for v in active.values()) else "note"
        yield c.find(level, "activation_checkpointing", message, "HF models: model.gradient_checkpointing_enable().")
    unused = [k for k in ("stages", "partition", "seed_layers") if k in c.section("pipeline")]
    if unused:
        message = f"DeepSpeed reads {', '.join(unused)} nowhere: PipelineModule's arguments decide."
        yield c.warning(f"pipeline.{unused[0]}", message, "PipelineModule(num_stages=..., partition_method=...).")
    monitors = [m for m in ("tensorboard", "wandb", "csv_monitor", "comet") if truthy(c.get(f"{m}.enabled"))]
    if monitors and not c.hf:
        message = "Writes lr and a few more by itself; the loss of a plain loop needs engine.monitor.write_events()."
        yield c.note(monitors[0], message)


def defaults(c) -> Iterator[Finding]:
    """Defaults that changed, or that surprise"""
    if "gradient_clipping" not in c.config:
        message, fix = "Gradients are clipped to norm 1.0 by default since 0.19.3.", 'Off: "gradient_clipping": 0.0.'
        if c.hf:
            message = "Clipped to norm 1.0: without this key the Trainer's max_grad_norm is not passed on."
            fix = '"gradient_clipping": "auto"'
        yield c.note("gradient_clipping", message, fix)


def hugging_face(c) -> Iterator[Finding]:
    """accelerate/utils/dataclasses.py DeepSpeedPlugin; transformers/integrations/deepspeed.py"""
    if c.hf and "zero_optimization" not in c.config:
        yield c.error(
            "zero_optimization",
            "No zero_optimization section: Accelerate raises ValueError.",
            'Add it, even as {"stage": 0}.',
        )
    if c.hf and isinstance(c.get("zero_optimization"), bool):
        yield c.error("zero_optimization", "transformers and Accelerate cannot read this form.", 'Write {"stage": 1}.')


def swallowed_commas(c) -> Iterator[Finding]:
    """hjson/decoder.py scantfnns: text without quotes runs to the end of the line"""
    for path in c.lines:
        value = c.config
        for part in path:
            value = value[part]
        if isinstance(value, Quoteless) and value.endswith(","):
            message = f"Without quotes this is read as {json.dumps(value)}, comma included."
            yield c.error(".".join(map(str, path)), message, f'Write "{value.rstrip(",")}".')


RULES = [
    batch_arithmetic, world_size_divides, precision, torch_autocast, loss_scale, low_precision_states, data_types,
    zero_stage, zenflow, offload, needs_cuda, communication, optimizer, scheduler, does_nothing, defaults,
    hugging_face, swallowed_commas]  # fmt: skip


# --- checking a file ------------------------------------------------------------------------------------------------


def read(source):
    """Bytes or text of a config as text. ValueError with one sentence for what cannot be a config."""
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


def not_a_config(config):
    """One sentence when the JSON is plainly something else, or None."""
    if isinstance(config, list):
        return "This is a list; a DeepSpeed config is an object { ... }."
    if not isinstance(config, dict):
        return f"This is a single {type(config).__name__.lower().replace('quoteless', 'text')}, not a DeepSpeed config."
    if not config:
        return "This is empty: DeepSpeed needs at least a batch size."
    root = schema()["properties"]
    removed = schema()["x-deepspeed"]["removed"][""]
    if any(k in root or k in removed for k in config if k != "$schema"):
        return None
    if isinstance(config.get("deepspeed_config"), dict) or isinstance(config.get("fsdp_config"), dict):
        return "This is an Accelerate config; DeepSpeed's own config is another file, named in deepspeed_config_file."
    likely = [k for k in config if difflib.get_close_matches(k.lower(), root, 1, 0.8) or plain(k) in map(plain, root)]
    likely += [k for k in config if k.lower() in ELSEWHERE and k.lower() not in ("name", "path")]
    if len(likely) * 2 < len(config):
        some = ", ".join(list(config)[:3])
        return f"This does not look like a DeepSpeed config: it has {some}, and no key that DeepSpeed reads."
    return None


def check(source, world_size=None, hf=False):
    """All findings on one config, in the order of its lines.

    source      a dict, a path (str or Path), the JSON text itself (str that holds a "{" or a line break), or bytes
    world_size  number of ranks; None leaves the batch arithmetic open where it depends on it
    hf          True for the Hugging Face Trainer and Accelerate: they fill in "auto", and read JSON strictly.
                A file called *_hf.json is for them by its name.

    Raises OSError when there is no such file.
    """
    lines = {}
    first = []
    if isinstance(source, dict):
        config = source
    else:
        if isinstance(source, Path) or (isinstance(source, str) and source and not re.search(r"[{\n]", source)):
            hf = hf or str(source).endswith("_hf.json")
            with open(source, "rb") as file:
                source = file.read(MAX_BYTES + 1)
                size = os.fstat(file.fileno()).st_size
                source = source if size <= MAX_BYTES else source + b" " * min(size - len(source), 9 * MAX_BYTES)
        try:
            text = read(source)
            reader = Reader(text)
            config = reader.read()
        except ParseError as error:
            return [Finding("error", "", f"Not readable as JSON or hjson: {error}.", "", error.line)]
        except RecursionError:
            return [Finding("error", "", "Nested thousands of levels deep: this is no DeepSpeed config.")]
        except ValueError as error:
            return [Finding("error", "", str(error))]
        lines = reader.lines
        for path, line in reader.duplicates:
            dotted = ".".join(map(str, path))
            effect = "json.load keeps the last one in silence" if hf else "DeepSpeed raises ValueError"
            first.append(Finding("error", dotted, f"This key is there twice: {effect}.", "Delete one.", line))
    sentence = not_a_config(config)
    if sentence:
        return [Finding("error", "", sentence)]
    if hf and not isinstance(source, dict):
        try:
            config = json.loads(text)  # keeps 2.0 a float, as they do
        except ValueError as error:
            line = getattr(error, "lineno", None)
            message = f"transformers and Accelerate read the file with json.load, which fails here ({error.args[0]})."
            first.append(Finding("error", "", message, "No comments, trailing commas or unquoted text.", line))
    context = Context(config, lines, world_size, hf)
    found = first + list(walk(context, schema(), config)) + [f for rule in RULES for f in rule(context)]
    unique = {(f.level, f.path, f.message): f for f in found}.values()
    return sorted(unique, key=lambda f: (LEVELS.index(f.level), f.line or 0))


# --- command line ---------------------------------------------------------------------------------------------------


def show(name, findings, colour):
    paint = {"error": "31", "warning": "33", "note": "36"} if colour else {}
    for f in findings:
        code = paint.get(f.level)
        level = f"\x1b[1;{code}m{f.level}\x1b[0m" if code else f.level
        at = f"{name}:{f.line}" if f.line else name
        print(f"{at}: {level}: {f.path + ': ' if f.path else ''}{f.message}")
        if f.fix:
            print(f"    {f.fix}")
    counts = [f"{n} {level}{'s' * (n != 1)}" for level in LEVELS if (n := sum(f.level == level for f in findings))]
    print(f"{name}: {', '.join(counts) or 'nothing to say'}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Say what DeepSpeed 0.19.8 really does with a config.")
    parser.add_argument("configs", nargs="+", metavar="my.json")
    parser.add_argument("--world_size", "--world-size", type=int, help="number of ranks the config will run on")
    parser.add_argument("--hf", action="store_true", help='for the HF Trainer or Accelerate: they fill in "auto"')
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(argv)
    if args.world_size is not None and args.world_size < 1:
        parser.error(f"--world_size must be at least 1, got {args.world_size}")
    code = 0
    report = {}
    for name in args.configs:
        try:
            findings = check(Path(name), args.world_size, args.hf)
        except OSError as error:
            print(f"{name}: cannot be read: {error.strerror}.", file=sys.stderr)
            code = 2
            continue
        code = max(code, int(any(f.level == "error" for f in findings)))
        report[name] = [asdict(f) for f in findings]
        if not args.json:
            show(name, findings, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    if args.json:
        print(json.dumps(report, indent=2))
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `check.py my.json | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
