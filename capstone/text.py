"""What prepare.py does to a document: read, clean, sign for deduplication. Pure functions and one dictionary. Day 25.

MinHash and its banding are numpy here, not the datasketch library: signatures and band keys must lie on disk as
arrays, for a few bytes a document; datasketch 2.0 keeps an LSH index of Python objects in memory, and needs SciPy.
Sources: Rae et al. 2021 (arXiv:2112.11446), appendix A.1, on quality; Brown et al. 2020 (arXiv:2005.14165), appendix
C, on contamination; Broder 1997, On the resemblance and containment of documents; Leskovec, Rajaraman, Ullman, Mining
of Massive Datasets, chapter 3; Lee et al. 2022 (arXiv:2107.06499) on why deduplicating makes language models better.
"""

import hashlib
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.errors import UserError
from data.documents import kind_of, paragraphs, read_lines

# --- read: (text or None, bytes of the source read so far), one after another, never a whole source in memory ---

MAX_FILE_DOCUMENT = 64 * 2**20


def read_file(
    path: Path, text_key: str, documents: str, encoding: str | None = None
) -> Iterator[tuple[str | None, int]]:
    """Yield the documents of a .jsonl, .txt or .md file; None for a line that is no JSON object with a text."""
    lines = read_lines(path, encoding)
    if kind_of(path) == ".jsonl":
        for line, at in lines:
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_key]
            except (ValueError, KeyError, TypeError):
                text = None
            yield text if isinstance(text, str) else None, at
    elif documents == "paragraph":
        yield from paragraphs(lines)
    else:
        text, at = [], 0
        for line, at in lines:
            text.append(line)
            if at > MAX_FILE_DOCUMENT:
                raise UserError(f"{path} is one document of more than 64 MiB: data.text_documents=paragraph cuts it")
        yield "".join(text), at


# --- clean: rules in order, each counted by name ---

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufffd]")  # \t \n stay, so do joiners
BLANKS = re.compile(r"[ \t\u00a0\u3000]*\n|[ \t\u00a0\u3000]{2,}")
MANY_LINES = re.compile(r"\n{3,}")


def one_blank(found: re.Match) -> str:
    return "\n" if found[0].endswith("\n") else " "


RULES = (
    ("unicode_nfc", lambda text: unicodedata.normalize("NFC", text)),
    ("line_ends", lambda text: text.replace("\r\n", "\n").replace("\r", "\n")),
    ("control_characters", lambda text: CONTROL.sub("", text)),
    ("whitespace", lambda text: MANY_LINES.sub("\n\n", BLANKS.sub(one_blank, text)).strip()),
)  # fmt: skip


def clean(text: str, min_chars: int, min_letters: float, counts: Counter, quality: str = "none") -> str | None:
    """Return the text as it is kept, or None when it is dropped; `counts` learns what each rule changed or dropped."""
    for name, rule in RULES:
        changed = rule(text)
        counts[f"changed_{name}"] += changed != text
        text = changed
    if len(text) < min_chars:
        counts["dropped_short"] += 1
        return None
    if sum(map(str.isalpha, text)) < min_letters * len(re.sub(r"\s", "", text)):
        counts["dropped_no_letters"] += 1
        return None
    if quality == "gopher" and (flaw := gopher_flaw(text)):
        counts[f"dropped_{flaw}"] += 1
        return None
    return text


STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
MOST_OF_TEXT = {2: 0.20, 3: 0.18, 4: 0.16}  # words in a row: share of the characters that the commonest may make up


def gopher_flaw(text: str) -> str | None:
    """The first of Gopher's rules that the text breaks. They were made for web pages in English: lists, menus, spam."""
    words, lines = text.split(), [line.strip() for line in text.splitlines() if line.strip()]
    letters = sum(any(map(str.isalpha, word)) for word in words)
    rules = {
        "word_count": not 50 <= len(words) <= 100_000,
        "word_length": not 3 <= sum(map(len, words)) / max(1, len(words)) <= 10,
        "symbols": text.count("#") + text.count("...") + text.count("\u2026") > 0.1 * len(words),
        "bullets": sum(line[0] in "-*\u2022" for line in lines) > 0.9 * len(lines),
        "ellipses": sum(line.endswith(("...", "\u2026")) for line in lines) > 0.3 * len(lines),
        "few_words": letters < 0.8 * len(words),
        "stop_words": len(STOP_WORDS & set(text.casefold().split())) < 2,
        "repeated_lines": len(lines) - len(set(lines)) > 0.3 * len(lines),
    }
    flaw = next((name for name, broken in rules.items() if broken), None)
    return flaw or ("repeated_words" if repeats_itself(words) else None)


