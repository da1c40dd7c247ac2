"""Day 25, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day25/solution.py. Source: notes.md."""

import hashlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day25.exercise import check, clear_errors


def split_of(text: str, held_out_share: float) -> str:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "held_out" if number < held_out_share * 2**64 else "train"


def bits_per_byte(total_nats: float, text: str) -> float:
    return total_nats / math.log(2) / len(text.encode())


def problem_with(folder: Path, manifest: dict[str, dict]) -> str | None:
    for file in sorted(manifest):
        path = folder / file
        if not path.exists():
            return f"{file} is missing"
        if path.stat().st_size != manifest[file]["bytes"]:
            return f"{file} has {path.stat().st_size} bytes, want {manifest[file]['bytes']}"
        if hashlib.sha256(path.read_bytes()).hexdigest() != manifest[file]["sha256"]:
            return f"{file} has another SHA-256"
    return None


if __name__ == "__main__":
    with clear_errors():
        check(split_of, bits_per_byte, problem_with)
