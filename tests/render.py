"""Keep what the notes show equal to what the repository holds: diffs, files, outputs, tables, figures.

    make render            (python -m tests.render)

A note marks a generated block with two HTML comments, which readers do not see:

    <!-- file day02/ds_config.json -->                          the file, in a code fence
    <!-- lines day02/train.py "batches =" "log.step" -->        the lines from one text to the other
    <!-- diff day01/train.py day02/train.py -->                 the unified diff
    <!-- output day02/results/train_2cpu.json -->                the command and what it printed
    <!-- table day03/results/compare_2cpu.json table config tokens_per_s:,.0f -->    rows and columns of a result file
    <!-- runs day02/results/train_2cpu.json day02/results/train_h100.json -->      recorded runs, a row each
    <!-- number day02/results/train_2cpu.json rows.-1.held_out_loss .2f -->          one value, inside a sentence
    <!-- symptoms day02 en -->                                   links to the day's entries in day 13's symptom book
    <!-- glossary en -->                                         the words of docs/glossary.json, a row each
    <!-- end -->

`tests/test_notes.py` fails when a block is out of date; this program brings it up to date.
"""

import difflib
import functools
import json
import re
import shlex
from pathlib import Path

from common.run_log import median_speed

ROOT = Path(__file__).resolve().parents[1]
LANGUAGE = {".py": "python", ".json": "json", ".sh": "bash", "": ""}
BLOCK = re.compile(r"<!-- (file|lines|diff|output|table|runs|number|symptoms|glossary) (.*?) -->.*?<!-- end -->", re.S)


def pages() -> list[Path]:
    """Every Markdown page of the repository, English and Chinese."""
    folders = ("", "docs", "data", "config", "bench", "day[0-9][0-9]", "day[0-9][0-9]/labs")
    return sorted(page for folder in folders for page in ROOT.glob(f"{folder}/*.md" if folder else "*.md"))


def render(text: str) -> str:
    """Return `text` with every generated block made anew."""
    return BLOCK.sub(lambda block: f"<!-- {block[1]} {block[2]} -->{_content(block[1], block[2])}<!-- end -->", text)


def _content(kind: str, arguments: str) -> str:
    return globals()[f"_{kind}"](*shlex.split(arguments))


def _fence(text: str, language: str = "") -> str:
    return f"\n```{language}\n{text.rstrip()}\n```\n"


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _file(name: str) -> str:
    return _fence(_read(name), LANGUAGE[Path(name).suffix])


def _lines(name: str, first: str, last: str) -> str:
    lines = _read(name).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i, line in enumerate(lines) if i >= start and last in line)
    indent = len(lines[start]) - len(lines[start].lstrip())
    return _fence("\n".join(line[indent:] for line in lines[start : stop + 1]), LANGUAGE[Path(name).suffix])


def _diff(old: str, new: str) -> str:
    """The diff from the imports on: the docstrings differ in every line and say nothing."""
    sides = [_read(name).partition("import argparse")[2].splitlines() for name in (old, new)]
    return _fence("\n".join(difflib.unified_diff(*sides, old, new, n=1, lineterm="")), "diff")


def _symptoms(day: str, language: str) -> str:
    book = f"../day13/symptoms{'.zh' if language == 'zh' else ''}.md"
    ids = [entry["id"] for entry in json.loads(_read("day13/symptoms.json")) if int(day[3:]) in entry["days"]]
    links = [f"[`{name}`]({book}#{name})" for name in ids]
    if language == "zh":
        own = f"，与本课有关的条目：{'、'.join(links)}" if ids else ""
        return f"\n其他报错见可搜索的[症状手册]({book}){own}。\n"
    own = f"; entries for this day: {', '.join(links)}" if ids else ""
    return f"\nOther messages: the searchable [symptom book]({book}){own}.\n"


def _glossary(language: str) -> str:
    zh = language == "zh"
    rows = ["| 写作 | 英文 | 含义 | day | 不写作 |" if zh else "| term | meaning | day |"]
    rows += ["| :-- | :-- | :-- | :-- | :-- |" if zh else "| :-- | :-- | :-- |"]
    for entry in json.loads(_read("docs/glossary.json")):
        english, chinese = entry["term"]
        day = f"[{entry['day']:02}](../day{entry['day']:02}/notes{'.zh' if zh else ''}.md)"
        cells = [chinese, english, entry["meaning"][1], day, "、".join(entry.get("not_zh", ["–"]))]
        rows.append("| " + " | ".join(cells if zh else [english, entry["meaning"][0], day]) + " |")
    return "\n" + "\n".join(rows) + "\n"


def _output(name: str) -> str:
    result = json.loads(_read(name))
    return _fence(f"$ {result['command']}\n" + "\n".join(result["output"])) + _source(result)


def _table(name: str, rows: str, *columns: str) -> str:
    """`column:format` picks a value of each row, `a.b` a nested one; `A_heading=column:format` names it otherwise.

    `column:MB` shows bytes as millions, `GB` as thousands of millions, `column:k` thousands: 17.1k.
    """
    result = json.loads(_read(name))
    cells = []
    for column in columns:
        heading, _, key = column.rpartition("=")
        key, _, spec = key.partition(":")
        values = [
            functools.reduce(lambda found, part: (found or {}).get(part), key.split("."), row) for row in result[rows]
        ]
        cells.append([(heading or key).replace("_", " "), ":--" if isinstance(values[0], str) else "--:"])
        cells[-1] += ["–" if value is None else _format(value, spec).replace("|", "\\|") for value in values]
    lines = ["| " + " | ".join(row) + " |" for row in zip(*cells, strict=True)]
    return "\n" + "\n".join(lines) + "\n\n" + _source(result).lstrip("\n")


def _runs(*names: str) -> str:
    rows = ["| machine | command | held-out loss | tokens/s | peak GiB | date |"]
    rows += ["| :-- | :-- | --: | --: | --: | :-- |"]
    for name in names:
        result = json.loads(_read(name))
        held_out = [row["held_out_loss"] for row in result["rows"] if "held_out_loss" in row]
        steps = [row for row in result["rows"] if "loss" in row]
        speed = median_speed(result["rows"])
        versions = result["versions"]
        machine = f"{result['hardware']}, deepspeed {versions['deepspeed']}, torch {versions['torch']}"
        loss = f"{held_out[0]:.2f} → {held_out[-1]:.2f}"
        memory = f"{steps[-1]['memory_gib']:.2f}"
        rows.append(f"| {machine} | `{result['command']}` | {loss} | {speed:,.0f} | {memory} | {result['date']} |")
    return "\n" + "\n".join(rows) + "\n"


def _number(name: str, path: str, spec: str = "") -> str:
    value = json.loads(_read(name))
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return _format(value, spec)


def _format(value: float | str, spec: str) -> str:
    units = {"MB": (1e6, ",.2f", ""), "GB": (1e9, ",.1f", ""), "k": (1e3, ",.1f", "k")}
    if spec not in units:
        return format(value, spec)
    size, spec, letter = units[spec]
    return format(value / size, spec) + letter


def _source(result: dict) -> str:
    """Where figures come from: hardware, versions, command, date."""
    versions = result["versions"]
    names = [f"{name} {versions[name]}" for name in ("deepspeed", "torch") if name in versions]
    return f"\n<sub>{result['hardware']} · {' · '.join(names)} · `{result['command']}` · {result['date']}</sub>\n"


def main() -> None:
    for page in pages():
        old = page.read_text(encoding="utf-8")
        if (new := render(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(f"updated {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
