"""Repairs the text of a config where findings say how, and leaves everything else as it is: comments, order, spaces."""

import difflib
import json
import re

from config.rules.finding import Edit, Finding
from config.rules.reader import SKIP, Reader, Span

ORDER = ("rename", "set", "delete", "add")  # what a renamed key brings need not be added


def fixed(text: str, findings: list[Finding]) -> str:
    """`text` after the edits of `findings`. One at a time, so that each finds the text that the last one left."""
    edits = {repr(edit): edit for finding in findings for edit in finding.edits}  # a value need not be hashable
    for edit in sorted(edits.values(), key=lambda edit: ORDER.index(edit.do)):
        text = apply(text, edit)
    return text


def diff(before: str, after: str, name: str) -> str:
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), name, f"{name} (fixed)")
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def apply(text: str, edit: Edit) -> str:
    """`text` with one edit; unchanged where the edit has become needless."""
    reader = Reader(text)
    reader.read()
    text, span = reader.text, reader.spans.get(edit.path)
    if span is None:
        return add(text, reader, edit) if edit.do == "add" else text
    if edit.do == "rename" and (*edit.path[:-1], edit.value) not in reader.spans:
        return text[: span.key] + json.dumps(edit.value) + text[span.key_end :]
    if edit.do == "set":
        return text[: span.value] + json.dumps(edit.value) + text[span.value_end :]
    return delete(text, span) if edit.do == "delete" else text


def delete(text: str, span: Span) -> str:
    """Take out a key with its value and one comma; the whole line where it stands alone on its lines."""
    start, end = span.key, span.value_end
    after = re.compile(r"[ \t\r\n]*,").match(text, end)
    before = re.compile(r",[ \t\r\n]*\Z").search(text[:start])
    if after:
        end = after.end()
    elif before and SKIP.sub("", text[end:], 1)[:1] in ("}", ""):  # the comma before the last key
        start = before.start()
        return text[:start] + text[end:]
    line = text.rfind("\n", 0, start) + 1
    rest = re.compile(r"[ \t]*\r?\n").match(text, end)
    if not text[line:start].strip() and rest:
        return text[:line] + text[rest.end() :]
    return text[:start] + text[end:].lstrip(" \t")


def add(text: str, reader: Reader, edit: Edit) -> str:
    """Put a key first into its section, indented as the key that is there; make the section where it is missing."""
    parent, name = edit.path[:-1], edit.path[-1]
    if parent and parent not in reader.spans:
        return add(text, reader, Edit("add", parent, {name: edit.value}))
    siblings = [s for p, s in reader.spans.items() if len(p) == len(edit.path) and p[:-1] == parent]
    value = f"{json.dumps(name)}: {json.dumps(edit.value)}"
    if siblings:
        first = siblings[0].key
        line = text.rfind("\n", 0, first) + 1
        alone = line and not text[line:first].strip()
        newline = "\r\n" if text[: line or 0].endswith("\r\n") else "\n"
        return text[:first] + value + "," + (newline + text[line:first] if alone else " ") + text[first:]
    start = reader.spans[parent].value if parent else text.find("{")
    opening = text.find("{", start)
    return text if opening < 0 else text[: opening + 1] + value + text[opening + 1 :]
