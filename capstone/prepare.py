"""Raw text -> clean -> deduplicate -> split by document -> tokenize -> checksummed shards and a manifest. Day 25.

    python -m capstone.prepare --config capstone/configs/tiny.yaml
    python -m capstone.prepare --config capstone/configs/tiny.yaml --verify

Killed at any moment, the same command goes on where it was and ends with the same bytes; when all is there it says so.
Checkpoints' way of writing (a name only for what is whole) is day 17's, and so is the manifest's form.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from capstone import text as tx
from capstone.config import ROOT, Config, add_config_flags, fingerprint, load_config
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.ranks import print0
from common.run_log import show_path
from data.documents import PLAIN, ROWS, SAVED, kind_of, read_kind
from day17.checkpoints import MANIFEST, flush, problem_with, read_manifest, sha256, with_own_sum, write_whole

BATCH_CHARS = 2**18  # that are tokenized at a time: a worker's memory is this, not a shard


# --- sources ---


def open_sources(config: Config, manifest: dict | None = None) -> list[tuple[dict, object]]:
    """Return ({name, sha256, bytes} or {name, fingerprint, rows}, path or data set) of each, folders file by file.

    With the `manifest` of what was made of them, a file that is older is not read again, and one that has gone since
    need not be there: the facts are the manifest's.
    """
    found, left_out = [], Counter()
    for name in config.data.sources:
        path = ROOT / name
        if manifest and (gone := facts_of_gone(name, path, manifest["sources"])):
            print0(f"prepare: {name} is not here any more; {show_path(config.data_path)} was made of it and is whole")
            found += [(facts, None) for facts in gone]
            continue
        if name.startswith("hf:") or any((path / mark).exists() for mark in SAVED):
            data = open_dataset(name, path, config.data.text_key)
            found.append(({"name": name, "fingerprint": data._fingerprint, "rows": len(data)}, data))
            continue
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        known = [file for file in files if kind_of(file) in (*PLAIN, *ROWS)]
        left_out.update(kind_of(file) or "other" for file in files if file not in known)
        if not known:
            raise UserError(f"data.sources: {name!r} is no file and no folder with {', '.join((*PLAIN, *ROWS))} in it")
        for file in known:
            facts = facts_of_file(file, manifest, config.data_path / MANIFEST)
            in_lines = kind_of(file) in (".jsonl", *PLAIN)  # read line by line here; the others are the library's
            found.append((facts, file if in_lines else open_rows(file, config.data.text_key, config.data.encoding)))
    if left_out:
        print0(f"left out: {', '.join(f'{count} {kind} file(s)' for kind, count in sorted(left_out.items()))}")
    return found


def facts_of_gone(name: str, path: Path, made_of: list[dict]) -> list[dict]:
    """What the manifest says of a source that is not there; nothing for one that is, or that is not in it."""
    if path.exists() or name.startswith("hf:"):
        return []
    mine = (name, show_path(path))
    return [facts for facts in made_of if facts["name"] in mine or facts["name"].startswith(f"{mine[1]}/")]


def facts_of_file(file: Path, manifest: dict | None, made: Path) -> dict:
    """Name, SHA-256 and size; the manifest's own where the file has that size and is older than it."""
    name, now = show_path(file), file.stat()
    known = [facts for facts in manifest["sources"] if facts["name"] == name] if manifest else []
    if known and known[0].get("bytes") == now.st_size and now.st_mtime < made.stat().st_mtime:
        return known[0]
    return {"name": name, "sha256": sha256(file), "bytes": now.st_size}


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


def documents(config: Config, sources: list, bar: tqdm) -> Iterator[str | None]:
    asked = config.data
    for _, source in sources:
        before = bar.n
        if isinstance(source, Path):
            for text, at in tx.read_file(
                source, config.data.text_key, config.data.text_documents, config.data.encoding
            ):
                bar.update(before + at - bar.n)
                yield text
        else:
            for batch in source.select_columns([asked.text_key]).iter(batch_size=64):
                bar.update(len(batch[asked.text_key]))
                yield from batch[asked.text_key]


