"""The course as a site: its data against the notes, one build of both languages, and what a browser sees of it."""

import functools
import gzip
import html
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest

from config import plan
from config.models import named_model
from day13.symptoms import load as symptoms
from tests.render import ROOT

SITE = ROOT / "site"
spec = importlib.util.spec_from_file_location("site_pages", SITE / "pages.py")  # `site` is Python's own module
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)

LANGUAGES = pytest.mark.parametrize("zh", [False, True], ids=["en", "zh"])
PHONE, DESK = (390, 844), (1280, 900)
# One page of each kind, for what takes a second a page.
KINDS = [
    "index.html",
    "day11/notes.html",
    "day11/code.html",
    "day13/symptoms.html",
    "glossary.html",
    "config/index.html",
    "calculator/index.html",
]


# --- the data: nothing is built ---


@pytest.mark.parametrize("day", pages.days())
@LANGUAGES
def test_three_questions_a_day_whose_recorded_answers_stand_in_the_page(day, zh):
    notes, questions = pages.read(f"{day}/notes.md", zh), pages.quizzes().get(day, [])
    assert len(questions) == 3, f"site/quiz.json: {day} has {len(questions)} questions"
    for question in questions:
        assert question["ask"][zh] and question["why"][zh]
        lines = pages.answer(day, question)
        assert 1 <= len(lines) <= 6, f"site/quiz.json: {day}, {question['lines']}: {len(lines)} lines"
        missing = [line for line in lines if line not in notes]
        assert not missing, f"site/quiz.json: {day} asks for what its page does not show: {missing}"


@LANGUAGES
def test_the_glossarys_words_are_the_notes_words(zh):
    notes = "".join(pages.read(f"{day}/notes.md", zh) for day in pages.days()).lower()
    for term in pages.terms():
        assert term["term"][zh] and term["meaning"][zh] and 1 <= term["day"] <= 28
        unused = [word for word in term["words"][zh] if word.lower() not in notes]
        assert not unused, f"docs/glossary.json: no page says {unused}"
    assert len({term["id"] for term in pages.terms()}) == len(pages.terms()) > 40


def test_a_page_is_adapted_for_the_generator():
    notes = "[day 02](../day02/notes.zh.md#run) `day02/train.py` <!-- number x -->3<!-- end -->\nText.\n- a list\n"
    notes += "```mermaid\na --> b\n```\n1. one\n\n   ```bash\n   ls\n   ```\n[the log](results/LOG.md)\n"
    made = pages.to_site("day05/notes.md", "day05/notes.md", notes)
    assert "[day 02](../day02/notes.md#run) [`day02/train.py`](../day02/code.md#train.py) 3\n" in made
    assert "Text.\n\n- a list" in made and '<pre class="diagram">a --&gt; b\n</pre>' in made
    assert "    ```bash\n    ls\n    ```\n" in made and made.endswith("the log\n")


def test_the_course_without_a_day_has_no_way_to_it(monkeypatch):
    there = [day for day in pages.days() if day != "day05"]
    monkeypatch.setattr(pages, "days", lambda: there)
    for cached in (pages.sources, pages.code_places):
        cached.cache_clear()
    try:
        made = pages.all_pages(False)
        assert not any("day05/" in re.sub(r"`[^`]*`|```.*?```", "", text, flags=re.S) for text in made.values())
        assert "day05/notes.md" not in json.dumps(pages.nav(False)) and made["index.md"].count("<em>planned</em>") >= 1
    finally:
        for cached in (pages.sources, pages.code_places):
            cached.cache_clear()


# --- one build ---


