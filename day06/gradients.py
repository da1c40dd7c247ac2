"""Day 06: what a rank holds of gradients between two micro-batches, by looking at its live tensors.

    from day06.gradients import gradients_held     # day06/gradients.py; train.py and labs/compare.py use it

Source: Rajbhandari et al. 2019 (ZeRO), arXiv:1910.02054, section 5.2; deepspeed 0.19.8, stage_1_and_2.py (ipg buckets).
"""

import deepspeed

from bench.held import bucket_tensors, bytes_by_kind, settled_tensors


def gradients_held(engine: deepspeed.DeepSpeedEngine, at_boundary: set[int]) -> dict[str, int]:
    """Bytes of the tensors that were not there between two optimizer steps: buckets, and what is left, gradients."""
    new = [tensor for address, tensor in settled_tensors(engine.device).items() if address not in at_boundary]
    return bytes_by_kind(new, buckets=bucket_tensors(engine.optimizer))
