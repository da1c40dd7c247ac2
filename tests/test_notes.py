"""What the prose says is so: generated blocks, commands, flags, paths, JSON, links, and both languages."""

import json
import re
import shlex

import pytest

from tests.house import FOLDERS, LAUNCHER_OPTIONS, check_command
from tests.render import ROOT, pages, render

PAGES = pages()
NOTES = sorted(ROOT.glob("day[0-9][0-9]/notes.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
TARGETS = set(re.findall(r"^([\w-]+)%?:", (ROOT / "Makefile").read_text(), re.M))
# Sections of a day's notes, in the order of the house (DESIGN): the same count and order in both languages.
SECTIONS = [
    ("What you need", "准备"),
    ("Run it", "运行"),
    ("The idea", "原理"),
    ("What changed", "改动"),
    ("The config, key by key", "逐项看配置"),
    ("Pitfalls", "常见坑"),
    ("Measured", "实测"),
    ("Exercises", "练习"),
    ("Sources", "参考"),
]


def by_name(page):
    return str(page.relative_to(ROOT))


def commands(text: str) -> list[str]:
    """The shell commands of a page: the lines of its bash fences, continuation lines joined."""
    fences = [body for language, body in FENCE.findall(text) if language == "bash"]
    lines = "".join(fences).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def without_fences(text: str) -> str:
    return FENCE.sub("", text)


def skeleton(diagram: str) -> str:
    """A Mermaid diagram without its words, which are in the page's language: node ids, shapes, arrows, a line each."""
    if diagram.startswith("sequenceDiagram"):
        return re.sub(r"( as |: ).*", r"\1", diagram)
    diagram = re.sub(r'"[^"\n]*"', "", diagram)
    diagram = re.sub(r"\|[^|\n]*\|", "||", diagram)  # a -->|label| b
    diagram = re.sub(r"\[[^\]\n]*\]", "[]", diagram)  # before the round ones: a label may have parentheses
    diagram = re.sub(r"\(\([^)\n]*\)\)", "(())", diagram)
    diagram = re.sub(r"\{[^}\n]*\}", "{}", diagram)
    diagram = re.sub(r"(--|-\.) [^>|\n]+? (-->|\.->|\.-)", r"\1 \2", diagram)  # a -- label --> b
    diagram = re.sub(r"^( *subgraph)(?! [A-Za-z]\w* *(?:\[\])?$).*$", r"\1", diagram, flags=re.M)  # a title, no id
    return re.sub(r"^( *subgraph \w+) *\[\]$", r"\1", diagram, flags=re.M)


def code_blocks(text: str) -> list[tuple[str, str]]:
    return [(kind, skeleton(body) if kind == "mermaid" else body) for kind, body in FENCE.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_generated_blocks_are_up_to_date(page):
    assert render(page.read_text(encoding="utf-8")) == page.read_text(encoding="utf-8"), "run `make render`"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_name_scripts_flags_and_files_that_exist(page):
    for command in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command)
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # VARIABLE=value before the program
            words.pop(0)
        if words[0] == "make":
            for target in (word for word in words[1:] if not re.match(r"[A-Z]+=", word)):
                assert target in TARGETS or (ROOT / target / "train.py").exists(), f"{command}: no target {target}"
            continue
        check_command(command)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_json_parses_and_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for language, body in FENCE.findall(text):
        if language == "json":
            json.loads(body)
    prose = without_fences(text)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        assert target.startswith("https://") or (page.parent / target).exists(), f"broken link {target}"
    for path in re.findall(rf"`({FOLDERS}/[\w./-]+\.\w+)`", prose):
        assert (ROOT / path).exists(), f"{path} is mentioned and does not exist"


@pytest.mark.parametrize("page", [page for page in PAGES if not page.name.endswith(".zh.md")], ids=by_name)
def test_both_languages_tell_the_same_story(page):
    whole = [path.read_text(encoding="utf-8") for path in (page, page.with_suffix(".zh.md"))]
    # The glossary's Chinese table has two columns more.
    english, chinese = (re.sub(r"<!-- glossary .*?<!-- end -->", "", text, flags=re.S) for text in whole)
    assert code_blocks(english) == code_blocks(chinese), "code blocks, and the structure of diagrams, must be identical"
    for pattern, what in (
        (r"^(#+) ", "headings"),
        (r"<!-- (?!end |symptoms )\w+ .*? -->", "generated blocks"),  # `symptoms` names its language
        (r"^\|[-:| ]+\|$", "tables"),
        (r"!\[[^\]]*\]\(([^)]+)\)", "pictures"),
    ):
        found = [re.findall(pattern, without_fences(text), re.M) for text in (english, chinese)]
        assert found[0] == found[1], f"{what} differ"
    rows = [len(re.findall(r"^\|", without_fences(text), re.M)) for text in (english, chinese)]
    assert rows[0] == rows[1], "tables have different numbers of rows"
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > 100, "the Chinese page is not in Chinese"


def test_a_diagram_may_differ_in_its_words_alone():
    english = """flowchart LR
    subgraph every [every rank]
        w[all weights] -->|"by rank, (2)"| g((average)) -- no --> e{"a [b]?"}
    end
    subgraph turns in random order
    end
    e -. killed .-> w"""
    chinese = """flowchart LR
    subgraph every ["每个 rank"]
        w["全部权重（2）"] -->|按 rank| g(("平均")) -- 否 --> e{是否成立？}
    end
    subgraph 随机顺序
    end
    e -. 被杀 .-> w"""
    assert skeleton(english) == skeleton(chinese)
    for here, there in (("-->|", "-.->|"), ("w[", "v["), ("-. ", "-- "), ("{", "["), ("every", "each")):
        assert skeleton(chinese.replace(here, there)) != skeleton(english), here
    sequence = "sequenceDiagram\n    participant a as {}\n    a->>b: {}\n    Note over a,b: {}\n"
    assert skeleton(sequence.format(*"xyz")) == skeleton(sequence.format("甲", "收集：第 1 层", "丙"))
    assert skeleton(sequence) != skeleton(sequence.replace("->>", "-->>"))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name.endswith(".zh.md")], ids=by_name)