class Page(HTMLParser):
    """Where a page's links, pictures, scripts and styles lead, and the ids that a link can name."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.resources, self.ids, self.text = [], [], set(), path.read_text(encoding="utf-8")
        self.diagrams = [html.unescape(one) for one in re.findall('<pre class="diagram">(.*?)</pre>', self.text, re.S)]
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif address := found.get("src") or (tag == "link" and found.get("href")):
            self.resources.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site, built once, in a folder below the server's root: a sub-path."""
    pytest.importorskip(
        "zensical", reason="the site's generator is not installed: pip install -r site/requirements.txt"
    )
    if not (SITE / "node_modules").exists():
        pytest.skip("what the site takes from npm is not installed: npm ci --prefix site")
    out = tmp_path_factory.mktemp("www") / "course"
    run = subprocess.run([sys.executable, SITE / "build.py", "--out", out], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count("No issues found") == 2, run.stdout + run.stderr
    return out


@pytest.fixture(scope="module")
def parsed(site):
    return {str(path.relative_to(site)): Page(path) for path in sorted(site.rglob("*.html"))}


def test_a_missing_package_gets_one_sentence(tmp_path):
    for name in ("build.py", "pages.py"):
        (tmp_path / "site").mkdir(exist_ok=True)
        shutil.copy(SITE / name, tmp_path / "site" / name)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    run = subprocess.run([sys.executable, tmp_path / "site/build.py"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.endswith("npm ci --prefix site\n") and run.stderr.count("\n") == 1


@pytest.mark.launch
def test_both_languages_have_the_same_pages(parsed):
    chinese = {name.removeprefix("zh/") for name in parsed if name.startswith("zh/")}
    assert chinese == {name for name in parsed if not name.startswith("zh/")} and len(chinese) > 2 * len(pages.days())


@pytest.mark.launch
def test_no_link_is_broken_and_nothing_is_taken_from_elsewhere(site, parsed):
    broken = []
    for name, page in parsed.items():
        for address in page.links + page.resources:
            if urlparse(address).scheme:
                if address in page.resources or not address.startswith(("https://", "http://")):
                    broken.append(f"{name}: {address} is elsewhere")
                continue
            path, anchor = urldefrag(urljoin(f"/{name}", address))
            there = unquote(path).lstrip("/")
            if not (site / there).is_file():
                broken.append(f"{name}: {address} leads nowhere")
            elif anchor and anchor not in parsed[there].ids | {"__top"}:
                broken.append(f"{name}: {address} names no place there")
    assert not broken, f"{len(broken)} broken: {broken[:8]}"


@pytest.mark.launch
def test_every_day_is_one_click_from_home_and_every_page_says_its_version(parsed):
    version = re.search(r"^deepspeed==(.*)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
    for home in ("index.html", "zh/index.html"):
        assert {f"{day}/notes.html" for day in pages.days()} <= set(parsed[home].links)
    assert not [name for name, page in parsed.items() if f"DeepSpeed {version}" not in page.text]


@pytest.mark.launch
def test_the_site_is_small(site):
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 40e6


# --- in a browser ---


class Server(http.server.SimpleHTTPRequestHandler):
    """A plain file server. `INDEXED = False`: the search's index, the same on all pages, is empty."""

    INDEXED = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.INDEXED or not self.path.endswith("/search.json"):
            return super().do_GET()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"config": {"separator": " "}, "items": []}).encode())


@pytest.fixture(scope="module")
def address(site):
    """The site's address, below a sub-path."""
    handler = functools.partial(Server, directory=site.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/course/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("Chromium is not installed: sudo apt-get install chromium chromium-driver")
    pytest.importorskip("selenium", reason="pip install -r day28/requirements.txt")
    from day28.labs.screenshot import open_browser

    with open_browser() as chromium:
        yield chromium


def look(browser, size, dark):
    """A window of this size, with the system's colours light or dark."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def until(browser, script, *arguments):
    """Wait until JavaScript says something true, and return it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30, 0.05).until(
        lambda _: browser.execute_script(f"return {script}", *arguments), script
    )


# What is wrong with a page as it stands in the window: too wide, a picture that is not there, something from elsewhere.
FAULTS = """
const wrong = [];
const wide = document.documentElement.scrollWidth - innerWidth;
if (wide > 0) wrong.push(`${wide} px too wide`);
for (const img of document.images) if (img.complete && !img.naturalWidth) wrong.push(`no picture ${img.src}`);
for (const { name } of performance.getEntriesByType("resource"))
    if (!name.startsWith(location.origin) && !name.startsWith("data:")) wrong.push(`from elsewhere: ${name}`);
return wrong"""


def faults(browser, address, names):
    """{page: what is wrong with it}, on a phone in the dark and on a desk in the light."""
    wrong = {}
    browser.get_log("browser")
    for name in names:
        look(browser, PHONE, True)
        browser.get(address + name)
        until(browser, "document.body.dataset.mdColorScheme === 'slate'")
        found = browser.execute_script(FAULTS)
        look(browser, DESK, False)
        until(browser, "document.body.dataset.mdColorScheme === 'default'")
        found += browser.execute_script(FAULTS)
        found += [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        if found:
            wrong[name] = found
    return wrong


@pytest.mark.launch
@LANGUAGES
def test_every_kind_of_page_at_two_sizes_in_both_themes(browser, address, zh):
    assert faults(browser, address, [f"{'zh/' if zh else ''}{name}" for name in KINDS]) == {}


@pytest.mark.launch
@pytest.mark.long
@LANGUAGES
def test_every_page_at_two_sizes_in_both_themes(browser, address, parsed, zh, monkeypatch):
    monkeypatch.setattr(Server, "INDEXED", False)
    assert faults(browser, address, [name for name in parsed if name.startswith("zh/") == zh]) == {}


@pytest.mark.launch
def test_every_diagram_can_be_drawn_and_every_formula(browser, address, parsed):
    look(browser, DESK, True)
    browser.get(f"{address}day06/notes.html")
    browser.execute_script("diagrams.forEach((pre) => pre.scrollIntoView())")  # they are drawn when one comes to them
    until(browser, "diagrams.every((pre) => pre.querySelector('svg text, svg foreignObject'))")
    wanted = {name: page.diagrams for name, page in parsed.items() if page.diagrams}
    assert len(wanted) > 40
    wrong = browser.execute_async_script(
        """const [wanted, done] = arguments;
        const tryAll = async (wrong) => {
            for (const [name, sources] of Object.entries(wanted))
                for (const source of sources)
                    await mermaid.render("one", source).catch((error) => (wrong[name] = error.message));
            return wrong;
        };
        tryAll({}).then(done)""",
        wanted,
    )
    assert wrong == {}
    with_formulas = [name for name, page in parsed.items() if "arithmatex" in page.text]
    assert len(with_formulas) >= 2
    for name in with_formulas:
        browser.get(address + name)
        until(browser, "[...formulas].every((formula) => formula.querySelector('.katex math'))")
        assert not browser.execute_script("return document.querySelectorAll('.katex-error').length")


@pytest.mark.launch
@pytest.mark.parametrize(("zh", "dark"), [(False, False), (True, True)], ids=["en-light", "zh-dark"])
def test_no_serious_fault_for_people_with_other_senses(browser, address, zh, dark):
    axe, wrong = (SITE / "node_modules/axe-core/axe.min.js").read_text(), {}
    for name in KINDS:
        look(browser, DESK if dark else PHONE, dark)
        browser.get(f"{address}{'zh/' if zh else ''}{name}")
        browser.execute_script("diagrams.forEach(drawSoon)")
        until(browser, "diagrams.every((pre) => pre.querySelector('svg'))")
        browser.execute_script(axe)
        found = browser.execute_async_script("axe.run().then(arguments[0])")["violations"]
        serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
        if serious:
            wrong[name] = [f"{f['id']}: {f['nodes'][0]['html'][:200]} {f['nodes'][0]['any']}" for f in serious]
    assert not wrong, json.dumps(wrong, indent=1, ensure_ascii=False)


# The search's dialog lies in a shadow root of its own.
SEARCH = "[...document.body.children].map((part) => part.shadowRoot?.querySelector('dialog')).find(Boolean)"


def find(browser, text):
    """Type a text into the site's search; the titles and excerpts that it shows, with the words it found marked."""
    from selenium.webdriver.common.by import By

    browser.find_element(By.CSS_SELECTOR, ".md-search__button").click()
    until(browser, f"{SEARCH}?.querySelector('input')").send_keys(text)
    until(browser, f"{SEARCH}.querySelector('[role=listbox] li')")
    return browser.execute_script(
        f"return [...{SEARCH}.querySelectorAll('[role=listbox] li')].map((item) => item.innerText.toLowerCase())"
    )


@pytest.mark.launch
@pytest.mark.parametrize(("start", "text"), [("", "loss scale"), ("zh/", "梯度累积"), ("zh/", "loss scale")])
def test_search_finds_words_of_both_languages(browser, address, start, text):
    look(browser, DESK, False)
    browser.get(f"{address}{start}index.html")
    found = find(browser, text)
    assert text in found[0], found[:3]
    said = browser.execute_script(f"return {SEARCH}.querySelector('[role=status]').textContent")
    assert ("条结果" if start else "result") in said


@pytest.mark.launch
def test_the_first_page_is_light(browser, site, address):
    look(browser, DESK, False)
    browser.execute_cdp_cmd("Network.clearBrowserCache", {})
    browser.get(f"{address}index.html")
    taken = "performance.getEntriesByType('resource').map((entry) => entry.name)"
    until(browser, f"{taken}.some((name) => name.includes('search.json'))")  # it is asked for at once, and counts
    taken = browser.execute_script(f"return {taken}")
    files = {site / urlparse(name).path.removeprefix("/course/") for name in taken} | {site / "index.html"}
    assert sum(len(gzip.compress(path.read_bytes())) for path in files) < 400e3


@pytest.mark.launch
def test_the_language_switch_lands_on_the_same_place(browser, address):
    from selenium.webdriver.common.by import By

    look(browser, PHONE, False)
    for here, there in (("", "zh/"), ("zh/", "")):
        browser.get(f"{address}{here}day11/notes.html#measured")
        browser.find_element(By.CSS_SELECTOR, ".course-language").click()
        until(browser, "location.href === arguments[0]", f"{address}{there}day11/notes.html#measured")
        assert browser.execute_script("return document.getElementById('measured').tagName") == "H2"


@pytest.mark.launch
def test_ticks_survive_are_counted_and_travel(browser, address, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    look(browser, DESK, False)
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.get(f"{address}day02/notes.html")
    browser.find_element(By.CSS_SELECTOR, "[data-tick=day02]").click()
    browser.execute_script("document.querySelector('[data-tick=\"day02/1\"]').click()")
    browser.refresh()
    assert browser.find_element(By.CSS_SELECTOR, "[data-tick=day02]").is_selected()
    browser.get(f"{address}zh/index.html")
    assert browser.find_element(By.ID, "ticked").text == f"{len(pages.days())} 天中的 1 天，1 道练习"
    browser.find_element(By.ID, "export").click()
    saved = tmp_path / "deepspeed-course.json"
    WebDriverWait(browser, 30).until(lambda _: saved.exists(), "the export was not saved")
    assert set(json.loads(saved.read_text())) == {"day02", "day02/1"}
    browser.execute_script("localStorage.clear()")
    browser.get(f"{address}index.html")
    assert browser.find_element(By.ID, "ticked").text == f"0 of {len(pages.days())} days, 0 exercises"
    (tmp_path / "other.json").write_text('{"a": 1}')
    browser.find_element(By.ID, "import").send_keys(str(tmp_path / "other.json"))
    until(browser, "document.getElementById('ticked').value.includes('other.json is no export')")
    browser.find_element(By.ID, "import").send_keys(str(saved))
    until(browser, "document.getElementById('ticked').value.startsWith('1 of')")
    browser.execute_script("localStorage.clear()")


@pytest.mark.launch
def test_the_symptom_book_finds_each_of_its_messages(browser, address):
    from selenium.webdriver.common.by import By

    look(browser, DESK, False)
    browser.get(f"{address}zh/day13/symptoms.html")
    pasted = {entry["id"]: f"[rank1]: {entry['message'].replace('…', 'x y')} (pid 7)" for entry in symptoms()}
    found = browser.execute_script(
        """const rows = symptomRows();
        const first = (text) => searchSymptoms(rows, text)[0].row.querySelector("a[id]").id;
        return Object.fromEntries(Object.entries(arguments[0]).map(([id, text]) => [id, first(text)]))""",
        pasted,
    )
    assert {key: there for key, there in found.items() if key != there} == {}
    browser.find_element(By.ID, "symptom").send_keys("mat1 and mat2 must have the same dtype, but got Half and Float")
    shown = until(browser, "[...document.querySelectorAll('tbody tr:not(.hidden) a[id]')].map((a) => a.id)")
    assert len(shown) <= 5 and "bf16_inputs" in shown


@pytest.mark.launch
def test_a_days_first_mention_of_a_term_leads_to_the_glossary(browser, address):
    look(browser, DESK, False)
    for start, word in (("", "loss scale"), ("zh/", "损失缩放系数")):
        browser.get(f"{address}{start}day11/notes.html")
        links = browser.execute_script(
            "return [...document.querySelectorAll('a.term')].map((a) => [a.textContent, a.href, a.title])"
        )
        targets = [target for _, target, _ in links]
        assert len(targets) == len(set(targets)) > 8 and all(meaning for _, _, meaning in links)
        assert any(target == f"{address}{start}glossary.html#loss-scale" for target in targets), (word, links)


@pytest.mark.launch
@LANGUAGES
def test_the_calculator_plans_keeps_its_state_in_the_address_and_checks(browser, address, zh):
    from selenium.webdriver.common.by import By

    look(browser, PHONE, True)
    page = f"{address}{'zh/' if zh else ''}calculator/index.html"
    browser.get(f"{page}#model=qwen2.5-7b&gpus=2&gpu_mem=40&seq_len=2048&trainable=lora&lora_rank=64&checkpointing=0")
    args = "--model qwen2.5-7b --gpus 2 --gpu_mem 40 --seq_len 2048 --trainable lora --lora_rank 64"
    args = plan.parse_args(args.split())
    rows = plan.make_plan(named_model("qwen2.5-7b"), args)
    sizes = [(row["name"], row["need"]["on_card"] / plan.GIB) for row in rows]
    cells = (
        "[...document.querySelectorAll('#result tr')].slice(1).map((tr) => [1, 2].map((i) => tr.cells[i].innerText))"
    )
    want = [[name, f"{size:.{2 if size < 10 else 1}f}"] for name, size in sizes]
    assert until(browser, cells) == want
    chosen = browser.execute_script("return JSON.parse(document.getElementById('template').textContent)")
    assert chosen == plan.recommend(rows, 2)["config"]
    gpus = browser.find_element(By.NAME, "gpus")
    gpus.clear()
    gpus.send_keys("4")
    until(browser, "location.hash.includes('gpus=4')")
    browser.refresh()
    assert until(browser, "document.forms.plan.elements.gpus.value") == "4"
    json_ = browser.find_element(By.NAME, "config")
    json_.send_keys('{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2, "overlap_com": true}}')
    said = "document.getElementById('findings').innerText"
    assert "zero_optimization.overlap_com" in until(browser, said)
    assert "overlap_comm?" in until(browser, said) and len(until(browser, cells)) == 1  # the plan of this JSON alone


@pytest.mark.launch
def test_the_folder_works_without_a_server(browser, site):
    look(browser, DESK, False)
    browser.get_log("browser")
    browser.get((site / "zh/day10/notes.html").as_uri())
    browser.execute_script("diagrams.forEach(drawSoon)")
    until(browser, "diagrams.every((pre) => pre.querySelector('svg'))")
    assert "梯度累积" in find(browser, "梯度累积")[0]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
