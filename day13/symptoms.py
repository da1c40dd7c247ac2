"""Day 13: the symptom book - one data file, two pages made of it, and a search. A module, and the maker of the pages.

    python day13/symptoms.py                   # writes symptoms.md and symptoms.zh.md anew from symptoms.json

    from day13.symptoms import load, search
    search("RuntimeError: mat1 and mat2 must have the same dtype, but got Half and Float")[0]

In a message `…` stands for what changes from run to run.
Source: public reports, cited with each entry; counts are those of day13/results/LOG.md
"""

import json
import math
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository, when this is the program

from common.errors import clear_errors

ASK = 'python day13/labs/symptom.py "mat1 and mat2 must have the same dtype, but got Half and Float"'

GROUPS = {
    "start": ("Starting", "启动"),
    "config": ("The JSON", "JSON 配置"),
    "init": ("Building the engine", "构建 engine"),
    "step": ("Forward, backward, step", "前向、反向与更新"),
    "numbers": ("Numbers that are wrong", "数值不对"),
    "hang": ("Hangs and lost ranks", "卡死与失联"),
    "memory": ("Memory", "显存与内存"),
    "checkpoint": ("Checkpoints", "检查点"),
}

HEAD = (
    """# Day 13 · The symptom book

{count} messages and silent symptoms that users of DeepSpeed report most, verbatim: cause, cure, and the day that
explains it. {made} of them are produced by a lab, a test or a recorded run of this repository, named in the last column
beside public reports; the others need hardware or a cluster, and are cited. `…` stands for what changes from run to
run. Paste an error, and the book opens where it stands:
""",
    """# Day 13 · 症状手册

[English](symptoms.md) · [day 13 的笔记](notes.zh.md)

DeepSpeed 用户报告最多的 {count} 条报错和静默症状，按原文收录，并给出原因、解决办法和讲解它的 day。
其中 {made} 条可由本仓库的实验、测试或存档的运行复现，最后一列写明由谁复现，并附公开报告。
其余的需要特定硬件或集群，只列出公开报告。`…` 代表每次运行都不同的部分。
把报错贴进命令行，就能直接查到对应条目（加 `--zh`，原因和解决办法就用中文显示）：
""",
)
COLUMNS = (
    ("symptom, verbatim", "cause", "cure", "day", "shown by, reports"),
    ("现象（原文）", "原因", "解决办法", "day", "复现与出处"),
)


@cache
def load() -> list[dict]:
    """The entries in the order of the book."""
    return json.loads((HERE / "symptoms.json").read_text(encoding="utf-8"))


def pattern(message: str) -> re.Pattern:
    """A message as a pattern: `…` is anything, white space is any white space."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in message.split("…")]
    return re.compile(r".*?".join(parts), re.S)


def says(message: str, text: str) -> bool:
    """Whether `text` has the words of `message`."""
    return bool(pattern(message).search(text))


def words_of(text: str) -> Counter:
    return Counter(re.findall(r"[a-z_]{2,}|[\u4e00-\u9fff]", text.lower()))


def search(text: str, count: int = 3) -> list[tuple[float, dict]]:
    """Entries that fit a pasted error, best first, with a score: 1 when the words are the book's, else shared words.

    A rare word says more than a frequent one: each weighs log(entries / entries that have it).
    """
    entries = load()
    bags = [words_of(f"{entry['message']} {entry['id']}") for entry in entries]
    weight = {word: math.log(1 + len(bags) / sum(word in bag for bag in bags)) for bag in bags for word in bag}
    asked, scored = words_of(text), []
    for entry, bag in zip(entries, bags, strict=True):
        shared = sum(weight[word] for word in bag if word in asked)
        score = 1.0 if says(entry["message"], text) else 0.99 * shared / sum(weight[word] for word in bag)
        scored.append((score, len(entry["message"]), entry))
    scored.sort(key=lambda one: (-one[0], -one[1]))  # of two that fit exactly the longer one
    return [(score, entry) for score, _, entry in scored[:count]]


def proof(entry: dict, zh: bool) -> str:
    """Who says so: the lab, test or recorded run that produces it, or the report that is cited."""
    reports = ", ".join(
        f"[{name.rpartition('/')[2]}](https://github.com/{name.replace('#', '/issues/')})" for name in entry["reports"]
    )
    by = entry["by"]
    return ", ".join(part for part in (f"`{by}`" if by else ("仅有公开报告" if zh else "cited only"), reports) if part)


def page(zh: bool) -> str:
    """The book in one language, as Markdown."""
    entries = load()
    made = sum(bool(entry["by"]) for entry in entries)
    count = {"count": len(entries), "made": made}
    text = HEAD[zh].format(**count) + f"\n```bash\n{ASK}\n```\n"
    columns = COLUMNS[zh]
    for group, titles in GROUPS.items():
        text += f"\n## {titles[zh]}\n\n| {' | '.join(columns)} |\n| :-- | :-- | :-- | :-- | :-- |\n"
        for entry in entries:
            if entry["group"] == group:
                cause, cure = (entry[f"{what}_zh" if zh else what] for what in ("cause", "cure"))
                fence = "``" if "`" in entry["message"] else "`"
                pad = " " if fence == "``" else ""
                message = f"{fence}{pad}{entry['message']}{pad}{fence}".replace("|", "\\|")
                if zh and "message_zh" in entry:  # a symptom in words, not an error to search for
                    message += f"（{entry['message_zh']}）"
                days = ", ".join(f"{day:02}" for day in entry["days"])
                text += f'| <a id="{entry["id"]}"></a>{message} | {cause} | {cure} | {days} | {proof(entry, zh)} |\n'
    return text


def main() -> None:
    for zh, name in ((False, "symptoms.md"), (True, "symptoms.zh.md")):
        (HERE / name).write_text(page(zh), encoding="utf-8")
    print(f"{len(load())} entries, {sum(bool(entry['by']) for entry in load())} of them produced here")


if __name__ == "__main__":
    with clear_errors():
        main()
