"""Where text comes from: files, folders, saved data sets and the hub -> documents, one after another. Day 25.

A source is named in data.sources; data/documents.py, the reader of the earlier days, knows the kinds of files. What
comes from the hub lies in its cache, $HF_HOME: in a container that is a volume, or every start downloads it again.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from capstone import text as tx
from capstone.config import ROOT, Config
from common.errors import UserError
from common.ranks import print0
from common.run_log import show_path
from data.documents import PLAIN, ROWS, SAVED, kind_of, read_kind
from day17.checkpoints import sha256


class Source(NamedTuple):
    entry: int  # of data.sources
    facts: dict  # {name, sha256, bytes} of a file, {name, fingerprint, rows} of a data set
    data: object  # a path that is read line by line, or a data set


def files_of(name: str) -> list[Path]:
    """The files of a source that is a file or a folder; none of a data set, or of what is not here."""
    path = ROOT / name
    if name.startswith("hf:") or any((path / mark).exists() for mark in SAVED):
        return []
    return [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]


def is_text(file: Path) -> bool:
    return kind_of(file) in (*PLAIN, *ROWS)


def open_sources(config: Config, key: str = "sources") -> list[Source]:
    """Open and check-sum what data.sources (or another key) names, folders file by file; "held_out" is no source.

    Called only where shards are to be made: it reads every byte.
    """
    found, left_out = [], Counter()
    for entry, name in enumerate(name for name in getattr(config.data, key) if name != "held_out"):
        path = ROOT / name
        if name.startswith("hf:") or any((path / mark).exists() for mark in SAVED):
            data = open_dataset(name, path, config.data.text_key)
            found.append(Source(entry, {"name": name, "fingerprint": data._fingerprint, "rows": len(data)}, data))
            continue
        files = files_of(name)
        known = [file for file in files if is_text(file)]
        left_out.update(kind_of(file) or "other" for file in files if file not in known)
        if not known:
            raise UserError(f"data.{key}: {name!r} is no file and no folder with {', '.join((*PLAIN, *ROWS))} in it")
        for file in known:
            facts = {"name": show_path(file), "sha256": sha256(file), "bytes": file.stat().st_size}
            in_lines = kind_of(file) in (".jsonl", *PLAIN)  # read line by line here; the others are the library's
            data = file if in_lines else open_rows(file, config.data.text_key, config.data.encoding)
            found.append(Source(entry, facts, data))
    if left_out:
        print0(f"left out: {', '.join(f'{count} {kind} file(s)' for kind, count in sorted(left_out.items()))}")
    return found


def open_rows(file: Path, text_key: str, encoding: str | None):
    """A file of rows as a data set, by its suffix."""
    try:
        data = read_kind(kind_of(file), [file], encoding)
    except UserError:
        raise
    except Exception as error:  # the library has no common base class for what is wrong with a file
        raise UserError(f"data.sources: {file} could not be read ({type(error).__name__}: {error})") from error
    if text_key not in data.column_names:
        raise UserError(f"data.sources: {file} has no column {text_key!r}; it has {data.column_names}: data.text_key")
    return data


def open_dataset(name: str, path: Path, text_key: str):
    """A Hugging Face data set, from the hub's cache or a folder that save_to_disk wrote; it stays on disk."""
    import datasets  # here, because it takes a second to import and files do not need it

    try:
        if not name.startswith("hf:"):
            data = datasets.load_from_disk(str(path))
        else:
            parts = name[3:].split(":", 2)  # the split may be "train[:10%]"
            split = parts[2] if len(parts) == 3 else "train"
            data = datasets.load_dataset(*parts[:2], split=split)
    except Exception as error:  # the hub's client has no common base class for "not found" and "offline"
        raise UserError(f"data.sources: {name!r} could not be opened ({type(error).__name__}: {error})") from error
    if isinstance(data, dict):  # what is held out is decided document by document, from one split
        if "train" not in data:
            raise UserError(f"data.sources: {name!r} has no split 'train'; it has {list(data)}")
        print0(f"{name}: the split 'train' of {', '.join(data)}")
        data = data["train"]
    if text_key not in data.column_names:
        raise UserError(f"data.sources: {name!r} has no column {text_key!r}; it has {data.column_names}: data.text_key")
    return data


def documents(config: Config, sources: list[Source], bar: tqdm | None = None) -> Iterator[tuple[int, str | None]]:
    """Yield (entry of data.sources, text), None where a line has no text; `bar` learns how far it is."""
    asked, read = config.data, 0
    for entry, _, data in sources:
        before = read
        if isinstance(data, Path):
            for text, at in tx.read_file(data, asked.text_key, asked.text_documents, asked.encoding):
                read = moved(bar, read, before + at)
                yield entry, text
        else:
            for batch in data.select_columns([asked.text_key]).iter(batch_size=64):
                read = moved(bar, read, read + len(batch[asked.text_key]))
                yield from ((entry, text) for text in batch[asked.text_key])


def moved(bar: tqdm | None, read: int, now: int) -> int:
    if bar is not None:
        bar.update(now - read)
    return now
