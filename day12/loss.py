"""Day 12: the last layer and the cross-entropy in one step, so that the logits are written once and read once.

    from loss import linear_cross_entropy     # day12/loss.py, in a script that lies beside it

GPT-2's logits are its largest tensor: 32 sequences of 1,024 tokens times 50,304 ids in 16 bits are 3.3 GB. PyTorch
writes them, reads them for the loss, reads them again and writes their gradient. The kernel below takes a row at a time
while it is in the cache, and leaves the gradient where the logits were; both products with it follow at once, so
nothing that large lives until the backward pass. Needs CUDA and Triton (PyTorch's CUDA builds bring it along).
Source: Liger Kernel, arXiv:2410.10989, section 3.2 (the idea; this code is the course's own).
"""

import torch
import triton
import triton.language as tl


@triton.jit
def loss_and_gradient(logits, targets, losses, width: tl.constexpr, vocab_size: tl.constexpr, BLOCK: tl.constexpr):
    """Row of logits (width,) -> its loss, and the gradient in place. Ids from vocab_size on are padding: gradient 0."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * width
    target = tl.load(targets + row)
    counts = target >= 0
    at_target = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    largest, total = -float("inf"), 0.0
    for start in range(0, vocab_size, BLOCK):  # the sum of exponentials, corrected whenever a larger logit turns up
        ids = start + tl.arange(0, BLOCK)
        part = tl.load(logits + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(part))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(part - larger))
        largest = larger
    log_total = largest + tl.log(total)
    tl.store(losses + row, tl.where(counts, log_total - at_target, 0.0))
    for start in range(0, width, BLOCK):  # this time the row comes from the cache
        ids = start + tl.arange(0, BLOCK)
        part = tl.load(logits + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
        gradient = tl.where(counts, tl.exp(part - log_total) - tl.where(ids == target, 1.0, 0.0), 0.0)
        tl.store(logits + ids, gradient.to(logits.dtype.element_ty), mask=ids < width)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of `x @ weight.T`; both gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        with torch.autocast("cuda", enabled=False):
            narrow_x, narrow_weight = x.to(dtype), weight.to(dtype)
            logits = narrow_x @ narrow_weight.T
            losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
            loss_and_gradient[(len(x),)](logits, targets, losses, logits.shape[1], vocab_size, BLOCK=8192, num_warps=16)
            if any(ctx.needs_input_grad):  # the logits are their own gradient by now
                ctx.save_for_backward((logits @ narrow_weight).to(x.dtype), (logits.T @ narrow_x).to(weight.dtype))
        return losses.sum()

    @staticmethod
    def backward(ctx, scale: torch.Tensor):
        for_x, for_weight = ctx.saved_tensors
        return for_x * scale, for_weight * scale, None, None


@torch.compiler.disable  # a kernel of its own: the compiler would only wrap it
def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Hidden states (M, H), embedding (V, H), ids (M,) with -100 where nothing counts -> sum of the losses in nats."""
    return LinearCrossEntropy.apply(x, weight, targets, vocab_size)
