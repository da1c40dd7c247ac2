"""Day 22: texts - questions and answers made from the shipped texts, split by document, most of which can be checked.

`python day22/texts.py` shows some. They are made from data/ when `--dataset texts` or `texts-zh` is loaded, the same
each time. English, from Moby-Dick and the State of the Union addresses: fill in a word, name the president, write the
next sentence, quote the sentence that has a word. Chinese, from ci of the Song dynasty: 摘句 (quote the line that has a
character), 接句 (write the next line), 认词牌 (name the tune), 填词 (write a poem to a tune). A row's `source` is its
document; sentences and lines of an earlier document are left out, so that none is both trained on and held out.
Source: data/README.md (the texts, their licences and checksums); Sanh et al. 2021, https://arxiv.org/abs/2110.08207.
"""

import argparse
import json
import lzma
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from common.data import DATA
from common.errors import clear_errors

ENGLISH, CHINESE = ("moby_dick", "sotu"), ("song_ci",)
POEMS = 4000  # of the poems: enough to learn the forms from
SENTENCE = re.compile(r"(?<=[a-z]{3}[.!?;]) +(?=[A-Z])")  # so not after Mr. or a number
Pair = tuple[str, str]  # (question, answer)


def documents(corpus: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each document of a shipped corpus."""
    with lzma.open(DATA / f"{corpus}.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            yield f"{corpus}/{document['id']}", document["text"]


def texts(language: str) -> list[dict]:
    """Rows {"source", "task", "messages"} in "en" or "zh"."""
    if language == "zh":
        every = list(documents("song_ci"))
        made = _zh(every[:: max(1, len(every) // POEMS)])
    else:
        made = _en([document for corpus in ENGLISH for document in documents(corpus)])
    return [
        {
            "source": source,
            "task": task,
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
        }
        for source, pairs in made
        for task, (q, a) in pairs
    ]


def _en(found: list[tuple[str, str]]) -> Iterator[tuple[str, list[tuple[str, Pair]]]]:
    """(document, [(task, pair)]) of prose: runs of one to eight sentences, each used once."""
    seen = set()
    for source, text in found:
        chance, pairs = random.Random(source), []
        lines = [" ".join(line.split()) for line in SENTENCE.split(text.partition("\n\n")[2] or text)]
        good = [40 <= len(line) <= 280 and line not in seen for line in lines]
        seen |= set(lines)
        at = 0
        while len(pairs) < 8 and (length := chance.choice((1, 1, 1, 2, 2, 3, 4, 6, 8))) <= len(lines) - at:
            run, usable = lines[at : at + length], all(good[at : at + length])
            at += length
            if usable and (pair := _about(run, source, chance)):
                pairs.append(pair)
        yield source, pairs


def _about(run: list[str], source: str, chance: random.Random) -> tuple[str, Pair] | None:
    """(task, pair) of a run of sentences: which task depends on their number."""
    _, *president, _ = source.split("_")
    at = chance.randrange(len(run))
    words = sorted(set(re.findall(r"\b[a-z]{6,}\b", run[at])))
    only = [word for word in words if sum(word in line.lower() for line in run) == 1 and run[at].count(word) == 1]
    if len(run) == 2 and source.startswith("sotu") and chance.random() < 0.5:
        asked = f"Which president said this to Congress? {' '.join(run)}"
        return "who", (asked, " ".join(president).title() + ".")
    if len(run) == 2:
        return "go on", (f"Write the next sentence: {run[0]}", run[1])
    if not only:
        return None
    word = chance.choice(only)
    if len(run) == 1:
        return "fill in", (f"Which word is left out? {run[0].replace(word, '____')}", f"{word}.")
    return "quote", (f"Quote the sentence that has the word “{word}”: {' '.join(run)}", run[at])


def _zh(found: list[tuple[str, str]]) -> Iterator[tuple[str, list[tuple[str, Pair]]]]:
    """(document, [(task, pair)]) of ci: two of the four tasks. A document's first line is the tune and the poet."""
    seen = set()
    for source, text in found:
        chance = random.Random(source)
        head, *lines = text.split("\n")
        tune, _, poet = head.partition(" ")
        whole, known = "\n".join(lines), seen & set(lines)
        seen |= set(lines)
        if known or not poet or " " in poet or len(lines) < 4 or len(whole) > 120:
            continue
        at = chance.randrange(len(lines) - 1)
        only = sorted({c for c in lines[at] if "\u4e00" <= c <= "\u9fff" and whole.count(c) == 1})
        pairs = [
            ("接句", (f"《{tune}》里有这样一句：“{lines[at]}”请接着写下一句。", lines[at + 1])),
            ("认词牌", (f"下面这首词用的是哪个词牌？\n{whole}", f"《{tune}》。")),
            ("填词", (f"请用词牌《{tune}》填一首词。", whole)),
        ]
        if only:
            pairs.append(("摘句", (f"摘出下面这首词中含“{chance.choice(only)}”字的一句：\n{whole}", lines[at])))
        yield source, chance.sample(pairs, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", default="en", choices=["en", "zh"], help="en (texts) or zh (texts-zh)")
    parser.add_argument("--samples", type=int, default=4, help="how many rows to show, one of each task")
    args = parser.parse_args()
    rows = texts(args.language)
    kinds = {row["task"]: row for row in random.Random(1).sample(rows, len(rows))}
    for kind, row in list(kinds.items())[: args.samples]:
        asked, said = (message["content"] for message in row["messages"])
        count = sum(other["task"] == kind for other in rows)
        print(f"--- {kind}, {count:,} of {len(rows):,} pairs | {row['source']}\n{asked}\n-> {said}")


if __name__ == "__main__":
    with clear_errors():
        main()
