"""Raw text -> clean -> deduplicate -> split by document -> decontaminate, mix -> tokenize -> shards, manifest. Day 25.

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
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from capstone import text as tx
from capstone.config import ROOT, Config, Data, add_config_flags, fingerprint, load_config
from capstone.ranks import from_rank_0
from capstone.sources import Source, documents, files_of, is_text, open_sources
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.ranks import print0
from common.run_log import show_path
from day17.checkpoints import MANIFEST, flush, problem_with, read_manifest, sha256, with_own_sum, write_whole

OUTSIDE = {"folder", "workers", "sources"}  # keys of the data section that the manifest keeps apart, or not at all
BATCH_CHARS = 2**18  # that are tokenized at a time: a worker's memory is this, not a shard
# --- the unit of work ---


def chunks(texts: Iterator[tuple[int, str | None]], chunk_mb: float) -> Iterator[list[tuple[int, str | None]]]:
    """Consecutive documents, about `chunk_mb` million characters at a time: the unit of work, the same every time."""
    chunk, chars = [], 0
    for entry, text in texts:
        chunk.append((entry, text))
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


def clean_chunk(texts: list[tuple[int, str | None]], final: Path, data: Data) -> None:
    """Write the cleaned documents one after another to final.text; what is known of each, and counts, to final.npz."""
    counts, keys, signatures, sizes, entries = Counter(read=len(texts)), [], [], [], []
    with open(partial := partial_of(final.with_suffix(".text")), "wb") as out:
        for entry, raw in texts:
            counts["read_bytes"] += len((raw or "").encode())
            if raw is None:
                counts["dropped_unreadable"] += 1
            elif (text := tx.clean(raw, data.min_chars, data.min_letters, counts, data.quality)) is not None:
                keys.append(np.frombuffer(tx.exact_key(text), np.uint8))
                signatures.append(tx.signature(text))
                sizes.append(out.write(text.encode()))
                entries.append(entry)
    publish(partial, final.with_suffix(".text"))
    arrays = {
        "keys": np.array(keys, np.uint8).reshape(-1, 16),
        "signatures": np.array(signatures, np.uint32).reshape(-1, tx.NUM_HASHES),
        "sizes": np.array(sizes, np.int64),
        "entries": np.array(entries, np.int32),
    }
    write_arrays(final.with_suffix(".npz"), counts=json.dumps(counts), **arrays)  # last: where it is, the chunk is done


def write_arrays(final: Path, **arrays: object) -> None:
    with open(partial := partial_of(final), "wb") as out:
        np.savez(out, **arrays)
    publish(partial, final)


def search_chunk(chunk: Path, picked: np.ndarray, evaluated: Path, final: Path) -> None:
    """Which of the evaluated runs of words stand in which of the picked documents: a row (number, run) for each."""
    known, rows = np.load(evaluated, mmap_mode="r"), []
    texts = (text for batch in batches(chunk, picked) for text in batch)
    for number, text in enumerate(texts):
        found = tx.shingles(text, tx.CONTAMINATED)
        at = np.searchsorted(known, found).clip(max=len(known) - 1)
        rows += [(number, run) for run in at[known[at] == found].tolist()]
    write_arrays(final, rows=np.array(rows, np.int64).reshape(-1, 2))


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
    """Return the manifest of the config's data, made first where it is not there."""
    return checked(config, made=make_shards(config))


def make_shards(config: Config) -> bool:
    """Make the config's data where they are not there; return whether they were not. One process a machine works.

    Every rank calls it before the ranks connect: the others wait at a file lock, where nothing times out.
    """
    folder = config.data_path
    if (folder / MANIFEST).exists():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / MANIFEST).exists():  # else another rank made it while this one waited, and said so
            manifest = make(config, folder)
            peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            print(f"prepare: {summary(manifest)} | {manifest['dtype']} | largest process {peak / 2**20:.2f} GiB")
    return True


