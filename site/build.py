"""Build the course site, both languages, from the repository's Markdown: `make site`.

    pip install -r site/requirements.txt
    npm ci --prefix site
    python site/build.py                 # site/html/index.html, and site/html/zh/index.html

The result is a folder that any web server can serve, under any path, and that a browser opens without a server.
Source: https://zensical.org/docs/ (Zensical 0.0.73), https://squidfunk.github.io/mkdocs-material/reference/
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository

import pages

from common.errors import UserError, clear_errors

# npm package's file -> its name in assets/, and whether it lies there once for both languages
SHIPPED = {
    "@mermaid-js/tiny/dist/mermaid.tiny.js": ("mermaid.js", True),
    "iframe-worker/shim/index.js": ("iframe-worker.js", False),
    "katex/dist/katex.min.js": ("katex/katex.js", True),
    "katex/dist/katex.min.css": ("katex/katex.css", True),
    "katex/dist/fonts": ("katex/fonts", True),
}
# Pygments marks every word; those that no theme colours make pages three times as large.
PLAIN = re.compile(r'<span class="(?:n|p|w|o|nn|bp)">([^<]*)</span>')
# What Zensical's search says in English whatever the language is.
SEARCH_ZH = {
    '"aria-label":"Search"': '"aria-label":"搜索"',
    'placeholder:"Search"': 'placeholder:"搜索"',
    '"aria-label":"Search results"': '"aria-label":"搜索结果"',
    '"aria-label":"Close search"': '"aria-label":"关闭搜索"',
    '"aria-label":"Filters"': '"aria-label":"筛选"',
    '"result":"results"': '"条结果":"条结果"',
    '"No results"': '"没有结果"',
    '"Search is unavailable. Reload the page to try again."': '"搜索暂不可用，请刷新页面。"',
}
PALETTE_ZH = {"Light or dark as the system": "跟随系统", "Light": "浅色", "Dark": "深色"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "html", help="folder of the site; what is in it goes")
    parser.add_argument("--generator", choices=["zensical", "mkdocs"], default="zensical", help="who makes the HTML")
    return parser.parse_args()


def versions() -> str:
    """What the notes are checked with, for the foot of each page."""
    pins = dict(re.findall(r"^(\w+)==(\S+)", (pages.ROOT / "requirements.txt").read_text(), re.M))
    return f"DeepSpeed {pins['deepspeed']} · PyTorch {pins['torch']} · Apache-2.0"


def settings(zh: bool) -> dict:
    """mkdocs.yml for one language."""
    found = yaml.safe_load((HERE / "mkdocs.yml").read_text(encoding="utf-8"))
    found |= {"docs_dir": "docs", "site_dir": "html", "nav": pages.nav(zh), "copyright": versions()}
    found |= {"use_directory_urls": False, "site_name": pages.read("README.md", zh).partition("\n")[0].lstrip("# ")}
    found["theme"] |= {"language": "zh" if zh else "en", "custom_dir": "theme"}
    for option in found["theme"]["palette"] if zh else []:
        option["toggle"]["name"] = PALETTE_ZH[option["toggle"]["name"]]
    return found


def stage(zh: bool, docs: Path) -> None:
    """Everything that the generator reads: pages, pictures that they show, the files that they name, scripts."""
    for name, text in pages.all_pages(zh).items():
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / name).write_text(text, encoding="utf-8")
        for picture in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", pages.FENCE.sub("", text)):
            there = (docs / name).parent / picture
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy((pages.ROOT / name).parent / picture, there)
    shutil.copytree(HERE / "assets", docs / "assets")
    if not zh:  # the Chinese pages use the same ones
        for path in pages.code_places():
            (docs / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pages.ROOT / path, docs / pages.raw_place(path))
    for package, (name, shared) in SHIPPED.items():
        source, there = HERE / "node_modules" / package, docs / "assets" / name
        if source.is_dir() and not (zh and shared):
            shutil.copytree(source, there, ignore=shutil.ignore_patterns("*.ttf", "*.woff"))
        elif not (zh and shared):
            there.parent.mkdir(exist_ok=True)
            shutil.copy(source, there)
    glossary = [{"id": t["id"], "words": t["words"][zh], "meaning": t["meaning"][zh]} for t in pages.terms()]
    words = f"const GLOSSARY = {json.dumps(glossary, ensure_ascii=False)};\n"
    (docs / "assets/glossary.js").write_text(words, encoding="utf-8")
    if not zh:  # the Chinese page uses the same script
        bundle_calculator(docs)


def calculator_data() -> dict:
    """What the calculator takes from config/: models, a run's defaults, templates, the schema, known wrong keys."""
    from config import memory, models, plan, presets
    from config.rules.names import DELETE, WRONG

    names = sorted({*plan.ONE_GPU, *plan.MANY_GPUS, *plan.LORA, "zero2_fp16"})
    return {
        "models": {name: models.named_model(name).shape() for name in [*presets.GPT2, *presets.PRESETS]},
        "usual": memory.RUN,
        "templates": {name: plan.read_config(pages.ROOT / f"config/{name}.json") for name in names},
        "fp16": plan.FP16,
        "one": plan.ONE_GPU,
        "many": plan.MANY_GPUS,
        "lora": plan.LORA,
        "schema": json.loads((pages.ROOT / "config/ds_config.schema.json").read_text(encoding="utf-8")),
        "wrong": {
            section: {key: cure.removeprefix(DELETE) for keys, cure in table.items() for key in keys.split()}
            for section, table in WRONG.items()
        },
    }


