"""Day 19: FLOPs - what a step has to compute, counted on paper; what a device does, measured; the ratio is the MFU.

    from day19.flops import forward_flops, product_flops, utilisation     # labs/count_flops.py compares the counters

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B; Korthikanti et al. 2022, arXiv:2205.05198 (HFU)
"""

import torch

from bench.timing import time_step
from common.model import Preset


def forward_flops(preset: Preset, vocab_size: int, sequences: int) -> dict[str, int]:
    """Operations of one forward pass of `sequences` full sequences through a GPT-2, by part: matrix products alone.

    A product of (m, k) by (k, n) is m k n multiplications and as many additions. Attention is counted whole, as it is
    without a mask: a kernel that skips what the mask hides does half of it.
    """
    tokens, length, hidden, layers = sequences * preset.block_size, preset.block_size, preset.hidden, preset.num_layers
    return {
        "attention projections": layers * 2 * tokens * 4 * hidden * hidden,  # q, k, v and the output's
        "attention scores": layers * 2 * 2 * tokens * length * hidden,  # q by k, and the weights by v
        "perceptron": layers * 2 * tokens * 8 * hidden * hidden,
        "output head": 2 * tokens * hidden * vocab_size,
    }


def utilisation(forward: float, step_s: float, peak: float, computed: int = 3) -> float:
    """Share of `peak` FLOP/s that a step of `step_s` seconds uses, whose forward pass has `forward` operations.

    `computed` 3: the forward pass and twice as much backward, MFU. 4: and each layer's forward pass once more, HFU.
    """
    return computed * forward / step_s / peak


def product_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """FLOP/s of the best of `repeats` products of two size x size matrices, 2 size^3 operations each."""
    a = torch.randn(size, size, device=device).to(dtype)
    calls = 1 if device.type == "cpu" else 10
    runs = [time_step(lambda: [a @ a for _ in range(calls)])[0] for _ in range(repeats + 1)]
    return calls * 2 * size**3 / min(runs[1:])
