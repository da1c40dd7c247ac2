"""Day 19: a slow training step - the five usual mistakes, each of which can be taken away alone.

    from day19.slow import PROBLEMS, build_step     # labs/case_study.py finds them in traces and cures them

Checked with deepspeed 0.19.8. Source: https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html
"""

import math
from collections.abc import Callable, Collection
from pathlib import Path

import deepspeed
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from common.data import TokenBlocks, endless_batches, to_device
from config.read import read_config
from day12.gpt import Block, build_gpt

HERE = Path(__file__).resolve().parent
# What is wrong, in the order in which the case study cures it; named as day19/traces.py names its suspects.
PROBLEMS = {
    "loader": "each sequence tokenizes a whole document",
    "buckets": "a message for each parameter: reduce_bucket_size 10,000",
    "activation": "GELU as eight operations in Python",
    "copies": "batches lie in pageable memory, and the host waits for each copy",
    "item": "loss.item() in each step, between forward and backward",
}
TINY_BUCKET, BUCKET = 10_000, 50_000_000  # elements
DOCUMENT = 8192  # tokens of the text that a sequence is the beginning of


def python_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh form, written down: eight operations, each reads and writes all of x."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class SlowBlock(Block):
    """Day 12's block, with GELU in Python."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, H / heads)
            for part in self.attn_qkv(self.ln_1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_proj(python_gelu(self.mlp_fc(self.ln_2(x))))


class OnTheFly(Dataset):
    """Sequences of T tokens, each the beginning of a document that is tokenized when the sequence is asked for."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int, length: int = 4096):
        self.texts, self.tokenizer, self.block_size, self.length = texts, tokenizer, block_size, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self.tokenizer(self.texts[index % len(self.texts)])["input_ids"][: self.block_size])
        return {"input_ids": ids, "labels": ids}


class Ahead(Dataset):
    """The same sequences, tokenized once, before training."""

    def __init__(self, slow: OnTheFly) -> None:
        self.blocks, self.length = [slow[index] for index in range(len(slow.texts))], slow.length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.blocks[index % len(self.blocks)]


def documents(blocks: TokenBlocks, tokenizer: PreTrainedTokenizerBase, count: int = 16) -> list[str]:
    """Texts of DOCUMENT tokens each from the beginning of a corpus, fewer from a small one."""
    starts = range(0, min(count * DOCUMENT, len(blocks.tokens)), DOCUMENT)
    return [tokenizer.decode(blocks.tokens[start : start + DOCUMENT].tolist()) for start in starts]


def build_step(cured: Collection[str], model_name: str, micro_batch: int, data: OnTheFly, seed: int) -> Callable:
    """Return train_step() -> loss, with those of PROBLEMS in it that are not `cured`. Collective."""
    torch.manual_seed(seed)  # the same on every rank, so every rank builds the same weights
    model = build_gpt(model_name, len(data.tokenizer))
    if "activation" not in cured:
        for block in model.h:
            block.__class__ = SlowBlock  # the same weights
    config = read_config(HERE / "ds_config_case.json")
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["zero_optimization"]["reduce_bucket_size"] = BUCKET if "buckets" in cured else TINY_BUCKET
    on_cpu = deepspeed.get_accelerator().device_name() == "cpu"
    if on_cpu:
        config.pop("bf16")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    dataset = Ahead(data) if "loader" in cured else data
    sampler = DistributedSampler(dataset, seed=seed)  # each rank its own sequences
    pinned = "copies" in cured and not on_cpu
    batches = endless_batches(DataLoader(dataset, micro_batch, sampler=sampler, pin_memory=pinned, drop_last=True))

    def train_step() -> torch.Tensor:
        batch = next(batches)
        if "copies" in cured:
            batch = to_device(batch, engine.device)  # non_blocking: from pinned memory the host goes on at once
        else:
            batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        loss = engine(**batch).loss
        if "item" not in cured and math.isnan(loss.item()):
            raise RuntimeError("the loss is nan")
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return train_step
