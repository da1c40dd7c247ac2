"""Day 12: the last layer and the cross-entropy in one step, so that the logits are written once and read once.

    from day12.loss import linear_cross_entropy

GPT-2's logits are its largest tensor: 32 sequences of 1,024 tokens times 50,304 ids in 16 bits are 3.3 GB. PyTorch
writes them, reads them for the loss, reads them again and writes their gradient. The kernel below reads each row once
and leaves the gradient where the logits were; both products with it follow at once, so nothing that large lives until
the backward pass. Needs CUDA and Triton (PyTorch's CUDA builds bring it along).
Source: Liger Kernel, arXiv:2410.10989, section 3.2 (the idea; this code is the course's own).
"""

import torch
import triton
import triton.language as tl


@triton.jit
def loss_and_gradient(logits, targets, losses, width: tl.constexpr, vocab_size: tl.constexpr, BLOCK: tl.constexpr):
    """Row of logits (width,) -> its loss, and the gradient in place. Ids from vocab_size on are padding: gradient 0.

    A program holds its whole row in registers, as the 16-bit numbers they are: half of what float32 would take.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * width
    target = tl.load(targets + row)
    counts = target >= 0
    at_target = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    ids = tl.arange(0, BLOCK)
    # Masked by the width, a multiple of 128: loads of 16 bytes. By vocab_size, an odd number, they would be of 2.
    narrow = tl.load(logits + ids, mask=ids < width, other=-float("inf"))
    narrow = tl.where(ids < vocab_size, narrow, -float("inf"))
    largest = tl.max(narrow.to(tl.float32))
    log_total = largest + tl.log(tl.sum(tl.exp(narrow.to(tl.float32) - largest)))
    tl.store(losses + row, tl.where(counts, log_total - at_target, 0.0))
    gradient = tl.exp(narrow.to(tl.float32) - log_total) - tl.where(ids == target, 1.0, 0.0)
    gradient = tl.where(counts, gradient, 0.0)
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
            width = logits.shape[1]
            block = triton.next_power_of_2(width)
            loss_and_gradient[(len(x),)](logits, targets, losses, width, vocab_size, BLOCK=block, num_warps=32)
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
