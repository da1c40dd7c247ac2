"""A corpus as documents, the same for the days and the capstone: decoded strictly, nothing left out silently.

    from data.documents import open_documents, read_lines     # common/data.py tokenizes what they yield

A file is read by its suffix: .txt and .md are cut at blank lines (where there is none, each line is a document);
.jsonl, .json, .csv, .tsv and .parquet are read by the library `datasets`, and their column `text` is taken.
"""

import codecs
import gzip
import io
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from common.errors import UserError
from common.ranks import print0

OPENERS = {".xz": lzma.open, ".gz": gzip.open}
PLAIN = (".txt", ".md")
ROWS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}  # suffix -> loader
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# Parts of a name that say which split a file belongs to, as in the library `datasets`.
HELD_OUT, TEST = {"validation", "valid", "dev", "eval"}, {"test"}
SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # what save_to_disk writes


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file: .jsonl of rows.jsonl.xz."""
    return (Path(path.stem).suffix if path.suffix in OPENERS else path.suffix).lower()


@contextmanager
def _opened(path: Path, encoding: str | None) -> Iterator[tuple[BinaryIO, TextIO]]:
    """(the file as it lies, its text). `encoding` None: UTF-8, or what a byte order mark says.

    Raises UserError at the first byte that does not fit, with its offset, and for a damaged .xz or .gz.
    """
    opener = OPENERS.get(path.suffix, lambda file: file)
    try:
        with open(path, "rb") as raw, opener(raw) as unpacked:
            start = io.BufferedReader(unpacked)
            found = next((name for mark, name in MARKS.items() if start.peek(4).startswith(mark)), "utf-8")
            yield raw, io.TextIOWrapper(start, encoding or found, newline=None)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged, or not a {path.suffix} file at all: {error}") from None
    except UnicodeError:
        raise UserError(_bad_byte(path, encoding or "utf-8")) from None
    except LookupError:
        raise UserError(f"{path}: Python knows no encoding {encoding!r}; try utf-8, gb18030, big5, cp1252") from None


def read_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[str, int]]:
    """Yield (line with its end, bytes of the file read so far), decoded strictly: UserError as `_opened` says."""
    with _opened(path, encoding) as (raw, lines):
        for line in lines:
            yield line, raw.tell()


def paragraphs(lines: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Yield (paragraph, bytes read so far): what stands between blank lines."""
    paragraph, at = [], 0
    for line, at in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph), at
            paragraph = []
    if paragraph:
        yield "".join(paragraph), at


def _bad_byte(path: Path, encoding: str) -> str:
    """Where decoding stops, and which encodings would take the whole file."""
    with OPENERS.get(path.suffix, open)(path, "rb") as file:
        data = file.read()
    fits = []
    for name in ("gb18030", "big5", "cp1252"):
        try:
            data.decode(name)
            fits.append(name)
        except UnicodeDecodeError:
            continue
    try:
        data.decode(encoding)
        where = f"it is no {encoding}"
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at offset {error.start:,} is no {encoding}"
    name = f"{fits[0]} would do (also {', '.join(fits[1:])})" if fits[1:] else f"{fits[0]} would do" if fits else ""
    cure = f'{name}: "{path.name}:{fits[0]}", or data.encoding in the capstone' if fits else "repair it"
    return f"{path}: {where}; {cure}"


