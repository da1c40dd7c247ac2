"""Reads hjson as DeepSpeed reads it, and remembers where everything stands.

    from config.rules.reader import Reader
    reader = Reader(text); config = reader.read(); reader.line(("zero_optimization", "stage"))

Not config/read.py, which knows no lines and needs hjson: findings name the line, duplicate keys are all of them listed,
--fix edits the text between its comments, and the checker runs where nothing but Python is installed.
"""

import bisect
import json
import re
import textwrap
from dataclasses import dataclass


class ParseError(ValueError):
    def __init__(self, message: str, text: str, pos: int):
        super().__init__(message)
        self.line = text.count("\n", 0, pos) + 1


class Quoteless(str):
    """Text that hjson took without quotes: everything up to the end of the line, commas and all."""


@dataclass
class Span:
    """Where a key (or the item of a list) and its value stand in the text: offsets, ends exclusive."""

    key: int
    key_end: int
    value: int
    value_end: int


SKIP = re.compile(r"(?:[ \t\r\n]+|#[^\r\n]*|//[^\r\n]*|/\*.*?\*/)*", re.S)
ESCAPE = r"\\(?:[\"'\\/bfnrt]|u[0-9a-fA-F]{4})"
STRING = {q: re.compile(rf"{q}((?:[^{q}\\\x00-\x1f]|{ESCAPE})*){q}") for q in "\"'"}
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?[ \t]*$")
BARE_KEY = re.compile(r"[^\s:{}\[\],]+")
STOP = re.compile(r"[,}\]#\r\n]|//|/\*|\Z")  # where an unquoted number, true, false or null may end


class Reader:
    """A small hjson parser: JSON, comments, trailing and missing commas, unquoted keys and values.

    `spans` maps the path of every key and list item to its Span; `duplicates` lists (path, line) of repeated keys.
    """

    def __init__(self, text: str):
        self.text = text.removeprefix("\ufeff")
        self.pos = 0
        self.spans: dict[tuple, Span] = {}
        self.duplicates: list[tuple[tuple, int]] = []
        self.breaks = [match.start() for match in re.finditer("\n", self.text)]

    def line(self, path: tuple) -> int:
        """The line of a key, or of the nearest section around it that is there."""
        while path and path not in self.spans:
            path = path[:-1]
        return self.line_at(self.spans[path].key) if path else 1

    def line_at(self, pos: int) -> int:
        return bisect.bisect_left(self.breaks, pos) + 1

    def read(self) -> object:
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
            key = self.pos
            name = self.key(char)
            key_end = self.pos
            if self.peek() != ":":
                self.fail(f'expected ":" after the key {name!r}')
            self.pos += 1
            here = (*path, name)
            if name in result:
                self.duplicates.append((here, self.line_at(key)))
            result[name] = self.placed(here, key, key_end)
            if self.peek() == ",":
                self.pos += 1

    def placed(self, path, key, key_end):
        """The value at `path`, whose span is remembered."""
        self.peek()
        start = self.pos
        value = self.value(path)
        self.spans[path] = Span(key, key_end, start, self.pos)
        return value

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
            items.append(self.placed((*path, len(items)), self.pos, self.pos))
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
            end = STOP.search(self.text, end).start()
            word = self.text[start:end]
            if word.strip() in ("true", "false", "null"):
                self.pos = start + len(word.rstrip())
                return {"true": True, "false": False, "null": None}[word.strip()]
            if number := NUMBER.match(word):
                self.pos = start + len(word.rstrip())
                return self.number(word, whole=not (number[1] or number[2]))
            if end == len(self.text) or self.text[end] in "\r\n":
                self.pos = start + len(word.rstrip())
                return Quoteless(word.strip())
            end += 1

    def number(self, word, whole):
        if whole:
            try:
                return int(word)
            except ValueError:  # Python refuses more than 4,300 digits, and so does hjson's int()
                self.fail(f"a number of {len(word.strip())} digits is too long")
        real = float(word)  # hjson turns 5e8 and 2.0 into integers, json does not
        return int(real) if abs(real) < 1e10 and real == int(real) else real
