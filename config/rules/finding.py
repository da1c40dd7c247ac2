"""What a rule is, what it sees, and what it says."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

LEVELS = ("error", "warning", "note")
MODES = ("deepspeed", "trainer", "accelerate", "hf", "lightning")  # hf: one of trainer and accelerate, unknown which


@dataclass(frozen=True)
class Edit:
    """A repair that needs no thought, for --fix. `do` is "add", "set", "rename" or "delete"."""

    do: str
    path: tuple[str, ...]
    value: object = None  # the value to add or set; the new name of a key


@dataclass
class Finding:
    level: str  # "error", "warning" or "note"
    path: str  # "zero_optimization.stage"; "" for the whole file
    message: str  # what DeepSpeed does with it
    fix: str = ""  # what to write instead
    line: int | None = None  # None when a dict was checked
    rule: str = ""  # "offload/nvme-path": which rule said so
    edits: tuple[Edit, ...] = field(default=(), repr=False)  # what --fix does about it

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{self.level}: {where}{self.path}: {self.message}" + (f" Fix: {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Rule:
    """One thing that one key alone cannot tell. The docstring of `check` is the reason."""

    id: str  # "offload/nvme-path"
    check: Callable[["Context"], Iterator[Finding]]
    file: str  # "deepspeed/runtime/config.py": the file that makes it so, below site-packages
    code: str  # a piece of the line there that does it; config/upgrade.py looks whether it still does
    test: str  # the case of tests/config_mistakes.py that is not found without this rule

    @property
    def reason(self) -> str:
        return " ".join((self.check.__doc__ or "").split())


def rules_of(section: str) -> tuple[list[Rule], Callable]:
    """The list of a section's rules, and the decorator that puts one there."""
    rules: list[Rule] = []

    def rule(file: str, code: str, test: str) -> Callable:
        def put(check):
            name = check.__name__.strip("_").replace("_", "-")
            rules.append(Rule(f"{section}/{name}", check, file, code, test))
            return check

        return put

    return rules, rule


# --- small questions about values -----------------------------------------------------------------------------------


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def truthy(value: object) -> bool:
    """As pydantic reads a boolean: 1 and "yes" are true as well."""
    return value is True or value == 1 or (isinstance(value, str) and value.lower() in ("true", "yes", "on", "1"))


def shown(value: object) -> str:
    """A value for a message: as JSON, and never longer than a line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def usable(value: object) -> bool:
    """False for numbers that no rule can compute with: infinite, not a number, or beyond 64 bits and float."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < 2**63


def named(rule: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings, each with the name of the rule that made it."""
    for finding in findings:
        finding.rule = finding.rule or rule
        yield finding


# --- what the rules see ---------------------------------------------------------------------------------------------


class Context:
    """The config, and what several rules ask of it."""

    def __init__(self, config: dict, mode: str, guessed: bool = False, world_size: int | None = None, reader=None):
        self.config, self.mode, self.guessed, self.world_size, self.reader = config, mode, guessed, world_size, reader
        self.unfilled: set[str] = set()  # keys that hold a placeholder or an unusable number, and are not in `config`
        self.hf = mode in ("trainer", "accelerate", "hf")

    @property
    def tuning(self) -> bool:
        return self.on("autotuning.enabled")  # the autotuner replaces "auto" and lists of candidates

    @property
    def zero(self) -> dict:
        return self.section("zero_optimization")

    @property
    def fp16(self) -> bool:
        return self.on("fp16.enabled")

    @property
    def bf16(self) -> bool:
        return truthy(self.get("bf16.enabled", self.get("bfloat16.enabled")))

    @property
    def pipeline(self) -> bool:
        return "pipeline" in self.config

    @property
    def stage(self) -> int:
        stage = self.get("zero_optimization.stage", 0)
        if isinstance(self.config.get("zero_optimization"), bool):
            stage = int(self.config["zero_optimization"])  # the deprecated form
        return 1 if stage is True else int(stage) if str(stage) in ("1", "2", "3") else 0

    @property
    def stage_unknown(self) -> bool:
        auto = self.hf and self.get("zero_optimization.stage") == "auto"
        return self.tuning or auto or "zero_optimization.stage" in self.unfilled

    def get(self, path: str, default: object = None):
        node = self.config
        for part in path.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return node

    def on(self, path: str) -> bool:
        return truthy(self.get(path))

    def section(self, path: str) -> dict:
        found = self.get(path)
        return found if isinstance(found, dict) else {}

    def offload(self, what: str) -> str:
        """Device of offload_optimizer or offload_param: "none", "cpu" or "nvme"."""
        old = {"optimizer": "cpu_offload", "param": "cpu_offload_param"}[what]
        device = "cpu" if truthy(self.zero.get(old)) else "none"
        device = self.section(f"zero_optimization.offload_{what}").get("device", device)
        return device if device in ("cpu", "nvme") else "none"

    def bf16_optimizer(self) -> bool:
        """The one ZeRO-1 mode that runs in BF16_Optimizer (runtime/engine.py _do_optimizer_sanity_check)."""
        fp32 = str(self.get("data_types.grad_accum_dtype")).removeprefix("torch.") in ("fp32", "float32", "float")
        return self.bf16 and fp32 and self.stage == 1 and self.offload("optimizer") == "none"

    def other_than_cpu_adam(self) -> str:
        """How to get DeepSpeedCPUAdam, when the optimizer section asks for something else under offload."""
        kind = self.get("optimizer.type")
        if isinstance(kind, str) and kind.lower() not in ("adam", "adamw"):
            return 'Use "type": "AdamW".'
        return "Delete torch_adam." if self.get("optimizer.params.torch_adam") else ""

    def optimizer_in_code(self) -> bool:
        """Nothing in the file makes an optimizer, so the program does."""
        return self.config.get("optimizer") is None and not self.tuning

    def find(self, level: str, path: str, message: str, fix: str = "", edit: Edit | None = None) -> Finding:
        line = self.reader.line(tuple(path.split(".")) if path else ()) if self.reader else None
        return Finding(level, path, message, fix, line, edits=(edit,) if edit else ())

    def error(self, path: str, message: str, fix: str = "", edit: Edit | None = None) -> Finding:
        return self.find("error", path, message, fix, edit)

    def warning(self, path: str, message: str, fix: str = "", edit: Edit | None = None) -> Finding:
        return self.find("warning", path, message, fix, edit)

    def note(self, path: str, message: str, fix: str = "", edit: Edit | None = None) -> Finding:
        return self.find("note", path, message, fix, edit)


def delete(path: str) -> Edit:
    return Edit("delete", tuple(path.split(".")))


def add(path: str, value: object) -> Edit:
    return Edit("add", tuple(path.split(".")), value)


def put(path: str, value: object) -> Edit:
    return Edit("set", tuple(path.split(".")), value)


def rename(path: str, name: str) -> Edit:
    return Edit("rename", tuple(path.split(".")), name)
