"""Day 09: layers - a linear layer, an embedding and a loss cut over ranks, with the two operators that join the pieces.

    from day09.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, vocab_parallel_loss

What day09/layers.py defines is Megatron's way: f passes on and sums gradients, g sums and passes gradients on. Each
class takes the whole layer and keeps this rank's part of it. Tested against the whole layers, sizes that do not divide
among them. Source: Shoeybi et al. 2019, Megatron-LM, section 3: arXiv:1909.08053.
"""

import deepspeed.comm as dist  # and not torch.distributed: its log counts the messages
import torch
from torch.nn.functional import embedding, linear


def share(total: int, ranks: int, rank: int) -> range:
    """Which of `total` things are this rank's: in order, as even as can be, the first ranks one more."""
    each, more = divmod(total, ranks)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


class _PassOnSumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _SumPassGradientOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def f(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Where whole becomes cut: x as it is; backward, the ranks' gradients summed. Collective in the backward pass."""
    return _PassOnSumGradient.apply(x, group)


def g(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Where cut becomes whole: the ranks' x summed; backward, the gradient as it is. Collective."""
    return _SumPassGradientOn.apply(x, group)


class ColumnParallelLinear(torch.nn.Module):
    """x (..., in), whole on every rank -> this rank's columns of the output (..., its part of out).

    Cut in units of `unit` outputs (a head, say). With `stacked` 3 the layer is three of the same size, one above the
    other (q, k and v), and each is cut alike: one f for all three.
    """

    def __init__(self, whole: torch.nn.Linear, group: dist.ProcessGroup, unit: int = 1, stacked: int = 1) -> None:
        super().__init__()
        self.group = group
        outputs = torch.arange(whole.out_features).view(stacked, -1, unit)
        mine = share(outputs.shape[1], dist.get_world_size(group), dist.get_rank(group))
        rows = outputs[:, mine.start : mine.stop].flatten()
        self.weight = torch.nn.Parameter(whole.weight.detach()[rows].clone())
        self.bias = None if whole.bias is None else torch.nn.Parameter(whole.bias.detach()[rows].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(f(x, self.group), self.weight, self.bias)


class RowParallelLinear(torch.nn.Module):
    """This rank's part of x (..., its part of in), as a column-parallel layer left it -> the output (..., out)."""

    def __init__(self, whole: torch.nn.Linear, group: dist.ProcessGroup, unit: int = 1) -> None:
        super().__init__()
        self.group = group
        mine = share(whole.in_features // unit, dist.get_world_size(group), dist.get_rank(group))
        columns = whole.weight.detach()[:, mine.start * unit : mine.stop * unit]
        self.weight = torch.nn.Parameter(columns.clone(memory_format=torch.contiguous_format))
        self.bias = None if whole.bias is None else torch.nn.Parameter(whole.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = g(linear(x, self.weight), self.group)
        return output if self.bias is None else output + self.bias  # once, after the sum


class VocabParallelEmbedding(torch.nn.Module):
    """Token ids (B, T) -> (B, T, H), whole; this rank has the rows of its part of the vocabulary."""

    def __init__(self, whole: torch.nn.Embedding, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.mine = share(whole.num_embeddings, dist.get_world_size(group), dist.get_rank(group))
        rows = whole.weight.detach()[self.mine.start : self.mine.stop]
        self.weight = torch.nn.Parameter(rows.clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        elsewhere = (ids < self.mine.start) | (ids >= self.mine.stop)
        found = embedding((ids - self.mine.start).masked_fill(elsewhere, 0), self.weight)
        return g(found.masked_fill(elsewhere[..., None], 0.0), self.group)


def vocab_parallel_loss(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Mean cross-entropy in nats of logits (n, this rank's part of the vocabulary), for labels (n,). Collective.

    Three numbers a token travel in place of its logits: the largest one, the sum of exp, and that of the label.
    """
    mine = share(vocab_size, dist.get_world_size(group), dist.get_rank(group))
    largest = logits.detach().amax(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    logits = logits - largest[:, None]
    elsewhere = (labels < mine.start) | (labels >= mine.stop)
    found = logits.gather(1, (labels - mine.start).masked_fill(elsewhere, 0)[:, None])[:, 0]
    of_label = g(found.masked_fill(elsewhere, 0.0), group)
    return (g(logits.exp().sum(-1), group).log() - of_label).mean()