def open_documents(corpus: str, known: str) -> dict:
    """Return {"train": Dataset, "validation": where there is one}, of column `text`; say what was read and what not.

    `corpus`: a file, a folder, a folder of save_to_disk, "FILE:ENCODING", or a Hugging Face data set "name" or
    "name:config". `known`: what else the caller takes, for the error. Raises UserError when nothing of it fits.
    """
    import datasets  # here, because it takes a second to import

    datasets.disable_progress_bars()
    path, encoding = _local(corpus)
    if not path and kind_of(Path(corpus.partition(":")[0])) in (*PLAIN, *ROWS):  # no name of the hub's ends so
        raise UserError(f"corpus {corpus!r}: there is no such file")
    try:
        loaded, left_out = _read_files(path, encoding) if path else (_from_hub(corpus), [])
    except Exception as error:  # the libraries have no common base class for "not found", "offline", "not a data set"
        for own in (error, error.__cause__):  # `datasets` wraps what _documents raises
            if isinstance(own, UserError):
                raise own from None
        raise UserError(
            f"corpus {corpus!r} is neither {known}, nor a readable text file or folder, nor a data set that the"
            f" Hugging Face Hub served ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
    if "train" not in loaded:
        raise UserError(f"corpus {corpus!r} has no `train` split; it has {list(loaded)}")
    parts = {name: loaded[name] for name in ("train", "validation") if name in loaded}
    left_out += [f"split {name!r}" for name in loaded if name not in parts]
    for name, split in parts.items():
        if "text" not in split.column_names:
            raise UserError(f"corpus {corpus!r}, split {name!r} has no `text` column; it has {split.column_names}")
        parts[name] = split.filter(lambda text: bool(text and text.strip()), input_columns="text")
        if nulls := split.data.column("text").null_count:
            left_out.append(f"{nulls:,} null of {name}")
        if empty := len(split) - len(parts[name]) - nulls:
            left_out.append(f"{empty:,} empty of {name}")
    read = ", ".join(f"{len(split):,} documents ({name})" for name, split in parts.items())
    print0(f"corpus {corpus}: {read}" + (f" | left out: {', '.join(left_out)}" if left_out else ""))
    return parts


def _local(corpus: str) -> tuple[Path | None, str | None]:
    """Return (the file or folder, its encoding where one is named: "book.txt:gb18030"), or (None, None)."""
    path, _, encoding = corpus.rpartition(":")
    if Path(corpus).exists():
        return Path(corpus), None
    return (Path(path), encoding) if path and Path(path).exists() else (None, None)


def _from_hub(corpus: str) -> dict:
    import datasets

    if os.environ.get("LOCAL_RANK", "0") == "0":  # offline, this takes a minute
        print(f"corpus {corpus!r}: asking the Hugging Face Hub ...", file=sys.stderr)
    return datasets.load_dataset(*corpus.split(":"))


def _read_files(path: Path, encoding: str | None) -> tuple[dict, list[str]]:
    """Read a file, or all files of a folder, each by its suffix. Return ({split: Dataset}, [what was left out])."""
    import datasets

    if any((path / name).exists() for name in SAVED):
        saved = datasets.load_from_disk(str(path))
        return (dict(saved) if isinstance(saved, dict) else {"train": saved}), []
    found, left_out = {}, {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        kind, words = kind_of(file), set(re.split(r"[^a-z]+", str(file.relative_to(path)).lower()))
        if not file.is_file():
            continue
        if kind not in (*PLAIN, *ROWS) and file != path:
            left_out[kind or "other"] = left_out.get(kind or "other", 0) + 1
        elif words & TEST:
            left_out["test"] = left_out.get("test", 0) + 1
        else:
            split = found.setdefault("validation" if words & HELD_OUT else "train", {})
            split.setdefault(kind if kind in ROWS else ".txt", []).append(file)
    if not found:
        raise UserError(f"corpus {str(path)!r}: no {', '.join((*PLAIN, *ROWS))} file to train on in it")
    loaded = {}
    for split, kinds in found.items():
        parts = [read_kind(kind, files, encoding) for kind, files in kinds.items()]
        same = [part.select_columns(["text"]) if "text" in part.column_names else part for part in parts]
        loaded[split] = datasets.concatenate_datasets(same) if len(parts) > 1 else parts[0]
    return loaded, [f"{count} {kind} file(s)" for kind, count in left_out.items()]


def read_kind(kind: str, files: list[Path], encoding: str | None):
    """Return the files, all of one `kind_of`, as one Dataset. Raises UserError where a text file holds no text."""
    import datasets

    names = [str(file) for file in files]
    if kind in ROWS:
        for file in files if kind != ".parquet" else ():
            with _opened(file, encoding) as (_, text):  # the library's own complaint names neither byte nor encoding
                while text.read(2**20):
                    pass
        options = {"sep": "\t"} if kind == ".tsv" else {}
        options |= {"encoding": encoding} if encoding and kind != ".parquet" else {}
        return datasets.load_dataset(ROWS[kind], data_files=names, split="train", **options)
    # A changed file is another set. Size and time say so without reading it: every rank is here at every start.
    digest = str([(found.st_size, found.st_mtime_ns) for found in map(Path.stat, files)])
    if next(_documents(names, encoding, "line", digest), None) is None:
        raise UserError(f"corpus {', '.join(names)[:200]}: no text in it")
    for cut in ("paragraph", "line"):
        asked = {"files": names, "encoding": encoding, "cut": cut, "digest": digest}
        features = datasets.Features({"text": datasets.Value("string")})
        documents = datasets.Dataset.from_generator(_documents, gen_kwargs=asked, features=features)
        if len(documents) > 1:
            break
    return documents


def _documents(files: list[str], encoding: str | None, cut: str, digest: str) -> Iterator[dict[str, str]]:
    for file in map(Path, files):
        lines = read_lines(file, encoding)
        for text, _ in paragraphs(lines) if cut == "paragraph" else lines:
            if text.strip():
                yield {"text": text.strip()}
