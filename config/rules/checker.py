"""check(): a config in, findings out."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from config.rules import SECTIONS, kinds
from config.rules.finding import LEVELS, MODES, Context, Finding, Rule, named
from config.rules.reader import ParseError, Quoteless, Reader
from config.rules.values import values

KINDS = "file/kind"  # the rule of a finding that says: this is no DeepSpeed config


def all_rules() -> list[Rule]:
    return [rule for section in SECTIONS for rule in section.RULES]


def check(
    source: dict | str | Path | bytes, world_size: int | None = None, hf: bool = False, mode: str | None = None
) -> list[Finding]:
    """All findings on one config: errors first, each level in the order of its lines.

    source      a dict, a path (str or Path), the JSON text itself (str that holds a "{" or a line break), or bytes
    world_size  number of ranks; None leaves the batch arithmetic open where it depends on it
    mode        who reads the config: "deepspeed", "trainer", "accelerate", "hf" (one of these two) or "lightning";
                None guesses, as only Hugging Face fills in "auto"
    hf          True is mode="hf"

    Raises OSError when there is no such file, ValueError for an unknown mode.
    """
    mode = mode or ("hf" if hf else None)
    if mode not in (None, *MODES):
        raise ValueError(f"mode is {mode!r}, and must be one of {', '.join(MODES)}")
    if isinstance(source, dict):
        return check_config(source, mode, world_size)
    name = ""
    if isinstance(source, Path) or (isinstance(source, str) and source and not re.search(r"[{\n]", source)):
        name, source = Path(source).name, bytes_of(source)
    try:
        text = kinds.as_text(source)
    except ValueError as error:
        return [Finding("error", "", str(error), rule=KINDS)]
    return check_text(text, mode, world_size, name)


def check_text(text: str, mode: str | None, world_size: int | None, name: str = "") -> list[Finding]:
    """check() for the text of a file called `name`."""
    reader = Reader(text)
    try:
        config = reader.read()
    except ParseError as error:
        if sentence := kinds.template(text):
            return [Finding("error", "", sentence, "", error.line, "file/template")]
        return [Finding("error", "", f"Not readable as JSON or hjson: {error}.", "", error.line, "file/syntax")]
    except RecursionError:
        return [Finding("error", "", "Nested thousands of levels deep: this is no DeepSpeed config.", rule=KINDS)]
    return check_config(config, mode, world_size, reader, name)


def bytes_of(path: str | Path) -> bytes:
    """At most a little more than a config can have, whatever stands at `path`."""
    with open(path, "rb") as file:
        data = file.read(kinds.MAX_BYTES + 1)
        size = os.fstat(file.fileno()).st_size
    return data if size <= kinds.MAX_BYTES else data + b" " * min(size - len(data), 9 * kinds.MAX_BYTES)


def check_config(config, mode, world_size, reader=None, name="") -> list[Finding]:
    if sentence := kinds.not_a_config(config):
        return [Finding("error", "", sentence, rule=KINDS)]
    guessed, tell = mode is None, ()
    if guessed:
        mode, tell = kinds.guess_mode(config, name)
    found = []
    if reader and mode != "deepspeed":
        as_json, problem = kinds.strict_json(reader.text)
        config = as_json if problem is None else config
        found += [problem] if problem else []
    c = Context(config, mode, guessed, world_size, reader)
    if tell and not name.endswith("_hf.json"):
        what = '"auto" is filled in' if tell[0] != "autotuning" else "These arguments are filled in"
        message = f"{what} by Hugging Face alone, so this is checked as for {kinds.READERS[mode]}."
        fix = "Say who reads it: --for trainer, accelerate or deepspeed."
        found += named("file/mode", [c.note(".".join(tell), message, fix)])
    found += named("file/duplicate", duplicates(c))
    found += named("file/unfilled", kinds.set_aside(c))
    found += values(c)
    for rule in all_rules():
        found += named(rule.id, rule.check(c))
    at = {f.path for f in found if f.level == "error"}
    found += named("file/swallowed-comma", (f for f in swallowed_commas(c) if f.path not in at))
    return in_order(found)


def in_order(findings: list[Finding]) -> list[Finding]:
    unique = {(f.level, f.path, f.message): f for f in findings}.values()
    return sorted(unique, key=lambda f: (LEVELS.index(f.level), f.line or 0))


def duplicates(c) -> Iterator[Finding]:
    for path, line in c.reader.duplicates if c.reader else ():
        effect = "DeepSpeed raises ValueError" if c.mode == "deepspeed" else "json.load keeps the last one in silence"
        found = c.error(".".join(map(str, path)), f"This key is there twice: {effect}.", "Delete one.")
        found.line = line
        yield found


def swallowed_commas(c) -> Iterator[Finding]:
    """hjson/decoder.py scantfnns: text without quotes runs to the end of the line."""
    if not c.reader or c.mode != "deepspeed":
        return

    def walk(value, path) -> Iterator[Finding]:
        inside: Callable = value.items if isinstance(value, dict) else lambda: enumerate(value)
        if isinstance(value, (dict, list)):
            for name, child in inside():
                yield from walk(child, (*path, name))
        elif isinstance(value, Quoteless) and value.endswith(","):
            word = value.rstrip(",")
            message = f'Without quotes this is read as "{value}", comma included.'
            yield c.error(".".join(map(str, path)), message, f'Write "{word}".')

    yield from walk(c.config, ())