def bundle_calculator(docs: Path) -> None:
    """The calculator's modules, its data and ajv as one script, which works from a folder (file://) as well."""
    (docs / "calculator").mkdir(exist_ok=True)
    shutil.copy(HERE / "calculator/page.css", docs / "calculator")
    data = docs / "calculator/data.json"
    data.write_text(json.dumps(calculator_data(), ensure_ascii=False), encoding="utf-8")
    esbuild = [HERE / "node_modules/.bin/esbuild", HERE / "calculator/page.js", f"--alias:calculator-data={data}"]
    options = ["--bundle", "--minify", "--format=iife", "--charset=utf8", "--log-level=warning"]
    subprocess.run([*esbuild, *options, f"--outfile={docs}/calculator/calculator.js"], check=True)
    data.unlink()


def build(zh: bool, html: Path, generator: str) -> str:
    """One language; what the generator said."""
    with tempfile.TemporaryDirectory() as folder:
        stage(zh, Path(folder) / "docs")
        shutil.copytree(HERE / "theme", Path(folder) / "theme")
        config = Path(folder) / "mkdocs.yml"
        config.write_text(yaml.safe_dump(settings(zh), allow_unicode=True, sort_keys=False), encoding="utf-8")
        program = Path(sys.executable).parent / generator
        run = subprocess.run([program, "build", "-f", config], capture_output=True, text=True, cwd=folder)
        if run.returncode:
            raise UserError(f"{generator} could not build the site:\n{run.stdout}{run.stderr}")
        shutil.move(Path(folder) / "html", html)  # Zensical writes only beside its settings
        return f"{run.stdout}{run.stderr}".strip()


def lighten(html: Path) -> None:
    """Take out of what was built what nobody sees: marks without colour, and listings in the index of the search."""
    for path in html.rglob("404.html"):  # its links begin with /: wrong below a sub-path
        path.unlink()
    for path in html.rglob("*.html"):
        path.write_text(PLAIN.sub(r"\1", path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in html.rglob("search.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        for item in index["items"]:
            item["text"] = re.sub(r"<(pre|sub).*?</\1>", "", item["text"], flags=re.S)
        text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
        path.write_text(text, encoding="utf-8")
        path.with_suffix(".js").write_text(f"var __index = {text}", encoding="utf-8")  # for file://


def translate_search(html: Path) -> None:
    """The words of the search's dialog in Chinese, in the script that shows them."""
    (bundle,) = html.glob("assets/javascripts/bundle.*.min.js")
    text = bundle.read_text(encoding="utf-8")
    for english, chinese in SEARCH_ZH.items():
        if english not in text:
            raise UserError(f"{bundle.name} no longer says {english}: bring SEARCH_ZH in site/build.py up to date")
        text = text.replace(english, chinese)
    bundle.write_text(text, encoding="utf-8")


def main() -> None:
    args = parse_args()
    if missing := [package for package in SHIPPED if not (HERE / "node_modules" / package).exists()]:
        raise UserError(f"site/node_modules has no {missing[0]}: npm ci --prefix site")
    shutil.rmtree(args.out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        parts = [Path(folder) / "en", Path(folder) / "zh"]
        print(*pool.map(build, (False, True), parts, (args.generator,) * 2), sep="\n")
        shutil.move(parts[0], args.out)
        shutil.move(parts[1], args.out / "zh")
    lighten(args.out)
    if args.generator == "zensical":
        translate_search(args.out / "zh")
    print(f"{args.out}/index.html")


if __name__ == "__main__":
    with clear_errors():
        main()