def chunks(texts: Iterator[str | None], chunk_mb: float) -> Iterator[list[str | None]]:
    """Consecutive documents, about `chunk_mb` million characters at a time: the unit of work, the same every time."""
    chunk, chars = [], 0
    for text in texts:
        chunk.append(text)
        chars += len(text or "")
        if chars >= chunk_mb * 1e6:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


# --- what a worker does: one chunk, one shard; each is written under another name and renamed when whole ---


def end_with_parent() -> None:
    """A killed parent takes its workers along (Linux): nobody writes on while the next run has begun."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    gc.freeze()  # what the parent made is not collected here: looking at it would copy its pages, worker by worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism


def publish(partial: Path, final: Path) -> None:
    flush(partial)
    partial.replace(final)


def partial_of(final: Path) -> Path:
    return final.with_name(f"partial_{os.getpid()}_{final.name}")


def clean_chunk(texts: list[str | None], final: Path, min_chars: int, min_letters: float) -> None:
    """Write the cleaned documents one after another to final.text, keys, signatures and counts to final.npz."""
    counts, keys, signatures, sizes = Counter(read=len(texts)), [], [], []
    with open(partial := partial_of(final.with_suffix(".text")), "wb") as out:
        for raw in texts:
            counts["read_bytes"] += len((raw or "").encode())
            if raw is None:
                counts["dropped_unreadable"] += 1
            elif (text := tx.clean(raw, min_chars, min_letters, counts)) is not None:
                keys.append(np.frombuffer(tx.exact_key(text), np.uint8))
                signatures.append(tx.signature(text))
                sizes.append(out.write(text.encode()))
    publish(partial, final.with_suffix(".text"))
    arrays = {
        "keys": np.array(keys, np.uint8).reshape(-1, 16),
        "signatures": np.array(signatures, np.uint32).reshape(-1, tx.NUM_HASHES),
        "sizes": np.array(sizes, np.int64),
    }
    with open(partial := partial_of(final.with_suffix(".npz")), "wb") as out:
        np.savez(out, counts=json.dumps(counts), **arrays)
    publish(partial, final.with_suffix(".npz"))  # last: where it is, the chunk is done


def write_shard(final: Path, note: Path, parts: list[tuple[Path, np.ndarray]], tokenizer_name: str) -> None:
    """Tokenize the given documents of each chunk into `final`; `note`, written last, says what is in it."""
    tokenizer = load_tokenizer(tokenizer_name)
    encode = tokenizer.backend_tokenizer
    encode.encode_special_tokens = True  # "<|endoftext|>" in a document is text: only we end documents
    facts = Counter(tokens=0, documents=0, text_bytes=0)
    with open(partial := partial_of(final), "wb") as out:
        for chunk, picked in parts:
            for batch in batches(chunk, picked):
                for encoding in encode.encode_batch_fast(batch, add_special_tokens=False):
                    ids = np.array([*encoding.ids, tokenizer.eos_token_id], dtype=dtype_of(tokenizer))
                    ids.tofile(out)
                    facts["tokens"] += len(ids)
                facts["documents"] += len(batch)
                facts["text_bytes"] += sum(len(text.encode()) for text in batch)
    entry = {"bytes": partial.stat().st_size, "sha256": sha256(partial), **facts}
    publish(partial, final)
    write_whole(note, json.dumps(entry))


def batches(chunk: Path, picked: np.ndarray) -> Iterator[list[str]]:
    sizes = np.load(chunk.with_suffix(".npz"))["sizes"]
    starts, batch, chars = np.cumsum(sizes) - sizes, [], 0
    with open(chunk.with_suffix(".text"), "rb") as file:
        for document in picked.tolist():
            file.seek(starts[document])
            batch.append(file.read(sizes[document]).decode())
            chars += len(batch[-1])
            if chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


def dtype_of(tokenizer) -> str:
    return "uint16" if len(tokenizer) <= 2**16 else "uint32"


# --- the pipeline ---


def run_all(jobs: Iterator[tuple], workers: int, bar: tqdm | None = None) -> None:
    """Run (function, *arguments) in worker processes, a few ahead of the reader: memory does not grow with the data."""
    with ProcessPoolExecutor(workers, get_context("fork"), initializer=end_with_parent) as pool:
        running = set()
        try:
            for job in jobs:
                running.add(pool.submit(*job))
                if len(running) >= 2 * workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    collect(done, bar)
            collect(wait(running).done, bar)
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, by the system for want of memory perhaps: the same command goes on;"
                " data.workers=1 and a smaller data.chunk_mb need less"
            ) from None
        except OSError as error:
            raise UserError(f"preparing failed: {error}; when that is put right, the same command goes on") from error


def collect(done: set, bar: tqdm | None) -> None:
    for future in done:
        future.result()
        if bar is not None:
            bar.update()


def progress(total: int, unit: str, what: str) -> tqdm:
    quiet = not sys.stderr.isatty()
    return tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=what, leave=False, disable=quiet)


def prepare(config: Config) -> dict:
    """Return the manifest of the config's data, made first where it is not there. One process a machine works."""
    folder = config.data_path
    was_there = (folder / MANIFEST).exists()  # else another rank made it while this one waited, and said so
    if not was_there:
        folder.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if was_there else FileLock(f"{folder}.lock"):  # what is whole needs no lock, nor to be writable
        manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
        sources, tokenizer = open_sources(config, manifest), load_tokenizer(config.tokenizer.name)
        plan = {
            "config": {
                "data": config.data.model_dump(exclude={"folder", "workers", "sources"}),
                "tokenizer": config.tokenizer.model_dump(),
            },
            "sources": [facts for facts, _ in sources],
            "tokenizer_sha256": fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id),
        }
        work = folder / "work"
        begun = json.loads((work / "plan.json").read_text()) if (work / "plan.json").exists() else None
        if earlier := manifest or begun:
            refuse_other(plan, earlier, folder)
        if manifest:
            shutil.rmtree(work, ignore_errors=True)
            if was_there:
                print0(f"prepare: done already | {summary(manifest)}")
            return manifest
        work.mkdir(parents=True, exist_ok=True)
        for partial in folder.rglob("partial_*"):
            partial.unlink()
        write_whole(work / "plan.json", json.dumps(plan))
        counts = clean_all(config, sources, work)
        manifest = {"version": 1, "fingerprint": fingerprint(plan), **plan}
        manifest |= tokenize_all(config, folder, tokenizer, counts)
        manifest["versions"] = {name: version(name) for name in ("tokenizers", "numpy")}
        for place in {path.parent for path in folder.rglob("*.bin")} | {folder}:
            flush(place)
        write_whole(folder / MANIFEST, with_own_sum(manifest))
        shutil.rmtree(work, ignore_errors=True)  # a rank that has seen the manifest removes it as well
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"prepare: {summary(manifest)} | {manifest['dtype']} | largest process {peak / 2**20:.2f} GiB")
    return manifest


