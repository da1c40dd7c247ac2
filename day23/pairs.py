"""Day 23: pairs - preference data: a prompt, the answer that was preferred, and one that was not, as token ids.

    from day23.pairs import load_pairs, collate_pairs     # day23/pairs.py, with day22/chat_data.py
    python day23/pairs.py runs/day23/pairs                # the shipped pairs as files, to look at

`load_pairs` takes the shipped set "sotu", a JSON-lines or Parquet file, a folder of `save_to_disk`, or a Hugging Face
data set, in the forms that TRL takes: `prompt`, `chosen`, `rejected` (texts, or lists of messages), or `chosen` and
`rejected` alone, two dialogues with the same beginning.
The shipped set is made of data/sotu.jsonl.xz: two sentences of a State of the Union address, the one that follows, and
one from an address of another century. Each answer is the chosen one once and the rejected one once: who does not read
the prompt is right half of the time. Whole addresses are held out.
Source: https://huggingface.co/docs/trl/dataset_formats#preference, trl 1.16.
"""

import argparse
import json
import lzma
import os
import random
import re
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.data import DATA
from common.errors import UserError, clear_errors
from common.ranks import print0
from common.run_log import show_path
from day22.chat_data import NO_LOSS, Item, collate, encode

Pair = dict[str, Item]  # {"chosen": as day 22's encode() returns it, "rejected": the same}
FORMS = (
    "wanted are `prompt`, `chosen` and `rejected` (texts, or lists of messages), or `chosen` and `rejected` alone, two"
    " lists of messages with the same beginning"
)
OLD, NEW = range(1790, 1890), range(1946, 2100)  # years of the two halves of the shipped set
PASSAGES, HELD_OUT_EVERY = 6, 8  # of each address; every eighth address is held out


def load_pairs(dataset: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[Pair], list[Pair]]:
    """Return (training pairs, held-out pairs). What teaches nothing is left out, and counted. Not collective."""
    parts = _continuations() if dataset == "sotu" else _split(_read(dataset), dataset)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    found = []
    for rows, name in zip(parts, ("training", "held-out"), strict=True):
        triples = [_triple(row, dataset) for row in rows]
        told = [t for t in triples if t[1].strip() and t[2].strip() and t[1] != t[2]]
        pairs = [_encode_pair(*triple, tokenizer) for triple in told]
        kept = [pair for pair in pairs if max(len(item["input_ids"]) for item in pair.values()) <= max_length]
        if len(kept) < len(rows):
            empty = sum(not chosen.strip() or not rejected.strip() for _, chosen, rejected in triples)
            print0(
                f"{len(rows) - len(kept)} of {len(rows)} {name} pairs of {dataset!r} left out: {empty} with an empty"
                f" answer, {len(rows) - len(told) - empty} with the same answer twice, {len(pairs) - len(kept)} of more"
                f" than {max_length} tokens"
            )
        if len(kept) < ranks:
            raise UserError(
                f"data set {dataset!r}: {len(kept)} {name} pairs are left, and {ranks} ranks need at least {ranks}; a"
                " pair has two different answers, neither empty, within --max_length"
            )
        found.append(kept)
    return found[0], found[1]