def repeats_itself(words: list[str]) -> bool:
    for length, most in MOST_OF_TEXT.items():
        runs = Counter(zip(*(words[at:] for at in range(length)), strict=False))
        run, times = runs.most_common(1)[0]
        if times > 1 and times * sum(map(len, run)) > most * sum(map(len, words)):
            return True
    return False


# --- sign: an exact key, and a MinHash signature of which two documents share as large a part as of their shingles ---

CONTAMINATED, COMMON = 13, 10  # words in a row that an evaluation text shares; in more documents they are a phrase
NUM_HASHES, BAND_ROWS, SHINGLE = 128, 4, 5  # 32 bands: a pair at 0.8 meets in one with probability 1 - 5e-8
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")  # Chinese and Japanese have no spaces: a character is a word
_random = np.random.default_rng(20260125)
MULTIPLY = _random.integers(0, 2**63, NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
ADD = _random.integers(0, 2**63, NUM_HASHES, dtype=np.uint64)


def exact_key(text: str) -> bytes:
    """16 bytes that are equal for documents that differ in case and spaces at most."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()[:16]


def split_of(key: bytes, held_out_share: float) -> str:
    """Which part a document belongs to: by its own key alone, so that other documents cannot move it."""
    return "held_out" if int.from_bytes(key[:8], "big") < held_out_share * 2**64 else "train"


def copies_of(key: bytes, weight: float) -> int:
    """How often a document of a source with this weight is trained on: 2.5 is twice, and every other one once more."""
    return int(weight) + (int.from_bytes(key[8:], "big") < weight % 1 * 2**64)


@lru_cache(maxsize=200_000)
def word_hash(word: str) -> int:
    return zlib.crc32(word.encode())


def shingles(text: str, length: int = SHINGLE) -> np.ndarray:
    """One 64-bit number for each distinct run of `length` words."""
    words = np.array([word_hash(word) for word in WORD.findall(text.casefold())], dtype=np.uint64)
    if len(words) < length:  # too short for one: the whole is the shingle
        words = np.pad(words, (0, length - len(words)))
    mixed = np.zeros(len(words) - length + 1, dtype=np.uint64)
    for at in range(length):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + words[at : len(words) - length + 1 + at]
    for shift in (np.uint64(31), np.uint64(27)):  # spread over all bits, as splitmix64 does
        mixed = (mixed ^ (mixed >> shift)) * np.uint64(0xBF58476D1CE4E5B9)
    return np.unique(mixed)


def signature(text: str) -> np.ndarray:
    """128 numbers: for each of 128 hash functions, the smallest hash of a shingle."""
    smallest = np.full(NUM_HASHES, np.iinfo(np.uint32).max, dtype=np.uint32)
    numbers = shingles(text)
    for part in np.array_split(numbers, -(-len(numbers) // 8192)):
        hashed = (part[:, None] * MULTIPLY + ADD) >> np.uint64(32)  # multiply-shift hashing, 32 bits kept
        smallest = np.minimum(smallest, hashed.min(axis=0).astype(np.uint32))
    return smallest


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of signatures (rows); its standard error is at most 0.044."""
    return (one == other).mean(axis=-1)


def duplicates(keys: np.ndarray, signatures: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (exact, near): for each document whether an earlier one has its key, or is at least `threshold` similar.

    Documents that meet in a band are compared by their whole signatures, each with the first one and the one before it
    in the bucket; of each group found so, the first one stays. A band at a time, so memory is ~50 bytes a document.
    """
    _, first = np.unique(keys.view("V16").ravel(), return_index=True)
    exact = np.ones(len(keys), dtype=bool)
    exact[first] = False
    kept, group = np.flatnonzero(~exact), {}

    def head(document: int) -> int:
        while (above := group.get(document, document)) != document:
            document = above
        return document

    for band in range(0, NUM_HASHES, BAND_ROWS):
        bucket = np.zeros(len(kept), dtype=np.uint64)
        for row in range(band, band + BAND_ROWS):
            bucket = (bucket * np.uint64(0x9E3779B97F4A7C15)) ^ signatures[kept, row]
        order = np.argsort(bucket, kind="stable")
        starts = np.flatnonzero(np.r_[True, bucket[order][1:] != bucket[order][:-1]]) if len(order) else order
        heads = np.repeat(starts, np.diff(np.r_[starts, len(order)]))
        later = np.flatnonzero(heads != np.arange(len(order)))
        for block in np.array_split(later, len(later) // 4096 + 1):
            for others in (heads[block], block - 1):
                a, b = kept[order[others]], kept[order[block]]
                alike = similarity(signatures[a], signatures[b]) >= threshold
                for one, other in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
                    low, high = sorted((head(one), head(other)))
                    group[high] = low
    near = np.zeros(len(keys), dtype=bool)
    near[[document for document in group if head(document) != document]] = True
    return exact, near
