"""Day 25, your turn: three small functions that a data pipeline stands on.

Fill in the three TODOs, then check yourself (any number of ranks; each checks for itself):

    deepspeed --num_accelerators 2 day25/exercise.py

It says what is wrong, or "solved". The answers are in solution.py. Source: day25/notes.md.
"""

import argparse
import hashlib
import math
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher


def split_of(text: str, held_out_share: float) -> str:
    """Return "held_out" for `held_out_share` of all texts, else "train", whatever other texts there are."""
    # TODO 1: no random numbers, and not Python's hash() of a string, which differs from process to process: hashlib.
    # The first 8 bytes of a SHA-256, read as a number, are spread evenly from 0 to 2**64.
    # 对 held_out_share 的文本返回 "held_out"，其余返回 "train"，与有没有别的文本无关。不用随机数，也不用 Python 对字
    # 符串的 hash()，它每个进程都不同：用 hashlib。SHA-256 的前 8 个字节读成一个数，均匀分布在 0 到 2**64。
    raise NotImplementedError


def bits_per_byte(total_nats: float, text: str) -> float:
    """Bits a byte of `text`, on whose tokens the model lost `total_nats` (natural logarithm) in all."""
    # TODO 2: bytes are those of UTF-8, not characters; a bit is ln 2 nats.
    # text 的每字节比特数；模型在它的 token 上总共损失 total_nats（自然对数）。字节是 UTF-8 的字节，不是字符；一比特是
    # ln 2 nats。
    raise NotImplementedError


def problem_with(folder: Path, manifest: dict[str, dict]) -> str | None:
    """Return a sentence that names the first file (in order of names) that is not as in `manifest`, or None.

    `manifest` is {file name: {"bytes": size, "sha256": hexadecimal}}. A file may be missing, short, or changed.
    """
    # TODO 3: the size is looked at first, because it costs nothing.
    # 返回一句话，说出第一个（按名字排序）与 manifest 不符的文件；都相符返回 None。manifest 是 {文件名: {"bytes": 大小
    # , "sha256": 十六进制}}。文件可能缺失、变短或被改动。先看大小，因为这不费什么。
    raise NotImplementedError


def check(split_of, bits_per_byte, problem_with) -> None:
    """Try the three functions; UserError says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    try:
        texts = [f"document {number}" for number in range(4000)]
        parts = {text: split_of(text, 0.1) for text in texts}
        if wrong := set(parts.values()) - {"train", "held_out"}:
            raise UserError(f'not yet: split_of returned {wrong.pop()!r}, want "train" or "held_out".')
        share = sum(part == "held_out" for part in parts.values()) / len(parts)
        if not 0.08 < share < 0.12:
            raise UserError(f"not yet: {share:.1%} of the texts are held out, want about 10 %.")
        known = ["document 21", "document 59"], ["document 0", "document 1"]
        for part, names in zip(("held_out", "train"), known, strict=True):
            for name in names:
                if split_of(name, 0.1) != part:
                    raise UserError(f"not yet: {name!r} belongs to {part} by its SHA-256; another process must agree.")
        if not math.isclose(found := bits_per_byte(3 * math.log(2), "abc"), 1):
            raise UserError(f"not yet: 3 ln 2 nats on 'abc' are 1 bit a byte, you have {found}.")
        if not math.isclose(found := bits_per_byte(6 * math.log(2), "鲸鱼"), 1):
            raise UserError(f"not yet: '鲸鱼' has 6 bytes and 2 characters; you have {found} for 6 ln 2 nats, want 1.")
        with tempfile.TemporaryDirectory() as name:
            folder, manifest = Path(name), {}
            for file in ("b.bin", "a.bin", "c.bin"):
                (folder / file).write_bytes(file.encode() * 100)
                manifest[file] = {"bytes": 500, "sha256": hashlib.sha256(file.encode() * 100).hexdigest()}
            cases = {"c.bin": lambda f: f.unlink(), "b.bin": lambda f: f.write_bytes(b"b" * 500)}
            cases |= {"a.bin": lambda f: f.write_bytes(b"a" * 499)}
            if found := problem_with(folder, manifest):
                raise UserError(f"not yet: all files are whole, and you say {found!r}.")
            for file, damage in cases.items():
                damage(folder / file)
                found = problem_with(folder, manifest)
                if not found or file not in found:
                    raise UserError(f"not yet: {file} is damaged (the first by name), and you say {found!r}.")
    except Exception as error:
        if isinstance(error, UserError | NotImplementedError):  # an open TODO is named by clear_errors
            raise
        asked = traceback.extract_tb(error.__traceback__)[0].line
        raise UserError(f"not yet: `{asked}` ended with {type(error).__name__}: {error}.") from error
    print0("solved: a split that stays, bits a byte, and three damaged files found")


if __name__ == "__main__":
    with clear_errors():
        check(split_of, bits_per_byte, problem_with)
