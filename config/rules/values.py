"""One key at a time: is the key known, and has its value the type and the range that the schema says?"""

import difflib
import json
import operator
import re
from collections.abc import Iterator

from config.rules.finding import Context, Edit, Finding, delete, is_number, named, put, shown
from config.rules.names import TOLERATED, cure
from config.rules.reader import Quoteless
from config.rules.schema_file import kinds, schema, unwrap

CONSTRUCTORS = {("optimizer", "params"), ("scheduler", "params")}  # optimizer.py and scheduler.py check their keys
SIMILAR = 25  # for so many unknown keys of a file a similar name is looked for: it takes a millisecond each
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


def values(c: Context) -> Iterator[Finding]:
    """Every finding about one key alone."""
    yield from Walk(c).section(schema(), c.config, (), False)


class Walk:
    """A config beside its schema. `lax` means: the section is a pydantic model, which converts "2" and "true"."""

    def __init__(self, c: Context):
        self.c = c
        self.unknown = 0

    def node(self, node, value, path, lax) -> Iterator[Finding]:
        c, dotted = self.c, ".".join(map(str, path))
        node = unwrap(node)
        if value == "auto" and isinstance(value, str):
            yield from named("values/auto", auto(c, node, dotted, lax))
            return
        if c.tuning and isinstance(value, list) and path[0] == "zero_optimization":
            return  # candidates for the autotuner
        verdict = type_problem(node, value, lax, dotted)
        if verdict:
            yield from named("values/type", [c.find(verdict[0], dotted, *verdict[1:])])
            if verdict[0] == "error":
                return
        if isinstance(value, dict) and "properties" in node:
            yield from self.section(node, value, path, lax)
        elif isinstance(value, list) and "items" in node:
            for i, item in enumerate(value):
                yield from self.node(node["items"], item, (*path, i), lax)
        yield from named("values/range", range_problem(c, node, value, dotted, lax))
        if node.get("deprecated") and value is not None and dotted != "zero_optimization.legacy_stage1":
            how = node["deprecationMessage"].removeprefix("Deprecated: ")
            yield from named("values/deprecated", [c.warning(dotted, "Deprecated, though still converted.", how)])

    def section(self, node, value, path, lax) -> Iterator[Finding]:
        pydantic = node["x-unknown"] == "reject" and path not in CONSTRUCTORS
        strange = []
        for name, child in value.items():
            if name in node["properties"]:
                yield from self.node(node["properties"][name], child, (*path, name), pydantic)
            elif path not in CONSTRUCTORS and node.get("additionalProperties") is False:
                strange.append(name)
        yield from named("values/unknown-key", self.unknown_keys(node, strange, path))

    def unknown_keys(self, node, names, path) -> Iterator[Finding]:
        """Removed, misspelt, at the wrong level, borrowed from another library, or unheard of.

        Keys with one cure are one finding: five keys of a loss scale in bf16 are one misunderstanding.
        """
        c, parent = self.c, ".".join(map(str, path))
        rejected = node["x-unknown"] == "reject"
        removed = schema()["x-deepspeed"]["removed"].get(parent, {})
        by_cure: dict[str, list[tuple[str, str, Edit | None]]] = {}
        for name in names:
            dotted = ".".join(map(str, (*path, name)))
            if not rejected and re.match(r"_|//|#|\$schema$|comment", name):
                continue  # people write comments as keys, and where DeepSpeed ignores them that works
            if name in removed:
                why = re.sub(r"\s*See https://\S+", "", removed[name])
                message = f"Removed from DeepSpeed, which refuses the config even when it is off: {why}"
                yield from named("values/removed-key", [c.error(dotted, message, "Delete it.", delete(dotted))])
            elif (*path, name) in TOLERATED:
                level, text = TOLERATED[(*path, name)].split(": ", 1)
                yield c.find(level, dotted, text[0].upper() + text[1:])
            else:
                self.unknown += 1
                search = self.unknown <= SIMILAR
                fix, edit = cure(node["properties"], name, (*path, name), search)
                by_cure.setdefault(fix, []).append((name, dotted, edit))
        for fix, keys in by_cure.items():
            effect = f"DeepSpeed ignores {'them' if len(keys) > 1 else 'it'} in silence"
            effect = "DeepSpeed raises at initialize()" if rejected else effect
            found = c.error(keys[0][1], f"Unknown key: {effect}.", fix)
            found.edits = tuple(edit for _, _, edit in keys if edit)
            if len(keys) > 1:
                listed = ", ".join(name for name, _, _ in keys[:6]) + f" and {len(keys) - 6} more" * (len(keys) > 6)
                found.message = f"{len(keys)} unknown keys, {listed}: {effect}."
            yield found


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
            delete(path),
        )
        return
    filled = ' Only Hugging Face fills it in (check with "--for trainer").' if node.get("x-hf-auto") else ""
    if lax and "object" not in kinds(node):
        default = json.dumps(node.get("default"))
        off = path.endswith(("stage", "enabled", "device"))
        message = f'DeepSpeed drops "auto" in silence and uses the default, {default}.{filled}'
        yield c.find("error" if off else "warning", path, message, "Write a value.")
    else:
        message = f'DeepSpeed takes "auto" as a plain string, and crashes or misreads it.{filled}'
        yield c.error(path, message, "Write a value.")