def checked(config: Config, made: bool = False) -> dict:
    """The manifest, when it is of what the config asks for. Rank 0 looks, the others trust its word. Collective.

    No source is opened: prepared shards need neither the raw text nor a network. Of files that are here the sizes are
    compared; `--verify` reads them.
    """

    def look() -> dict:
        folder, tokenizer = config.data_path, load_tokenizer(config.tokenizer.name)
        manifest = read_manifest(folder)
        refuse_other(plan_of(config, tokenizer), manifest, folder)
        then = {facts["name"]: facts.get("bytes") for facts in manifest["sources"]}
        for file in [file for name in config.data.sources for file in files_of(name) if is_text(file)]:
            if then.get(show_path(file)) != file.stat().st_size:
                raise other_sources(folder)
        shutil.rmtree(folder / "work", ignore_errors=True)  # of a process that was killed when all was done
        return manifest

    manifest = from_rank_0(look)
    if not made:
        print0(f"prepare: done already | {summary(manifest)}")
    return manifest


def plan_of(config: Config, tokenizer) -> dict:
    """What decides what comes out, without the contents of the sources."""
    return {
        "config": {"data": config.data.model_dump(exclude=OUTSIDE), "tokenizer": config.tokenizer.model_dump()},
        "asked": [name if name.startswith("hf:") else show_path(ROOT / name) for name in config.data.sources],
        "tokenizer_sha256": fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id),
    }


def make(config: Config, folder: Path) -> dict:
    """Make the shards, or go on where an earlier process was killed; return their manifest, which is written last."""
    sources, tokenizer, work = open_sources(config), load_tokenizer(config.tokenizer.name), folder / "work"
    plan = plan_of(config, tokenizer) | {"sources": [source.facts for source in sources]}
    if evaluated := open_sources(config, "decontaminate"):
        plan["evaluated"] = [source.facts for source in evaluated]
    if (work / "plan.json").exists():
        begun = json.loads((work / "plan.json").read_text())
        refuse_other(plan, begun, folder)
        if any(plan[key] != begun[key] for key in ("sources", "evaluated") if key in plan):
            raise other_sources(folder)
    work.mkdir(parents=True, exist_ok=True)
    for partial in folder.rglob("partial_*"):
        partial.unlink()
    write_whole(work / "plan.json", json.dumps(plan))
    counts = clean_all(config, sources, work)
    manifest = {"version": 1, "fingerprint": fingerprint(plan), **plan}
    manifest |= tokenize_all(config, folder, tokenizer, counts, evaluated)
    manifest["versions"] = {name: version(name) for name in ("tokenizers", "numpy")}
    for place in {path.parent for path in folder.rglob("*.bin")} | {folder}:
        flush(place)
    write_whole(folder / MANIFEST, with_own_sum(manifest))
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def refuse_other(plan: dict, earlier: dict, folder: Path) -> None:
    """What lies there must be of the same settings, sources and tokenizer: mixing two would go unnoticed."""
    now, then = plan["config"], earlier["config"]
    older = Data.model_construct(**then["data"])  # keys that came later have their defaults
    then = then | {"data": older.model_dump(exclude=OUTSIDE)}
    pairs = [(f"{section}.{key}", then[section].get(key), now[section][key]) for section in now for key in now[section]]
    pairs += [("data.sources", earlier.get("asked", plan["asked"]), plan["asked"])]
    pairs += [("the tokenizer's SHA-256", earlier["tokenizer_sha256"], plan["tokenizer_sha256"])]
    for key, was, value in pairs:
        if was != value:
            raise UserError(
                f"{show_path(folder)} was made with {key} {was}, and this config says {value}:"
                " name another data.folder, or delete that one"
            )


def other_sources(folder: Path) -> UserError:
    return UserError(
        f"{show_path(folder)} was made with data.sources other files or contents: name another data.folder, or delete"
        " that one"
    )


def clean_all(config: Config, sources: list[Source], work: Path) -> Counter:
    """Clean and sign every chunk that is not done; return the counts of all."""
    data, total = config.data, sum(source.facts.get("bytes", source.facts.get("rows")) for source in sources)
    with progress(total, "B", "clean") as bar:

        def jobs() -> Iterator[tuple]:
            for number, texts in enumerate(chunks(documents(config, sources, bar), data.chunk_mb)):
                final = work / f"chunk_{number:05d}"
                if not final.with_suffix(".npz").exists():
                    yield clean_chunk, texts, final, data

        run_all(jobs(), data.workers)
    counts = Counter()
    for chunk in sorted(work.glob("chunk_*.npz")):
        counts += Counter(json.loads(str(np.load(chunk)["counts"])))
    return counts


