"""Day 22: bridge - what the runs through Trainer, Accelerate and TRL share: our batches, our log lines.

Of day22/bridge.py a script takes `from day22.bridge import Log, SameBatches, show_filled`. The bridges would choose
batches of their own; with ours in our order, losses can be compared with those of day22/train.py.
Source: transformers 5.20, trainer.py and trainer_callback.py.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from common.ranks import print0
from common.run_log import RunLog
from day22.chat_data import Item, collate, endless_order


class SameBatches(torch.utils.data.IterableDataset):
    """The micro-batches of train.py, in its order; the Trainer's own sampler would choose others."""

    def __init__(self, items: list[Item], micro_batch: int, seed: int, pad: int) -> None:
        self.items, self.order, self.tokens = items, (micro_batch, seed), 0
        self.collate = partial(collate, pad_token_id=pad)

    def __iter__(self):
        for positions in endless_order(self.items, *self.order):
            batch = self.collate([self.items[i] for i in positions])
            self.tokens += int(batch["attention_mask"].sum())
            yield batch

    def tokens_since(self) -> int:
        """This rank's tokens since the last call."""
        tokens, self.tokens = self.tokens, 0
        return tokens


def rows_in_order(items: list[Item], micro_batch: int, ranks: int, num_micro_batches: int, seed: int) -> list[dict]:
    """The samples of train.py one after the other, as a sequential sampler deals them out to the ranks again."""
    orders = [endless_order(items, micro_batch, seed, rank=rank) for rank in range(ranks)]
    chosen = [i for _ in range(num_micro_batches) for order in orders for i in next(order)]
    return [{name: items[i][name].tolist() for name in ("input_ids", "labels")} for i in chosen]


class OurTrainer(Trainer):
    """A Trainer whose data set yields batches already, each rank its own: accelerate has nothing left to split."""

    def get_train_dataloader(self):
        return self.train_dataset


class Log(TrainerCallback):
    """The Trainer's log rows as this course's log lines. The loss is that of all ranks, as in train.py."""

    def __init__(self, run_log: RunLog, tokens_since: Callable[[], int], evaluate: Callable) -> None:
        self.run_log, self.tokens_since, self.evaluate = run_log, tokens_since, evaluate

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.run_log.held_out(0, self.evaluate(model))  # not earlier: until the engine exists, no layer is gathered

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.run_log.step(state.global_step, logs["loss"], self.tokens_since())


def show_filled(before: dict, after: dict, path: str = "") -> None:
    """Print each key that was "auto" with the value that was filled in."""
    for key, value in before.items():
        if isinstance(value, dict):
            show_filled(value, after[key], f"{path}{key}.")
        elif value == "auto":
            print0(f"auto: {path}{key} = {after[key]}")