def refuse_other(plan: dict, earlier: dict, folder: Path) -> None:
    """What lies there must be of the same sources, settings and tokenizer: mixing two would go unnoticed."""
    now, then = plan["config"], earlier["config"]
    pairs = [(f"{s}.{key}", then[s].get(key), value) for s in now for key, value in now[s].items()]
    pairs += [("data.sources", earlier["sources"], plan["sources"])]
    pairs += [("the tokenizer's SHA-256", earlier["tokenizer_sha256"], plan["tokenizer_sha256"])]
    for key, was, value in pairs:
        if was != value:
            change = "other files or contents" if key == "data.sources" else f"{was}, and this config says {value}"
            raise UserError(
                f"{show_path(folder)} was made with {key} {change}: name another data.folder, or delete that one"
            )


def clean_all(config: Config, sources: list, work: Path) -> Counter:
    """Clean and sign every chunk that is not done; return the counts of all."""
    data, total = config.data, sum(facts.get("bytes", facts.get("rows")) for facts, _ in sources)
    with progress(total, "B", "clean") as bar:

        def jobs() -> Iterator[tuple]:
            for number, texts in enumerate(chunks(documents(config, sources, bar), data.chunk_mb)):
                final = work / f"chunk_{number:05d}"
                if not final.with_suffix(".npz").exists():
                    yield clean_chunk, texts, final, data.min_chars, data.min_letters

        run_all(jobs(), data.workers)
    counts = Counter()
    for chunk in sorted(work.glob("chunk_*.npz")):
        counts += Counter(json.loads(str(np.load(chunk)["counts"])))
    return counts