@dataclass
class Known:
    """What is known of each cleaned document, in their order; their texts stay on disk."""

    chunks: list[Path]
    owner: np.ndarray  # its chunk
    place: np.ndarray  # its number there
    keys: np.ndarray  # (documents, 16)
    sizes: np.ndarray  # bytes of text
    entries: np.ndarray  # of data.sources

    @classmethod
    def of(cls, chunks: list[Path]) -> "Known":
        parts = [np.load(chunk) for chunk in chunks]
        arrays = [np.concatenate([part[name] for part in parts]) for name in ("keys", "sizes", "entries")]
        counts = [len(part["sizes"]) for part in parts]
        return cls(
            chunks, np.repeat(np.arange(len(chunks)), counts), np.concatenate([*map(np.arange, counts)]), *arrays
        )

    def by_chunk(self, picked: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(chunk, those of the `picked` documents that are in it), one after another."""
        for chunk in np.unique(self.owner[picked]).tolist():
            yield chunk, picked[self.owner[picked] == chunk]


def tokenize_all(config: Config, folder: Path, tokenizer, counts: Counter, evaluated: list[Source]) -> dict:
    """Choose the documents, tokenize every shard that is not done; return the manifest's part about the output."""
    work, data = folder / "work", config.data
    if not counts["read"] or not (known := Known.of(sorted(work.glob("chunk_*.npz")))).sizes.size:
        raise UserError(f"no document is left after cleaning: {dict(counts)}; look at data.text_key and data.min_chars")
    parts = choose(config, known, work, counts, evaluated)
    parts["train"], mixture = mixed(config, known, parts["train"])
    notes, jobs = {}, []
    for name, picked in parts.items():
        if not len(picked):
            raise UserError(
                f"the {name} part has no document: {len(known.sizes)} documents, data.held_out_share"
                f" {data.held_out_share}; take another share, more documents, or smaller ones with"
                " data.text_documents=paragraph"
            )
        filled = np.cumsum(known.sizes[picked])  # bytes of text up to and with each document
        cuts = np.flatnonzero(np.diff(filled // int(data.shard_mb * 1e6))) + 1
        (folder / name).mkdir(exist_ok=True)
        for number, part in enumerate(np.split(picked, cuts)):
            file, note = f"{name}/shard_{number:05d}.bin", work / f"{name}_{number:05d}.json"
            notes[file] = note
            if not (note.exists() and (folder / file).exists()):
                groups = [(known.chunks[chunk], known.place[mine]) for chunk, mine in known.by_chunk(part)]
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
        for name in parts
    }
    facts = {"dtype": dtype_of(tokenizer), "eos_token_id": tokenizer.eos_token_id, "vocabulary": len(tokenizer)}
    return {"counts": dict(sorted(counts.items())), "mixture": mixture, "splits": splits, **facts, "files": entries}


def choose(config: Config, known: Known, work: Path, counts: Counter, evaluated: list[Source]) -> dict[str, np.ndarray]:
    """Which documents are in which part: duplicates go, and what shares text with an evaluation."""
    with open(work / "signatures", "wb") as out:  # mapped, not loaded: half a kilobyte a document
        for chunk in known.chunks:
            np.load(chunk)["signatures"].tofile(out)
    signatures = np.memmap(work / "signatures", np.uint32, "r", shape=(len(known.sizes), tx.NUM_HASHES))
    exact, near = tx.duplicates(known.keys, signatures, config.data.near_duplicate)
    counts.update(cleaned=len(exact), duplicates_exact=int(exact.sum()), duplicates_near=int(near.sum()))
    split = np.array([tx.split_of(key.tobytes(), config.data.held_out_share) for key in known.keys])
    parts = {name: np.flatnonzero(~exact & ~near & (split == name)) for name in ("train", "held_out")}
    if config.data.decontaminate:
        found = contaminated(config, known, parts, work, evaluated)
        parts["train"] = np.setdiff1d(parts["train"], found, assume_unique=True)
        counts.update(contaminated=len(found))
    return parts


def contaminated(
    config: Config, known: Known, parts: dict[str, np.ndarray], work: Path, evaluated: list[Source]
) -> np.ndarray:
    """The training documents in which 13 words of an evaluation text stand in a row.

    What stands in more than 10 of them is a phrase, as in Brown et al. 2020: it gives nothing away.
    """
    texts = [tx.clean(text, 0, 0, Counter()) for _, text in documents(config, evaluated) if text]
    if "held_out" in config.data.decontaminate:
        for chunk, mine in known.by_chunk(parts["held_out"]):
            texts += [text for batch in batches(known.chunks[chunk], known.place[mine]) for text in batch]
    runs = np.unique(np.concatenate([tx.shingles(text, tx.CONTAMINATED) for text in ["", *texts]]))  # never of none
    with open(partial := partial_of(work / "evaluated.npy"), "wb") as out:
        np.save(out, runs)
    publish(partial, work / "evaluated.npy")
    searched = {work / f"found_{chunk:05d}.npz": (chunk, mine) for chunk, mine in known.by_chunk(parts["train"])}
    jobs = (
        (search_chunk, known.chunks[chunk], known.place[mine], work / "evaluated.npy", final)
        for final, (chunk, mine) in searched.items()
        if not final.exists()
    )
    run_all(jobs, config.data.workers)
    rows = [(mine[found[:, 0]], found[:, 1]) for final, (_, mine) in searched.items() if (found := rows_of(final)).size]
    if not rows:
        return np.array([], int)
    document, run = map(np.concatenate, zip(*rows, strict=True))
    return np.unique(document[np.bincount(run, minlength=len(runs))[run] <= tx.COMMON])


def rows_of(final: Path) -> np.ndarray:
    return np.load(final)["rows"]


def mixed(config: Config, known: Known, train: np.ndarray) -> tuple[np.ndarray, list[dict]]:
    """The training documents as often as data.weights says, first all once, then again; and what that makes."""
    names = config.data.sources
    weights = np.array([config.data.weights.get(name, 1.0) for name in names])
    weighted = zip(known.keys[train], weights[known.entries[train]].tolist(), strict=True)
    copies = np.array([tx.copies_of(key.tobytes(), weight) for key, weight in weighted], int)
    again = [train[copies > number] for number in range(copies.max(initial=0))]
    order, rows = np.concatenate([np.array([], int), *again]), []
    for entry, name in enumerate(names):
        mine = known.sizes[order[known.entries[order] == entry]]
        share = mine.sum() / max(1, known.sizes[order].sum())
        row = {"name": name, "weight": float(weights[entry]), "documents": len(mine), "text_bytes": int(mine.sum())}
        rows.append(row | {"share": round(float(share), 6)})
    return order, rows


def summary(manifest: dict) -> str:
    counts, parts = manifest["counts"], []
    dropped = sum(number for name, number in counts.items() if name.startswith("dropped"))
    for name, split in manifest["splits"].items():
        shards = sum(file.startswith(name) for file in manifest["files"])
        parts.append(
            f"{name} {split['documents']:,} documents, {split['tokens']:,} tokens, {shards} shard{'s' * (shards > 1)}"
        )
    more = f", {counts['contaminated']} contaminated" if "contaminated" in counts else ""
    return (
        f"{counts['read']:,} documents read, {dropped} dropped, {counts['duplicates_exact']} exact and"
        f" {counts['duplicates_near']} near duplicates{more} | {' | '.join(parts)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--verify", action="store_true", help="only compare shards, and sources that are here, with their SHA-256"
    )
    add_config_flags(parser)
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    if not args.verify:
        prepare(config)
    elif problem := problem_with(config.data_path):
        raise UserError(f"{show_path(config.data_path)}: {problem}")
    else:
        manifest = checked(config, made=True)
        here = [facts for facts in manifest["sources"] if "sha256" in facts and (ROOT / facts["name"]).is_file()]
        if any(sha256(ROOT / facts["name"]) != facts["sha256"] for facts in here):
            raise other_sources(config.data_path)
        shards, sources = len(manifest["files"]), f"{len(here)} of {len(manifest['sources'])} sources here, unchanged"
        print(f"{show_path(config.data_path)}: good, {shards} shards; {sources}")


if __name__ == "__main__":
    with clear_errors():
        main()