def test_what_a_chinese_page_says_of_columns_is_about_columns_it_shows(page):
    """A line 列名释义 translates the English names of a table or an output: each `name` stands in one on the page."""
    text = page.read_text(encoding="utf-8")
    shown = "\n".join([body for _, body in FENCE.findall(text)] + re.findall(r"^\|.*\|$", text, re.M))
    for line in re.findall(r"^列名释义：.*$", text, re.M):
        missing = [name for name in re.findall(r"`([^`]+)`", line) if name not in shown]
        assert not missing, f"no table or output of this page has {missing}"


@pytest.mark.parametrize("notes", NOTES, ids=by_name)
@pytest.mark.parametrize("language", [0, 1], ids=["en", "zh"])
def test_notes_have_the_sections_of_the_house_in_order(notes, language):
    page = notes.with_suffix(".zh.md") if language else notes
    headings = re.findall(r"^## (.*)$", without_fences(page.read_text(encoding="utf-8")), re.M)
    expected = [section[language] for section in SECTIONS]
    assert [heading for heading in headings if heading in expected] == expected


def missing_days(text: str) -> list[str]:
    """Mentions of a day that is not in the repository and is not marked as planned: "day 20", "days 08 and 09"."""
    day_list = r"\d\d(?:(?:, | and | or | to |–|-|、| 和 | 到 )\d\d)*"
    missing = []
    for mention in re.finditer(rf"\bdays? {day_list}|第 {day_list} 天", text, re.I):
        days = [int(number) for number in re.findall(r"\d\d", mention[0])]
        if re.search(r"–|-| to |到", mention[0]):
            days = range(min(days), max(days) + 1)
        marked = text[mention.end() :].startswith((" (planned)", "（计划中）"))
        if not marked and any(1 <= day <= 28 and not (ROOT / f"day{day:02}/notes.md").exists() for day in days):
            missing.append(mention[0])
    return missing


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_no_page_points_at_a_day_that_is_not_there(page):
    assert not missing_days(page.read_text(encoding="utf-8")), "write `day 20 (planned)`, or leave it out"


def test_a_day_that_is_not_there_is_found(monkeypatch, tmp_path):
    assert missing_days("days 01–28, day 99, day 40") == []  # 99 is no day of the course: not ours to judge
    monkeypatch.setitem(globals(), "ROOT", tmp_path)  # a course of which the first day alone is written
    (tmp_path / "day01").mkdir()
    (tmp_path / "day01/notes.md").write_text("")
    for text in ("as day 20 shows", "days 01 and 20", "days 01–03", "（day 20）", "第 20 天"):
        assert missing_days(text), text
    assert not missing_days("day 01, day 20 (planned), day 20（计划中）")


def test_the_readme_says_what_common_is():
    for page in ("README.md", "README.zh.md"):
        text = (ROOT / page).read_text()
        assert "`common/cpu.py`" in text and "without any DeepSpeed" not in text and "没有任何 DeepSpeed" not in text


def test_mirrors_have_names_and_no_addresses():
    """An address goes out of date, and a mirror's help page does not."""
    for page, heading in (("README.md", "From mainland China"), ("README.zh.md", "国内环境")):
        _, _, section = (ROOT / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")
        section = section.partition("\n## ")[0]
        assert "`PIP_INDEX_URL`" in section and "TUNA" in section and "npmmirror" in section and "ModelScope" in section
        assert not re.search(r"https?:|\w\.(?:com|cn|org|net|io|edu)\b", section)


@pytest.mark.launch
def test_launcher_options_exist():
    from tests.launch import DEEPSPEED, run_command

    known = run_command(DEEPSPEED, "--help").stdout
    assert all(option in known for option in LAUNCHER_OPTIONS)