def tokenize_all(config: Config, folder: Path, tokenizer, counts: Counter) -> dict:
    """Deduplicate, split, tokenize every shard that is not done; return the manifest's part about the output."""
    work, data = folder / "work", config.data
    files = sorted(work.glob("chunk_*.npz"))
    keys, sizes = ([np.load(file)[name] for file in files] for name in ("keys", "sizes"))
    owner = np.repeat(np.arange(len(files)), [len(part) for part in sizes])
    place = np.concatenate([np.arange(len(part)) for part in sizes]) if files else np.array([], int)
    keys, sizes = np.concatenate(keys or [np.empty((0, 16), np.uint8)]), np.concatenate(sizes or [np.array([], int)])
    with open(work / "signatures", "wb") as out:  # mapped, not loaded: half a kilobyte a document
        for file in files:
            np.load(file)["signatures"].tofile(out)
    if not len(keys):
        raise UserError(f"no document is left after cleaning: {dict(counts)}; look at data.text_key and data.min_chars")
    signatures = np.memmap(work / "signatures", np.uint32, "r", shape=(len(keys), tx.NUM_HASHES))
    exact, near = tx.duplicates(keys, signatures, data.near_duplicate)
    counts.update(cleaned=len(keys), duplicates_exact=int(exact.sum()), duplicates_near=int(near.sum()))

    split = np.array([tx.split_of(key.tobytes(), data.held_out_share) for key in keys])
    notes, jobs = {}, []
    for name in ("train", "held_out"):
        picked = np.flatnonzero(~exact & ~near & (split == name))
        if not len(picked):
            raise UserError(
                f"the {name} part has no document: {len(keys)} documents, data.held_out_share {data.held_out_share};"
                " take another share, more documents, or smaller ones with data.text_documents=paragraph"
            )
        filled = np.cumsum(sizes[picked])  # bytes of text up to and with each document
        cuts = np.flatnonzero(np.diff(filled // int(data.shard_mb * 1e6))) + 1
        (folder / name).mkdir(exist_ok=True)
        for number, part in enumerate(np.split(picked, cuts)):
            file, note = f"{name}/shard_{number:05d}.bin", work / f"{name}_{number:05d}.json"
            notes[file] = note
            if not (note.exists() and (folder / file).exists()):
                groups = [(files[chunk], place[part[owner[part] == chunk]]) for chunk in np.unique(owner[part])]
                jobs.append((write_shard, folder / file, note, groups, config.tokenizer.name))
    with progress(len(jobs), "shard", "tokenize") as bar:
        for start in range(0, len(jobs), data.workers):  # fresh processes: the tokenizers library (0.23) does not give
            run_all(iter(jobs[start : start + data.workers]), data.workers, bar)  # back all that encoding took
    entries = {file: json.loads(note.read_text()) for file, note in notes.items()}
    splits = {
        name: {
            what: sum(entry[what] for file, entry in entries.items() if file.startswith(name))
            for what in ("documents", "text_bytes", "tokens")
        }
        for name in ("train", "held_out")
    }
    facts = {"dtype": dtype_of(tokenizer), "eos_token_id": tokenizer.eos_token_id, "vocabulary": len(tokenizer)}
    return {"counts": dict(sorted(counts.items())), "splits": splits, **facts, "files": entries}


def summary(manifest: dict) -> str:
    counts, parts = manifest["counts"], []
    dropped = sum(number for name, number in counts.items() if name.startswith("dropped"))
    for name, split in manifest["splits"].items():
        shards = sum(file.startswith(name) for file in manifest["files"])
        parts.append(
            f"{name} {split['documents']:,} documents, {split['tokens']:,} tokens, {shards} shard{'s' * (shards > 1)}"
        )
    return (
        f"{counts['read']:,} documents read, {dropped} dropped, {counts['duplicates_exact']} exact and"
        f" {counts['duplicates_near']} near duplicates | {' | '.join(parts)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="only compare every shard with its SHA-256")
    add_config_flags(parser)
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    if not args.verify:
        prepare(config)
    elif problem := problem_with(config.data_path):
        raise UserError(f"{show_path(config.data_path)}: {problem}")
    else:
        print(f"{show_path(config.data_path)}: good, {len(read_manifest(config.data_path)['files'])} shards")


if __name__ == "__main__":
    with clear_errors():
        main()
