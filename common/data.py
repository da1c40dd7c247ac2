"""A corpus by name -> packed blocks of token ids, cached on disk, the same on every rank."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import UserError
from common.ranks import over_ranks
from data.documents import open_documents

DATA = Path(__file__).resolve().parents[1] / "data"
SHIPPED = {
    "all": ["moby_dick.jsonl.xz", "sotu.jsonl.xz"],
    "moby_dick": ["moby_dick.jsonl.xz"],
    "sotu": ["sotu.jsonl.xz"],
    "song_ci": ["song_ci.jsonl.xz"],  # Chinese: with --model tiny-zh
}
HELD_OUT_SHARE = 0.05  # of the documents, where the data set has no validation split of its own


class TokenBlocks(Dataset):
    """Consecutive blocks of T token ids cut from one long stream; the tail that fills no block is dropped.

    Item i is {"input_ids": LongTensor (T,), "labels": the same tensor}: `transformers` models shift labels themselves.
    """

    def __init__(self, tokens: np.ndarray, block_size: int) -> None:
        self.tokens, self.block_size = tokens, block_size

    def __len__(self) -> int:
        return len(self.tokens) // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self.block_size
        ids = torch.from_numpy(self.tokens[start : start + self.block_size].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def endless_batches(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches for ever, shuffled anew each epoch. `loader` must have a DistributedSampler.

    (`deepspeed.utils.RepeatingLoader` repeats the first epoch's order: nobody calls its sampler's `set_epoch`.)
    """
    if not len(loader):
        raise UserError(f"{len(loader.sampler)} blocks a rank do not fill one micro-batch of {loader.batch_size}")
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, blocks: TokenBlocks, device: torch.device, max_blocks: int = 512) -> float:
    """Return the mean loss (nats a token) over the first `max_blocks` blocks, each rank taking its share. Collective.

    Every rank runs the same number of batches, as ZeRO-3 needs: blocks that do not divide by the ranks are left out.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    blocks = torch.utils.data.Subset(blocks, range(min(max_blocks, len(blocks)) // ranks * ranks))
    loader = DataLoader(blocks, batch_size=16, sampler=DistributedSampler(blocks, ranks, rank, shuffle=False))
    model.eval()
    total = sum(model(**to_device(batch, device)).loss * len(batch["input_ids"]) for batch in loader)
    model.train()
    return over_ranks(total.item() / len(loader.sampler), device)


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Move each tensor of a batch to `device`."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer shipped in data/ ("bpe4096", "zh4096", "gpt2"), or any Hugging Face name or local path."""
    shipped = DATA / name
    try:
        tokenizer = AutoTokenizer.from_pretrained(shipped if (shipped / "tokenizer_config.json").exists() else name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer {name!r} is neither shipped (bpe4096, zh4096, gpt2) nor a path or a name that the hub served"
        ) from error
    return checked(tokenizer, name)


def checked(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """Return `tokenizer` if it can end a document and has a fast backend; UserError with what is missing otherwise."""
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {name!r} ({type(tokenizer).__name__}) is Python only: take one with tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no end token: set eos_token in its tokenizer_config.json")
    return tokenizer


def cache_folder() -> Path:
    """Where tokenized corpora lie: $COURSE_CACHE, data/cache, or the user's own where the course is read-only."""
    if named := os.environ.get("COURSE_CACHE"):
        return Path(named)
    if os.access(DATA, os.W_OK):
        return DATA / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepspeed-28-days"


def load_corpus(corpus: str, tokenizer: PreTrainedTokenizerBase, block_size: int) -> tuple[TokenBlocks, TokenBlocks]:
    """Return (training blocks, held-out blocks) of `corpus`, split by document.

    `corpus` is "all", "moby_dick", "sotu" or "song_ci" (shipped); a file or folder of .txt, .md (parted at blank
    lines), .jsonl, .json, .csv, .tsv, .parquet (column `text`), or a data set saved to disk; "FILE:gb18030" names an
    encoding other than UTF-8; or a Hugging Face data set "name" or "name:config".
    Not collective: the first rank of each machine to get the lock tokenizes, the others read its cache.
    Raises UserError when the corpus cannot be read, or is too small for the blocks and ranks asked for.
    """
    checked(tokenizer, tokenizer.name_or_path)
    fingerprint, load_splits = _open(corpus)
    rules = f"{tokenizer.backend_tokenizer.to_str()}{tokenizer.eos_token_id}"  # not the vocabulary alone
    cache = cache_folder() / hashlib.sha256(f"{fingerprint}{rules}{HELD_OUT_SHARE}".encode()).hexdigest()[:16]
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{cache.parent}: {error.strerror}; name a folder for tokenized text: COURSE_CACHE=..."
        ) from error
    with FileLock(f"{cache}.lock"):
        if not cache.exists():
            partial = cache.with_suffix(".partial")  # renamed when complete, so an interrupted run leaves no half cache
            partial.mkdir(exist_ok=True)
            for split, documents in load_splits().items():
                _write_tokens(documents, tokenizer, partial / f"{split}.bin", dtype)
            partial.rename(cache)

    blocks = [TokenBlocks(_map(cache / f"{split}.bin", dtype), block_size) for split in ("train", "held_out")]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # set by the launcher
    for split, name in zip(blocks, ("training", "held-out"), strict=True):
        if len(split) < ranks:
            raise UserError(
                f"corpus {corpus!r} is too small: its {name} part has {len(split.tokens)} tokens = {len(split)} blocks"
                f" of {block_size}, but {ranks} ranks need at least {ranks}. Take a larger corpus or fewer ranks."
            )
    return blocks[0], blocks[1]


def _open(corpus: str):
    """Return (a fingerprint of the corpus, a function that loads {"train": Dataset, "held_out": Dataset})."""
    import datasets  # here, because it takes a second to import and plots or tokenizers do not need it

    if corpus not in SHIPPED:
        parts = open_documents(corpus, f"shipped ({', '.join(SHIPPED)})")
        return "".join(split._fingerprint for split in parts.values()), lambda: _split(parts)
    datasets.disable_progress_bars()
    files = [DATA / name for name in SHIPPED[corpus]]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return digest, lambda: _split(datasets.load_dataset("json", data_files=[str(f) for f in files]))


def _split(loaded) -> dict:
    if "validation" in loaded:
        return {"train": loaded["train"], "held_out": loaded["validation"]}
    documents = loaded["train"]
    if len(documents) < 2:
        raise UserError(
            f"a corpus of {len(documents)} document(s) cannot be split into a training and a held-out part: blank lines"
            " or line ends part a text into documents, or give it a `validation` file"
        )
    parts = documents.train_test_split(test_size=max(1, round(HELD_OUT_SHARE * len(documents))), seed=0)
    return {"train": parts["train"], "held_out": parts["test"]}


def _write_tokens(documents, tokenizer: PreTrainedTokenizerBase, path: Path, dtype: type) -> None:
    """Append each document's ids and an end-of-text id to `path`, a batch at a time: memory stays small."""
    with open(path, "wb") as out:
        for batch in documents.iter(batch_size=64):
            for ids in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]:
                np.asarray([*ids, tokenizer.eos_token_id], dtype=dtype).tofile(out)


def _map(path: Path, dtype: type) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
