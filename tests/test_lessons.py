"""A page is a lesson: within its hour, the idea before any output, what changed in thirty lines, and no diary."""

import re

import pytest

from tests.render import ROOT

NOTES = sorted(ROOT.glob("day[0-9][0-9]/notes*.md"))
ENGLISH = [page for page in sorted(ROOT.glob("day[0-9][0-9]/*.md")) if not page.name.endswith(".zh.md")]
OUTPUT = re.compile(r"<!-- (?:output|table|runs) |^\$ ", re.M)  # what a command printed, or what was measured
PICTURE = re.compile(r"^```mermaid|^```text|^!\[", re.M)  # text: bars in letters
# How a logbook speaks: of what we did and when. That goes, dated, into results/LOG.md.
DIARY = [
    "an earlier version",
    "was stopped after",
    "not what their names say",
    "another program was",
    "not measured",
    "did just that",
    "finds that paid for",
    "the first version",
    "still to be made",
    "by turns",
    "a rank and step",
    "none of them knows",
    "have moods",
    "the costs cancel",
]


def by_name(page):
    return str(page.relative_to(ROOT))


def unfolded(text: str) -> str:
    """What a reader sees without opening anything."""
    return re.sub(r"<details>.*?</details>", "", text, flags=re.S)


def words(text: str) -> int:
    """Tables, code and the markers of generated blocks counted as they stand."""
    return len(unfolded(text).split())


def before_output(text: str) -> str:
    first = OUTPUT.search(text)
    return text[: first.start()] if first else text


def diary(text: str) -> list[str]:
    plain = " ".join(re.sub(r"```.*?```", "", text, flags=re.S).lower().split())
    return [phrase for phrase in DIARY if phrase in plain]


def longest_diff(text: str) -> int:
    return max((body.count("\n") for body in re.findall(r"```diff\n(.*?)```", unfolded(text), re.S)), default=0)


@pytest.mark.parametrize("page", ENGLISH, ids=by_name)
def test_a_page_is_read_within_its_hour_and_is_no_diary(page):
    text = page.read_text(encoding="utf-8")
    assert words(text) <= 4500 or page.name == "symptoms.md", "two lessons, or a part of it to fold away"
    assert diary(text) == [], "into results/LOG.md, dated"


@pytest.mark.parametrize("page", NOTES, ids=by_name)
def test_the_idea_and_a_picture_stand_before_the_first_output(page):
    text = page.read_text(encoding="utf-8")
    idea = before_output(text)
    assert PICTURE.search(idea), "a diagram or a figure"
    prose = re.sub(r"^(#|\|).*$", "", re.sub(r"```.*?```", "", idea, flags=re.S), flags=re.M)
    assert len(re.findall(r"[\u4e00-\u9fff]|[A-Za-z]+", prose)) >= 100, "the idea in ten lines"
    assert longest_diff(text) <= 30, "the DeepSpeed hunks alone; the whole difference in <details>"


def test_what_is_no_lesson_is_found():
    assert words("one two <details>three</details> <!-- four --> | five |\n") == 8
    assert before_output("idea\n```\n$ make\n") == "idea\n```\n" and before_output("a <!-- table x -->") == "a "
    assert diary("Machines\nhave moods. `x`") == ["have moods"] and diary("```\nnot measured\n```") == []
    assert longest_diff("```diff\n a\n b\n```") == 2 and longest_diff("<details>\n```diff\n a\n```\n</details>") == 0
