"""Day 21: recomputation, by hand - cut a model's blocks into segments, keep the inputs, and choose who recomputes what.

    from day21.recompute import recompute_every, keep_products

A Transformer's blocks lie in a ModuleList that its forward walks through. `recompute_every` puts a list in its place
that holds the same blocks under the same names, so that checkpoints still fit, and hands out segments of k blocks.
Checked with torch 2.13.0, transformers 5.20 and deepspeed 0.19.8. Source: Chen et al. 2016, arXiv:1604.06174;
https://docs.pytorch.org/docs/stable/checkpoint.html (selective activation checkpointing)
"""

from collections.abc import Callable, Iterator
from functools import partial

import deepspeed
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from common.errors import UserError

# A checkpoint function runs `run(hidden)` now, keeps `hidden` alone, and runs it again when the backward pass is there.
Checkpoint = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]

ATEN = torch.ops.aten
PRODUCTS = {  # what takes the time: products, and attention in one kernel under each of its names
    ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.linear.default,
    ATEN._scaled_dot_product_flash_attention.default, ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default, ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}  # fmt: skip


class Segments(torch.nn.ModuleList):
    """The blocks of a model, and the segments of `every` blocks that a loop over it gets instead of them."""

    def __init__(self, blocks: torch.nn.ModuleList, every: int, function: Checkpoint, only: int) -> None:
        super().__init__(blocks)
        self.runs = [0] * len(blocks)  # how often each block ran forward: the proof of all this
        cuts = [*range(0, only, every), *range(only, len(blocks) + 1)]
        self.segments = [partial(self._run, function, *ends) for ends in zip(cuts, cuts[1:], strict=False)]
        self.recomputed = only

    def __repr__(self) -> str:
        # ModuleList's asks __iter__: a segment's words name this list, whose words ... 16 blocks would take for ever,
        # and ZeRO-3 writes its arguments, the model among them, into a string that nobody reads (0.19.8).
        return torch.nn.Module.__repr__(self)

    def _run(self, function: Checkpoint, first: int, last: int, hidden: torch.Tensor, *extra, **named) -> torch.Tensor:
        """Blocks `first` to `last` - 1. What else a block takes (masks, angles) comes along, kept once for all."""

        def through(hidden: torch.Tensor) -> torch.Tensor:
            for number in range(first, last):
                self.runs[number] += 1
                hidden = self._modules[str(number)](hidden, *extra, **named)
            return hidden

        return function(through, hidden) if first < self.recomputed and torch.is_grad_enabled() else through(hidden)

    def __iter__(self) -> Iterator[Callable]:
        return iter(self.segments)

    def __getitem__(self, which: int | slice) -> Callable | list[Callable]:
        return self.segments[which]


def blocks_of(model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """Where the blocks lie: (module, name of its ModuleList). GPT-2 calls it h, Llama and its kin layers."""
    for module in model.modules():
        for name in ("h", "layers"):
            if isinstance(getattr(module, name, None), torch.nn.ModuleList):
                return module, name
    raise UserError(f"{type(model).__name__} has no ModuleList `h` or `layers`: name its blocks one of these")


def recompute_every(
    model: torch.nn.Module, every: int = 1, function: Checkpoint | None = None, only: int | None = None
) -> Segments:
    """Let `model` keep the input of every `every`-th block alone; without `function`, torch's checkpoint does it.

    `only`: recompute the first so many blocks, and keep the others whole. Call it before `deepspeed.initialize`. Blocks
    of different kinds (sliding windows) get the mask of their segment: for those take `every` 1. UserError for numbers
    that do not fit.
    """
    owner, name = blocks_of(model)
    blocks = getattr(owner, name)
    only = len(blocks) if only is None else only
    if not 0 <= only <= len(blocks):
        raise UserError(f"recompute {only} blocks: the model has {len(blocks)}")
    if every < 1 or only % every:
        raise UserError(f"a checkpoint every {every} blocks does not divide the {only} that are to be recomputed")
    segments = Segments(blocks, every, function or partial(checkpoint, use_reentrant=False), only)
    setattr(owner, name, segments)
    return segments


def keep_products(run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Selective recomputation: products and attention are kept, the cheap rest (norms, GELU) is computed again.

    A policy is asked for each operator of the forward pass: is its output to be kept? (torch's "SAC")
    """

    def policy(context, operator, *_, **__) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(run, hidden, use_reentrant=False, context_fn=contexts)


def keep_on_host(run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Activation offload: everything that is kept goes to the host's memory and comes back; nothing is recomputed."""
    with torch.autograd.graph.save_on_cpu(pin_memory=hidden.device.type != "cpu"):
        return run(hidden)


WAYS: dict[str, Checkpoint | None] = {  # by name, for labs and train.py
    "torch": None,
    "deepspeed": deepspeed.checkpointing.checkpoint,  # obeys deepspeed.checkpointing.configure()
    "selective": keep_products,
    "host": keep_on_host,
}
