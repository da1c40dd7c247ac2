"""Day 22: packing - several samples in one row of tokens, none of which sees another.

Of day22/packing.py a training loop needs `from day22.packing import packed_batches`. Three things make a packed row
worth its samples one by one: position ids that start anew with each, attention that stops at their borders, and no
loss for the first token of a sample, which the last of the one before would have to guess.
`transformers` draws the borders from the position ids: as a mask of T x T a row (sdpa, eager), as blocks
(flex_attention), or as lengths for flash attention, there for a single row alone. An attention_mask turns that off.
Source: transformers 5.20, masking_utils.py (find_packed_sequence_indices), modeling_flash_attention_utils.py.
"""

import os
import random
import sys
from bisect import bisect_left, insort
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.errors import UserError
from day22.chat_data import NO_LOSS, Item

WINDOW = 1000  # samples that are packed at a time: enough to fill rows well, few enough to come in random order


def pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """Rows of positions in `lengths`: best fit, the longest first. Each sample lies in one row, whole."""
    rows, room = [], []  # room: (places left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[i], 0))  # the row with the least room that is enough
        left, row = room.pop(at) if at < len(room) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(room, (left - lengths[i], row))
    return rows


def endless_rows(items: list[Item], rows: int, max_length: int, seed: int) -> Iterator[list[list[int]]]:
    """Yield this rank's micro-batches of `rows` rows, of positions in `items`, for ever; packed anew each epoch."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    wide, epoch = rows * ranks, 0
    lengths = [len(item["input_ids"]) for item in items]
    while True:
        chance = random.Random(f"{seed} {epoch}")  # the same on every rank
        order, packed = chance.sample(range(len(items)), len(items)), []
        for start in range(0, len(order), WINDOW):
            window = order[start : start + WINDOW]
            packed += [[window[i] for i in row] for row in pack([lengths[i] for i in window], max_length)]
        if len(packed) < wide:
            raise UserError(
                f"{len(items)} training samples fill {len(packed)} rows of {max_length} tokens, and micro-batches of"
                f" {rows} rows on {ranks} ranks need {wide}: fewer rows, a smaller --max_length, or no --packing"
            )
        packed = chance.sample(packed, len(packed))
        for start in range(0, len(packed) - wide + 1, wide):
            yield packed[start : start + wide][rank::ranks]
        epoch += 1


def collate_rows(rows: list[list[Item]], pad_token_id: int, max_length: int, one_row: bool = False) -> Item:
    """{"input_ids", "position_ids", "labels"}, each of shape (rows, max_length); padding has position 0.

    one_row: (1, rows * max_length), as flash attention wants it. With sdpa that would be a mask of all by all.
    """
    batch = {name: [] for name in ("input_ids", "position_ids", "labels")}
    for row in rows:
        room = max_length - sum(len(item["input_ids"]) for item in row)
        batch["input_ids"].append(torch.cat([*(x["input_ids"] for x in row), torch.full((room,), pad_token_id)]))
        positions = [torch.arange(len(item["input_ids"])) for item in row]
        batch["position_ids"].append(torch.cat([*positions, torch.zeros(room, dtype=torch.long)]))
        labels = torch.cat([*(item["labels"] for item in row), torch.full((room,), NO_LOSS)])
        batch["labels"].append(labels.masked_fill(batch["position_ids"][-1] == 0, NO_LOSS))
    return {name: torch.stack(tensors).view(1 if one_row else len(rows), -1) for name, tensors in batch.items()}


def packed_batches(
    items: list[Item], rows: int, max_length: int, pad_token_id: int, seed: int, one_row: bool = False
) -> Iterator[Item]:
    """Yield this rank's packed micro-batches for ever."""
    for chosen in endless_rows(items, rows, max_length, seed):
        yield collate_rows([[items[i] for i in row] for row in chosen], pad_token_id, max_length, one_row)


def tokens_of(batch: Item) -> int:
    """Tokens of samples in a batch, packed or padded: all places but the padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return int((batch["position_ids"].flip(-1).cumsum(-1) > 0).sum())  # behind the last position above 0 is padding


def samples_of(batch: Item) -> int:
    """Samples in a packed batch; one of a single token counts as padding."""
    return int((batch["position_ids"] == 1).sum())


@torch.no_grad()
def seen_across_borders(model: torch.nn.Module, batch: Item) -> float:
    """How far the logits of a row's later samples move when its first sample changes; 1: as far as that one's own.

    0 where attention stops at the borders. Collective: two forward passes of one row. `batch` lies on the device.
    """
    width = min(batch["input_ids"].shape[1], 4096)
    row = {name: tensor[:1, :width] for name, tensor in batch.items() if name != "labels"}
    starts = (row["position_ids"][0] == 0).nonzero()[1:2]
    border = int(starts) if len(starts) else width
    other = {**row, "input_ids": row["input_ids"].clone()}
    other["input_ids"][:, :border] = row["input_ids"][:, :border].flip(1)
    model.eval()
    moved = (model(**row).logits.float() - model(**other).logits.float()).abs().amax(-1)[0]
    model.train()
    return float(moved[border:].max() / moved[:border].max()) if border < width else 0.0
