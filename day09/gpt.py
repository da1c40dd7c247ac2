"""Day 09: gpt - a small GPT in plain PyTorch that can be cut both ways by hand: within its layers, and between them.

    from day09.gpt import GPT, cut_within, keep_stage, stage_step

What day09/gpt.py cuts is what AutoTP and the pipeline engine cut by themselves. Source: arXiv:1909.08053, figure 3.
"""

from collections.abc import Callable

import deepspeed.comm as dist
import torch
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from day09.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, share, vocab_parallel_loss


class Block(torch.nn.Module):
    """A transformer block, (B, T, H) -> (B, T, H). It works with as many heads as its `qkv` yields."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.head_size = hidden // num_heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(hidden), torch.nn.LayerNorm(hidden)
        self.qkv, self.out = torch.nn.Linear(hidden, 3 * hidden), torch.nn.Linear(hidden, hidden)
        self.up, self.down = torch.nn.Linear(hidden, 4 * hidden), torch.nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in (q, k, v))  # (B, heads, T, h)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


class GPT(torch.nn.Module):
    """Token ids (B, T) -> the mean next-token cross-entropy in nats."""

    def __init__(self, vocab_size: int, block_size: int, hidden: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.token, self.place = torch.nn.Embedding(vocab_size, hidden), torch.nn.Embedding(block_size, hidden)
        self.blocks = torch.nn.ModuleList(Block(hidden, num_heads) for _ in range(num_layers))
        self.norm, self.head = torch.nn.LayerNorm(hidden), torch.nn.Linear(hidden, vocab_size, bias=False)
        self.loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropy  # logits (n, V), labels (n,)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.token(ids) + self.place.weight[: ids.shape[1]]

    def loss_of(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.loss(self.head(self.norm(x))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.loss_of(x, ids)


def cut_within(model: GPT, group: dist.ProcessGroup) -> GPT:
    """Tensor parallel: leave this rank its part of every matrix of `model`; norms and places stay whole. Returns it."""
    vocab_size = model.token.num_embeddings
    model.token = VocabParallelEmbedding(model.token, group)
    model.head = ColumnParallelLinear(model.head, group)
    model.loss = lambda logits, labels: vocab_parallel_loss(logits, labels, vocab_size, group)
    for block in model.blocks:
        block.qkv = ColumnParallelLinear(block.qkv, group, unit=block.head_size, stacked=3)
        block.out = RowParallelLinear(block.out, group, unit=block.head_size)
        block.up, block.down = ColumnParallelLinear(block.up, group), RowParallelLinear(block.down, group)
    return model


def keep_stage(model: GPT, rank: int, ranks: int) -> GPT:
    """Layers one after the other: leave this rank its blocks, the first one the embeddings, the last one the head."""
    mine = share(len(model.blocks), ranks, rank)
    model.blocks = model.blocks[mine.start : mine.stop]
    if rank > 0:
        del model.token, model.place
    if rank < ranks - 1:
        del model.norm, model.head
    return model


def stage_step(stage: GPT, ids: torch.Tensor, hidden: int, work: Callable) -> torch.Tensor | None:
    """Forward and backward of one batch through the stages, one rank after the other; the last returns the loss.

    `work(function, *arguments)` does each piece of computing, so that a lab can hold a clock to it. Collective.
    """
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    x = torch.empty(*ids.shape, hidden, device=ids.device)
    if rank:
        dist.recv(x, rank - 1)  # waits until all ranks before have computed
        x.requires_grad_()
    else:
        x = work(stage.embed, ids)
    y = x
    for block in stage.blocks:
        y = work(block, y)
    loss = None
    if rank < last:
        dist.send(y.detach().contiguous(), rank + 1)
        gradient = torch.empty_like(y)
        dist.recv(gradient, rank + 1)  # waits until all ranks behind have computed, there and back
        work(y.backward, gradient)
    else:
        loss = work(stage.loss_of, y, ids)
        work(loss.backward)
    if rank:
        dist.send(x.grad, rank - 1)
    return loss
