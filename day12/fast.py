"""Day 12: fast - what keeps a GPU busy, put on in one call: the rungs of day12/speed.md that are no part of the model.

    from day12.fast import speed_up     # after deepspeed.initialize; the training loop stays as it is

Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py (_take_model_step, allreduce_gradients); speed.md.
"""

import deepspeed
import torch

from day12.gpt import GPT


def clip_with_pytorch(engine: deepspeed.DeepSpeedEngine) -> None:
    """At ZeRO-0 let PyTorch clip, in few kernels; DeepSpeed's own takes one or two per parameter, and waits.

    The norm is still the JSON's `gradient_clipping`. From ZeRO-1 on gradients lie in DeepSpeed's buffers: no effect.
    """
    parameters = list(engine.module.parameters())
    engine.clip_fp32_gradients = lambda: torch.nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping())


def skip_averaging(engine: deepspeed.DeepSpeedEngine) -> None:
    """One rank has nobody to average with; ZeRO-0 would still flatten all gradients and copy them back."""
    if engine.zero_optimization_stage() == 0 and engine.dp_world_size == 1:
        engine.enable_backward_allreduce = False


def speed_up(engine: deepspeed.DeepSpeedEngine, model: GPT) -> None:
    """Compile the model, choose its fast kernels, and leave out what DeepSpeed would do for nothing."""
    model.narrow_stream = True  # 16 bits between the blocks as well
    clip_with_pytorch(engine)
    skip_averaging(engine)
    if engine.device.type == "cuda":
        model.fused_loss = True  # loss.py's kernel
        torch.backends.cuda.enable_flash_sdp(False)  # cuDNN's attention beats FlashAttention 2 on Hopper
    if engine.device.type != "cpu":  # there no compiler is promised
        engine.compile()  # torch.compile on the module; the engine's own hooks stay outside