def load_pairs_of(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """The pairs of `rows`, in any of the known forms, one by one."""
    return [_encode_pair(*_triple(row, "rows"), tokenizer) for row in rows]


def collate_pairs(pairs: list[Pair], pad_token_id: int) -> Item:
    """One batch of 2 B rows: all chosen answers, then all rejected ones, as in TRL."""
    return collate([pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs], pad_token_id)


def _encode_pair(prompt: list[dict], chosen: str, rejected: str, tokenizer: PreTrainedTokenizerBase) -> Pair:
    return {name: _encode(prompt, a, tokenizer) for name, a in (("chosen", chosen), ("rejected", rejected))}


def _encode(prompt: list[dict], answer: str, tokenizer: PreTrainedTokenizerBase) -> Item:
    """Token ids of prompt and answer, labels for this answer alone: of the prompt's own answers nothing is learned."""
    item = encode([*prompt, {"role": "assistant", "content": answer}], tokenizer)
    spoken = (item["labels"] != NO_LOSS).nonzero()[:, 0]
    gaps = (spoken[1:] - spoken[:-1] > 1).nonzero()[:, 0]
    start = int(spoken[gaps[-1] + 1]) if len(gaps) else int(spoken[0])
    item["labels"][:start] = NO_LOSS
    return item


def _triple(row: dict, dataset: str) -> tuple[list[dict], str, str]:
    """(messages of the prompt, chosen answer, rejected answer) of a row in any of the known forms."""
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        same = [a == b for a, b in zip(chosen[:-1], rejected[:-1], strict=False)]
        if not all(same) or len(chosen) != len(rejected) or not chosen:
            raise UserError(f"data set {dataset!r}: the two dialogues of a pair differ in more than their last message")
        prompt = chosen[:-1] or prompt
        chosen, rejected = chosen[-1].get("content"), rejected[-1].get("content")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    texts = isinstance(chosen, str | None) and isinstance(rejected, str | None) and isinstance(prompt, list)
    if not texts or not prompt or not {"chosen", "rejected"} <= set(row):
        raise UserError(f"data set {dataset!r} has the columns {', '.join(row)}: {FORMS}")
    return prompt, chosen or "", rejected or ""


def _read(dataset: str) -> dict[str, list[dict]]:
    """{split: rows} of a file, a folder or a data set of the hub."""
    import datasets  # here, because it takes a second to import

    datasets.disable_progress_bars()
    path = Path(dataset)
    try:
        if path.is_file():
            loaded = datasets.load_dataset("parquet" if path.suffix == ".parquet" else "json", data_files=str(path))
        elif any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):  # save_to_disk wrote it
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
        else:
            loaded = datasets.load_dataset(*dataset.split(":"))
    except Exception as error:  # the hub's client has no common base class for "not found", "offline", "not a data set"
        reason = f"{type(error).__name__}: {' '.join(str(error.__cause__ or error).split())[:160]}"
        raise UserError(
            f"pairs {dataset!r} are neither shipped (sotu), nor a file of JSON lines or Parquet, nor a folder of"
            f" save_to_disk, nor a data set that the Hugging Face Hub served ({reason})"
        ) from error
    return {split: list(rows) for split, rows in loaded.items()}


def _split(splits: dict[str, list[dict]], dataset: str) -> tuple[list[dict], list[dict]]:
    """The data set's own test split, else every tenth prompt, so that no prompt is in both parts."""
    names = [name for name in splits if name.startswith("train")] or list(splits)
    rows = splits[names[0]]
    if other := [name for name in splits if name.startswith(("validation", "test"))]:
        return rows, splits[other[0]]
    prompts = [json.dumps(_triple(row, dataset)[0]) for row in rows]
    known = random.Random(0).sample(sorted(set(prompts)), len(set(prompts)))
    held_out = set(known[: max(1, len(known) // 10)])
    parts = [], []
    for row, prompt in zip(rows, prompts, strict=True):
        parts[prompt in held_out].append(row)
    return parts


def _continuations() -> tuple[list[dict], list[dict]]:
    """The shipped pairs, (training, held out)."""
    with lzma.open(DATA / "sotu.jsonl.xz", "rt", encoding="utf-8") as lines:
        addresses = [json.loads(line) for line in lines]
    chance, parts = random.Random(0), []
    halves = [[a for a in addresses if int(a["id"][:4]) in years] for years in (OLD, NEW)]
    for is_held_out in (False, True):
        old, new = (
            [p for at, a in enumerate(half) if (at % HELD_OUT_EVERY == 0) == is_held_out for p in _passages(a, chance)]
            for half in halves
        )
        count = min(len(old), len(new))
        rows = []
        for (a, follows_a), (b, follows_b) in zip(chance.sample(old, count), chance.sample(new, count), strict=True):
            rows += [{"prompt": a, "chosen": follows_a, "rejected": follows_b}]
            rows += [{"prompt": b, "chosen": follows_b, "rejected": follows_a}]
        parts.append(rows)
    return parts[0], parts[1]


def _passages(address: dict, chance: random.Random) -> list[tuple[str, str]]:
    """(prompt, the sentence that follows) of some places of an address, none of which overlap."""
    sentences = re.split(r"(?<=[.!?]) +(?=[A-Z])", " ".join(address["text"].split()))
    plain = [6 <= len(text.split()) <= 24 and "pplause" not in text for text in sentences]
    places = [at for at in range(0, len(sentences) - 2, 3) if all(plain[at : at + 3])]
    chosen = sorted(chance.sample(places, min(PASSAGES, len(places))))
    task = "Continue this passage of a State of the Union address: "
    return [(task + " ".join(sentences[at : at + 2]), sentences[at + 2]) for at in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train.jsonl and held_out.jsonl go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for rows, name in zip(_continuations(), ("train", "held_out"), strict=True):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{show_path(file)}: {len(rows)} pairs")


if __name__ == "__main__":
    with clear_errors():
        main()
