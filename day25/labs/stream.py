"""Day 25: does preparing need memory in proportion to the text? Prepare ever longer texts, watch all processes.

    python day25/labs/stream.py
    python day25/labs/stream.py --copies 1 8

Expect seconds, MB of text a second, and the peak memory of the parent and its workers together (PSS: what they share
is counted once), for the shipped corpora and for text several times as long, made by shuffling their words.
Source: /proc/PID/smaps_rollup, in the Linux manual (man 5 proc).
"""

import argparse
import json
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from capstone.text import read_file
from common.data import DATA, SHIPPED
from common.errors import clear_errors
from common.run_log import default_run_dir

COLUMNS = {"MB of text": "text_bytes:MB", "tokens": "tokens:,", "seconds": "seconds:.0f", "MB/s": "mb_per_s:.1f"}
COLUMNS |= {"peak MB": "peak_bytes:MB", "peak/text": "ratio:.2f"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run_dir", default=default_run_dir("day25"), help="folder for stream.json and the prepared data"
    )
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 8, 24], help="lengths, in shipped corpora")
    parser.add_argument("--shipped", default="all", choices=list(SHIPPED), help="which of the shipped corpora")
    return parser.parse_args()


def make_text(path: Path, copies: int, shipped: str) -> int:
    """Write `copies` times the corpora, the words of each document in another order each time; return the bytes."""
    texts = [text for name in SHIPPED[shipped] for text, _ in read_file(DATA / name, "text", "file")]
    with open(path, "w", encoding="utf-8") as out:
        for copy in range(copies):
            for text in texts:
                words = text.split(" ")
                random.Random(copy).shuffle(words)
                out.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path.stat().st_size


def tree_bytes(process: psutil.Process) -> int:
    total = 0
    with suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):  # it ended meanwhile
                total += one.memory_full_info().pss
    return total


def main() -> None:
    args = parse_args()
    run_dir = Path(args.run_dir).resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    table = Table(run_dir / "stream.json", COLUMNS, width=10)
    for copies in args.copies:
        source, out = run_dir / f"text_{copies}.jsonl", run_dir / f"data_{copies}"
        text_bytes = make_text(source, copies, args.shipped)
        command = [sys.executable, "-m", "capstone.prepare", f"data.sources=[{source}]", f"data.folder={out}"]
        peak = 0
        start = time.perf_counter()
        child = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        while child.poll() is None:
            peak = max(peak, tree_bytes(psutil.Process(child.pid)))
            time.sleep(0.1)
        if child.returncode:
            sys.exit(child.returncode)
        seconds = time.perf_counter() - start
        tokens = sum(split["tokens"] for split in json.loads((out / "manifest.json").read_text())["splits"].values())
        row = {"case": f"{copies} x", "copies": copies, "text_bytes": text_bytes, "tokens": tokens, "seconds": seconds}
        table.add(row | {"mb_per_s": text_bytes / 1e6 / seconds, "peak_bytes": peak, "ratio": peak / text_bytes})
        source.unlink()
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
