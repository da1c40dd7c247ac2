"""Prepared shards -> blocks of token ids, mapped from disk, in one order on any number of ranks. Days 17, 18 and 25.

The position in the data is one number (sequences so far), kept by day 17's GlobalOrder: a run that resumes, on as many
ranks as it likes, goes on with the next sequence.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, Dataset

from capstone.config import Config
from common.errors import UserError
from common.run_log import show_path
from day17.checkpoints import GlobalOrder, problem_with, read_manifest

__all__ = ["GlobalOrder", "Tokens", "Blocks", "open_tokens", "load_blocks", "spread", "train_batches"]


class Tokens:
    """The token ids of one split, shard after shard, as one long sequence that is never read whole."""

    def __init__(self, folder: Path, manifest: dict, split: str) -> None:
        files = sorted(file for file in manifest["files"] if file.startswith(f"{split}/"))
        self.shards = [np.memmap(folder / file, manifest["dtype"], "r") for file in files]
        for file, shard in zip(files, self.shards, strict=True):
            if len(shard) != manifest["files"][file]["tokens"]:
                want = manifest["files"][file]["tokens"]
                raise UserError(f"{show_path(folder / file)} has {len(shard):,} tokens, the manifest says {want:,}")
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.eos, self.facts = manifest["eos_token_id"], manifest["splits"][split]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, _ = window.indices(len(self))
        parts, shard = [], int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            first = int(self.ends[shard]) - len(self.shards[shard])
            parts.append(self.shards[shard][start - first : stop - first])
            start, shard = int(self.ends[shard]), shard + 1
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def documents(self) -> Iterator[np.ndarray]:
        """The ids of each document, without the id that ends it; a document never spans two shards."""
        for shard in self.shards:
            start = 0
            for end in np.flatnonzero(shard == self.eos):
                yield shard[start:end]
                start = end + 1


class Blocks(Dataset):
    """Consecutive blocks of T ids: {"input_ids", "labels"} as in common/data.py; shard borders do not show."""

    def __init__(self, tokens: Tokens, block_size: int) -> None:
        self.tokens, self.block_size = tokens, block_size

    def __len__(self) -> int:
        return len(self.tokens) // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.tokens[index * self.block_size : (index + 1) * self.block_size]
        ids = torch.from_numpy(ids.astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def open_tokens(config: Config, split: str, verify: bool = False) -> Tokens:
    """Map a split ("train" or "held_out"). `verify` reads every byte against its SHA-256. Collective then."""
    folder = config.data_path
    if not (folder / "manifest.json").exists():
        raise UserError(f"{show_path(folder)} is not prepared: python -m capstone.prepare --config ...")
    if verify and (problem := problem_with(folder)):
        raise UserError(f"{show_path(folder)}: {problem}: delete the folder and prepare it anew")
    return Tokens(folder, read_manifest(folder), split)


def load_blocks(config: Config, split: str, block_size: int, verify: bool = False) -> Blocks:
    blocks = Blocks(open_tokens(config, split, verify), block_size)
    if not len(blocks):
        raise UserError(f"the {split} part has {len(blocks.tokens)} tokens: not one block of {block_size}")
    return blocks


def spread(blocks: Blocks, number: int) -> list[int]:
    """`number` of the blocks, or all, at even distances: every source has its share, and the sample stays the same."""
    number = min(number, len(blocks))
    return [index * len(blocks) // number for index in range(number)]


def train_batches(blocks: Blocks, micro_batch: int, seed: int, sequences: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's batches for ever, from the run's sequence number `sequences` on.

    The loader draws a seed for its workers when it begins: from a generator of its own, or a resumed run, whose random
    state has just been restored, would drop out other activations than the uninterrupted one.
    """
    order = GlobalOrder(len(blocks), micro_batch, seed, sequences)
    pin = get_accelerator().device_name() != "cpu"  # a copy to the device then need not wait for what runs there
    own = torch.Generator().manual_seed(seed)
    return iter(DataLoader(blocks, batch_size=micro_batch, sampler=order, pin_memory=pin, generator=own))