class Misfit:
    """A value that may not be of the JSON type that its key wants, and the sentences about it."""

    WANT = {"object": "a section {...}", "array": "a list", "integer": "an integer", "boolean": "true or false"}

    def __init__(self, node, value, lax, path):
        self.node, self.value, self.lax, self.path = node, value, lax, path
        self.allowed = kinds(node)
        wants = " or ".join(self.WANT.get(kind, f"a {kind}") for kind in self.allowed if kind != "null")
        self.shown = shown(value)
        self.hint = ""
        if isinstance(value, Quoteless):
            self.shown = f"the text {self.shown}"
            self.hint = " (hjson reads unquoted text up to the end of the line, comma included)"
        self.fix = f"Write {wants}."
        self.edit = None
        if isinstance(value, str) and value.startswith(("True", "False")):
            self.fix = f"Write {wants} (true and false are lower case in JSON)."
        elif (switch := {bool: "enabled", int: "stage"}.get(type(value))) in node.get("properties", {}):
            self.fix = f'Write {{"{switch}": {self.shown}}}.'
            self.edit = put(path, {switch: value})
        early = lax or "object" in self.allowed or path in STRICT_BOOLEANS
        when = "raises at initialize()" if early else "does not check it, and crashes or misreads it when it is used"
        self.rejects = f"{self.shown}{self.hint} is not {wants}: DeepSpeed {when}."
        if isinstance(value, str) and (meant := self.meant()) is not None:
            self.fix, self.edit = f"Write {json.dumps(meant)}.", put(path, meant)

    def meant(self):
        """The number or truth value that stands in quotes, if it is plain which."""
        text = self.value.rstrip(",").strip().lower()
        if "boolean" in self.allowed and text in ("true", "false"):
            return text == "true"
        if {"integer", "number"} & set(self.allowed) and re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", text):
            number = float(text)
            if number == int(number) if abs(number) < 1e18 else False:
                return int(number)
            return number if "number" in self.allowed else None
        return None

    def error(self, message=None):
        return "error", message or self.rejects, self.fix, self.edit

    def warning(self, message):
        return "warning", message, self.fix, self.edit


def type_problem(node, value, lax, path):
    """(level, what happens, fix, edit) when the JSON type is wrong, else None."""
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
    kind = "array" if isinstance(value, (list, tuple)) else "object" if isinstance(value, dict) else "something else"
    return None if kind in misfit.allowed else misfit.error()


def boolean_problem(m):
    if "boolean" in m.allowed:
        return None
    if "object" in m.allowed and m.path == "zero_optimization":
        edit = put(m.path, {"stage": int(m.value)})
        return "warning", f"Deprecated form: {m.shown} means stage {int(m.value)}.", 'Write {"stage": 1}.', edit
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
        m.edit = put(m.path, int(m.value))
        if m.path.startswith("scheduler."):
            return m.error(f"{m.shown} is a float, and DeepSpeed insists on an integer: ValueError.")
        if not m.lax and m.path.startswith(("train_", "gradient_acc")):
            return m.warning(f"{m.shown} stays a float, and so does the batch size.")
        return None
    if "boolean" in m.allowed:
        if m.value in (0, 1):
            m.edit = put(m.path, bool(m.value))
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
        yield not_an_option(c, node, value, path)
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
            yield c.error(path, f"{shown(value)} is out of range (must be {sign} {node[name]}): {effect}.")


def not_an_option(c, node, value, path):
    options = [o for o in node["enum"] if o is not None]
    options = list(dict.fromkeys(o.lower() if isinstance(o, str) else o for o in options))
    near = difflib.get_close_matches(value.lower()[:99], map(str, options), 1) if isinstance(value, str) else []
    effect = "DeepSpeed raises at initialize()" + " when fp16 or bf16 is on" * (path == "data_types.buffer_dtype")
    if path == "scheduler.params.warmup_type":
        effect = 'DeepSpeed logs a warning and uses "log"'
    elif path == "tensor_parallel.preset_model":
        effect = "DeepSpeed finds no such preset and silently goes on without"
    elif path.startswith("autotuning"):
        effect = "the autotuner does not know it"
    hint = f"Did you mean {near[0]!r}?" if near else ""
    message = f"{shown(value)} is none of {', '.join(map(str, options))}: {effect}."
    return c.error(path, message, hint, put(path, near[0]) if near and near[0] in node["enum"] else None)
