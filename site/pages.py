"""The pages of the course site, in Markdown: the repository's own, adapted to the generator; nothing is written twice.

A page keeps its path (`day11/notes.md` becomes `day11/notes.html`), in Chinese under `zh/`. What changes on the way:
links and names of files lead to pages of the site, headings get the same ids in both languages, diagrams become
`<pre class="diagram">` (drawn by assets/course.js), and a day gets its bar, its quiz and a page with its files.
"""

import html
import json
import os
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^( *)(```+)([^\n]*)\n(.*?)^\1\2$", re.M | re.S)
# Whose files are shown with highlighting, on a page of their own: code.md in each.
ROOMS = [
    "common",
    "bench",
    "config",
    "data",
    "capstone",
    *(f"capstone/{room}" for room in ("serve", "deploy", "alerts")),
]
KINDS = {".py": "python", ".json": "json", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".html": "html"}
KINDS |= {".txt": "text", ".jinja": "jinja", "Dockerfile": "docker"}
MAX_LINES = 800  # of a file that is shown; a longer one, which is data, can be downloaded
# The address of the repository, for "edit this page": pages.yml sets it.
REPOSITORY = os.environ.get("SITE_REPOSITORY", "").rstrip("/")

WORDS = {  # of what is not in the notes: English, Chinese
    "home": ("Home", "首页"),
    "reference": ("To look things up", "查阅"),
    "code": ("Files", "文件"),
    "all_code": ("All files of {}", "{} 的全部文件"),
    "code_intro": ("As they stand in the repository. Paths are from its root.", "与仓库中一致；路径从仓库根目录算起。"),
    "notes": ("The lesson", "这一天的笔记"),
    "long": ("{} lines: {}", "{} 行：{}"),
    "download": ("download", "下载"),
    "done": ("Day done", "这一天已完成"),
    "run": ("Run it", "运行"),
    "edit": ("Edit this page", "编辑本页"),
    "source": ("Source", "源文件"),
    "quiz": ("What will this print?", "会打印什么？"),
    "quiz_intro": (
        "Say it before you open the answer. The answers are recorded output of this page.",
        "先说出来，再展开答案。答案都是本页存档的真实输出。",
    ),
    "answer": ("Answer", "答案"),
    "recorded": ("recorded in", "存档于"),
    "glossary": ("Glossary", "术语表"),
    "glossary_intro": (
        "The course's words, one for one thing. A day's first mention of one leads here, and says what it means.",
        "本课程的用词，一个概念一种写法。每一天的笔记里，术语第一次出现时都链接到这里，鼠标停留即可看到含义。",
    ),
    "progress": ("Your progress", "学习进度"),
    "export": ("Export", "导出"),
    "import": ("Import", "导入"),
    "kept": (
        "Ticks stay in this browser and are sent nowhere. Export them to take them elsewhere.",
        "打勾的记录只存在这个浏览器里，不会发往任何地方；换浏览器时可以先导出。",
    ),
    "planned": ("planned", "计划中"),
}


def say(word: str, zh: bool) -> str:
    return WORDS[word][zh]


def days() -> list[str]:
    """The days there are: a day that is not written yet is left out of the site."""
    return sorted(path.parent.name for path in ROOT.glob("day[0-9][0-9]/notes.md"))


@cache
def sources() -> dict[str, str]:
    """{page of the site: Markdown file of the repository}, of the English ones; the Chinese lie beside them."""
    found = {"index.md": "README.md"}
    for day in days():
        found |= {str(path.relative_to(ROOT)): str(path.relative_to(ROOT)) for path in ROOT.glob(f"{day}/*.md")}
    others = [f"{room}/README.md" for room in ("config", "bench", "data")]
    others += [str(path.relative_to(ROOT)) for path in ROOT.glob("capstone/deploy/*.md")]
    found |= {path: path for path in others if (ROOT / path).exists()}
    # The calculator brings a page and its own scripts in site/calculator/: see build.bundle_calculator().
    found |= {"calculator/index.md": "site/calculator/index.md"} if (ROOT / "site/calculator/index.md").exists() else {}
    return {page: path for page, path in found.items() if not path.endswith(".zh.md")}


@cache
def files_of(room: str) -> list[str]:
    """The files that a room's code page shows, programs first: paths from the repository's root."""
    depth = "*" if room in ROOMS and room != "config" else "**/*"
    found = [path for path in (ROOT / room).glob(depth) if path.suffix in KINDS or path.name in KINDS]
    hidden = {"results", "__pycache__", "node_modules"}
    found = [path for path in found if not hidden & set(path.relative_to(ROOT).parts) and path.stat().st_size]
    found.sort(key=lambda path: (path.suffix != ".py", len(path.parts), path.name != "train.py", path.name))
    return [str(path.relative_to(ROOT)) for path in found]


@cache
def code_places() -> dict[str, tuple[str, str]]:
    """{file: (its code page, its anchor there)}."""
    return {
        path: (f"{room}/code.md", path.removeprefix(f"{room}/").replace("/", "-").lower())
        for room in [*days(), *ROOMS]
        for path in files_of(room)
    }


def raw_place(path: str) -> str:
    """Where a file itself lies on the site: a page of the project is no page of the course."""
    return f"{path}.txt" if path.endswith(".html") else path


def outside_fences(text: str, change) -> str:
    """`text` with `change` applied to what stands outside of code."""
    parts, last = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, change(text[last:])])


def relative(page: str, target: str) -> str:
    """The way from a page to a target, both by their path in the site."""
    return os.path.relpath(target, Path(page).parent or ".")


def heading_ids(english: str) -> list[str]:
    """An id for each heading of a page, in order: made of the English words, for both languages."""
    ids = []
    for title in re.findall(r"^#+ (.*)$", FENCE.sub("", english), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title).lower()
        slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "section"
        ids.append(slug if slug not in ids else f"{slug}-{len(ids)}")
    return ids


def with_ids(text: str, ids: list[str]) -> str:
    left = iter(ids)
    return outside_fences(
        text, lambda part: re.sub(r"^(#+ .*)$", lambda heading: f"{heading[1]} {{#{next(left)}}}", part, flags=re.M)
    )


def link(page: str, source: str, target: str) -> str | None:
    """Where a link of the file `source` leads on the site, seen from `page`; None: to nothing that is there."""
    path, hash_, anchor = target.partition("#")
    if "://" in path or not path:
        return target
    there = os.path.normpath(Path(source).parent / path).replace(".zh.md", ".md")
    pages = {path: page for page, path in sources().items()} | {"docs/glossary.md": "glossary.md"}  # made by glossary()
    if there in pages:
        return relative(page, pages[there]) + hash_ + anchor
    if there in code_places():
        code, anchor = code_places()[there]
        return f"{relative(page, code)}#{anchor}"
    if (ROOT / there).suffix in (".png", ".svg"):
        return relative(page, there)
    return f"{REPOSITORY}/blob/main/{there}" if REPOSITORY else None


def to_site(page: str, source: str, text: str) -> str:
    """A page for the site: no comments, links and names of files to its pages, lists as Python-Markdown reads them."""

    def linked(found: re.Match) -> str:
        there = link(page, source, found[2])
        return f"[{found[1]}]({there})" if there else found[1]

    def named(found: re.Match) -> str:
        there = link(page, "", found[1]) if found[1] in code_places() else None
        return f"[{found[0]}]({there})" if there else found[0]

    def prose(part: str) -> str:
        part = re.sub(r"<!--.*?-->", "", part, flags=re.S)
        part = re.sub(r"\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)", linked, part)
        part = re.sub(r"(?<![`\[])`([\w./-]+)`(?![`\]])", named, part)
        part = re.sub(r"<(details|summary)>", r'<\1 markdown="1">', part)
        part = re.sub(r"(<summary.*?</summary>)", r"\n\1\n", part, flags=re.S)
        return re.sub(r"^(?!\s*(?:[-*]|\d+\.) |[\s|#])(.+)\n(?=[-*] |1\. )", r"\1\n\n", part, flags=re.M)

    def fenced(fence: re.Match) -> str:
        indent, ticks, language, body = fence.groups()
        if language == "mermaid":
            return f'<pre class="diagram">{html.escape(body)}</pre>'
        # GitHub takes three spaces for the inside of a list, Python-Markdown four
        shift = " " if len(indent) % 4 == 3 else ""
        return re.sub(r"^(?=.)", shift, fence[0], flags=re.M)

    return FENCE.sub(fenced, outside_fences(text, prose))


def read(path: str, zh: bool) -> str:
    """A Markdown file of the repository in a language; the English one where there is no Chinese."""
    chinese = ROOT / path.replace(".md", ".zh.md")
    return (chinese if zh and chinese.exists() else ROOT / path).read_text(encoding="utf-8")


def edit_line(source: str, zh: bool) -> str:
    source = source.replace(".md", ".zh.md") if zh and (ROOT / source.replace(".md", ".zh.md")).exists() else source
    if REPOSITORY:
        return f'<a href="{REPOSITORY}/edit/main/{source}">{say("edit", zh)}</a>'
    return f"<span>{say('source', zh)}: <code>{source}</code></span>"


def bar(page: str, source: str, zh: bool) -> str:
    """What stands under a page's title: a day's tick, how to run it, its files; and the page's source."""
    room = str(Path(page).parent)
    parts = [edit_line(source, zh)]
    if code_places() and any(code == f"{room}/code.md" for code, _ in code_places().values()):
        parts.insert(0, f'<a href="code.html">{say("code", zh)}</a>')
    if page.endswith("notes.md"):
        parts.insert(0, f"<span>{say('run', zh)}: <code>make {room}</code></span>")
        parts.insert(0, f'<label><input type="checkbox" data-tick="{room}"> {say("done", zh)}</label>')
    return f'<p class="course-bar">{" ".join(parts)}</p>'


@cache
def quizzes() -> dict[str, list[dict]]:
    return json.loads((ROOT / "site/quiz.json").read_text(encoding="utf-8"))


def recorded(day: str, question: dict) -> dict:
    """The recorded run that a question is about: its command and output."""
    return json.loads((ROOT / day / f"results/{question['output']}.json").read_text(encoding="utf-8"))


def answer(day: str, question: dict) -> list[str]:
    """The recorded lines that answer a question: those that have one of its texts, each once."""
    found = [line for line in recorded(day, question)["output"] if any(text in line for text in question["lines"])]
    return list(dict.fromkeys(found))


def quiz(day: str, zh: bool) -> str:
    """A day's questions, as a section of its page; nothing when it has none."""
    text = ""
    for question in quizzes().get(day, []):
        lines = html.escape("\n".join(answer(day, question)))
        text += (
            f"{question['ask'][zh]}\n\n```bash\n{recorded(day, question)['command']}\n```\n\n"
            f'<details class="quiz" markdown="1">\n<summary>{say("answer", zh)}</summary>\n\n'
            f"<pre><code>{lines}</code></pre>\n\n{question['why'][zh]}\n\n"
            f"<sub>{say('recorded', zh)} `{day}/results/{question['output']}.json`</sub>\n\n</details>\n\n"
        )
    return text and f"## {say('quiz', zh)} {{#quiz}}\n\n{say('quiz_intro', zh)}\n\n{text}"


def page(name: str, zh: bool) -> str:
    """A page of the repository as the generator takes it."""
    source = sources()[name]
    ids = heading_ids(read(source, False))
    text = with_ids(to_site(name, source, read(source, zh)), ids)
    text = re.sub(r"^\[(English|中文)\]\(.*\)\n+", "", text, flags=re.M)  # the site has its own links to neighbours
    title, _, rest = text.partition("\n")
    if name.endswith("notes.md"):
        before, sources_, after = rest.partition("\n## 参考 " if zh else "\n## Sources ")
        rest = f"{before}\n\n{quiz(Path(name).parent.name, zh)}{sources_}{after}"
    return f"{title}\n\n{'' if name == 'index.md' else bar(name, source, zh)}\n{rest}"


def code_page(room: str, zh: bool) -> str:
    """The files of a room, highlighted, each with a link to itself."""
    text = f"# {say('all_code', zh).format(room)}\n\n{say('code_intro', zh)}"
    text += f" [{say('notes', zh)}](notes.md)\n" if room in days() else "\n"
    for path in files_of(room):
        body, name = (ROOT / path).read_text(encoding="utf-8"), path.removeprefix(f"{room}/")
        _, anchor = code_places()[path]
        up = relative(f"zh/{room}/code.md" if zh else f"{room}/code.md", raw_place(path))  # the files lie once
        raw = f'<a href="{up}" download>{say("download", zh)}</a>'
        text += f"\n## {name} {{#{anchor}}}\n\n"
        if body.count("\n") > MAX_LINES:
            text += say("long", zh).format(body.count("\n"), raw) + "\n"
            continue
        ticks = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", body)), 3)
        kind = KINDS.get(Path(path).suffix) or KINDS[Path(path).name]
        text += f"{raw}\n\n{ticks}{kind}\n{body.rstrip()}\n{ticks}\n"
    return f"---\nsearch:\n  exclude: true\n---\n{text}"


def course_map(zh: bool) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """[(week, [(day's number, subject, question)])], as the README's table has it."""
    weeks = []
    for cells in re.findall(r"^\| *(\d\d)? *\| (.*?) \|(?: (.*?) \|)?", read("README.md", zh), re.M):
        number, subject, question = cells
        if number and weeks:
            weeks[-1][1].append((number, subject, question))
        elif subject.startswith("**"):
            weeks.append((subject.strip("*"), []))
    return weeks


def home(zh: bool) -> str:
    """The README, with the table of days as a map of cards in front."""
    text = page("index.md", zh)
    head, *sections = re.split(r"^(?=## )", text, flags=re.M)
    sections = [section for section in sections if "| 01 |" not in section]  # the table itself
    cards = ""
    for week, rows in course_map(zh):
        cards += f'<h2>{week}</h2>\n<ul class="cards">\n'
        for number, subject, question in rows:
            inside = f"<span>{number}</span> <strong>{subject}</strong> <small>{question}</small>"
            if f"day{number}" in days():
                there = f'<a href="day{number}/notes.html">{inside}</a>'
                tick = f'<input type="checkbox" data-tick="day{number}" aria-label="{say("done", zh)}: {number}">'
            else:
                there, tick = f"<div>{inside} <em>{say('planned', zh)}</em></div>", ""
            cards += f"<li>{there}{tick}</li>\n"
        cards += "</ul>\n"
    progress = (
        f'<div class="progress" role="group" aria-label="{say("progress", zh)}">'
        f'<strong>{say("progress", zh)}: <output id="ticked"></output></strong> '
        f'<button type="button" id="export">{say("export", zh)}</button> '
        f'<label class="button">{say("import", zh)} <input type="file" id="import" accept="application/json"></label> '
        f"<small>{say('kept', zh)}</small></div>"
    )
    return f'{head}\n<div class="map">\n{cards}</div>\n\n{progress}\n\n{"".join(sections)}'


@cache
def terms() -> list[dict]:
    return json.loads((ROOT / "docs/glossary.json").read_text(encoding="utf-8"))


def glossary(zh: bool) -> str:
    """A heading a term: the search finds it, and the words on other pages lead there."""
    text = f"# {say('glossary', zh)}\n\n{say('glossary_intro', zh)}\n\n"
    for term in terms():
        day, number = f"day{term['day']:02}", f"day {term['day']:02}"
        there = f"[{number}]({day}/notes.md)" if day in days() else number
        text += f"## {term['term'][zh]} {{#{term['id']}}}\n\n*{term['term'][not zh]}* · {there}\n\n"
        text += f"{term['meaning'][zh]}\n\n"
        if zh and "not_zh" in term:  # one word for one thing: the others that are in use
            text += f"不写作：{'、'.join(term['not_zh'])}\n\n"
    return text


def nav(zh: bool) -> list[dict]:
    """The generator's table of contents: the weeks, then what one looks things up in."""
    found = [{say("home", zh): "index.md"}]
    for week, rows in course_map(zh):
        found.append({week: [{f"{n} {subject}": f"day{n}/notes.md"} for n, subject, _ in rows if f"day{n}" in days()]})
    looked_up = [name for name in sources() if not name.endswith("notes.md") and name != "index.md"]
    others = [{read(sources()[name], zh).partition("\n")[0].lstrip("# ").replace("`", ""): name} for name in looked_up]
    return [*found, {say("reference", zh): [{say("glossary", zh): "glossary.md"}, *others]}]


def all_pages(zh: bool) -> dict[str, str]:
    """{page: its Markdown} of the whole site in one language."""
    found = {name: page(name, zh) for name in sources() if name != "index.md"}
    found |= {f"{room}/code.md": code_page(room, zh) for room in [*days(), *ROOMS] if files_of(room)}
    return found | {"index.md": home(zh), "glossary.md": glossary(zh)}
