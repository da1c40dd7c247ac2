"""Day 11: what an engine keeps in which precision, its loss scale, and fp16 where a CPU has none.

    from day11.precision import emulate_fp16, held_bytes, loss_scale     # read from the engine, not from the config

Checked with deepspeed 0.19.8. Source: arXiv:1710.03740; arXiv:1910.02054, section 3.1; deepspeed/runtime/engine.py.
"""

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import torch_autocast

from bench.held import bytes_by_kind, settled_tensors
from common.ranks import over_ranks
from config.plan import model_state_bytes, owned_gradient_elements

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def emulate_fp16() -> None:
    """Let fp16 run on CPUs where DeepSpeed refuses it: it asks oneDNN, whose fp16 kernels need AVX512-FP16.

    PyTorch's own kernels round each result to fp16 all the same, slowly: the numbers are fp16's, the speed is not.
    """
    if get_accelerator().device_name() == "cpu":
        get_accelerator().is_fp16_supported = lambda: True


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """The loss scale now: DeepSpeed's for fp16, PyTorch's GradScaler's for autocast to fp16, None for the others."""
    scaler = engine.torch_autocast_z0_gradscaler or getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    scale = scaler.get_scale() if scaler else engine.optimizer.loss_scale if engine.fp16_enabled() else None
    return scale and float(scale)


def forget_autocast() -> None:
    """Between two engines: `torch_autocast` leaves a global on (0.19.8), and a later fp16 engine scales twice."""
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


def held_bytes(engine: deepspeed.DeepSpeedEngine) -> dict[str, dict[str, float]]:
    """{kind: {precision: bytes}} on the rank that holds most; between backward() and step(). Collective."""
    state, parameters = engine.basic_optimizer.state, list(engine.module.parameters())
    averaged = [grad for group in getattr(engine.optimizer, "averaged_gradients", {}).values() for grad in group or []]
    kinds = {
        "parameters": parameters,
        "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None] + averaged,
        "masters": list(state),  # Adam keeps its moments by weight: a parameter, or ZeRO's own copy of its slice
        "moments": [moment for moments in state.values() for moment in moments.values() if torch.is_tensor(moment)],
    }
    held, tensors = {kind: {} for kind in [*kinds, "other"]}, settled_tensors(engine.device).values()
    for dtype, name in NAMES.items():
        for kind, size in bytes_by_kind([t for t in tensors if t.dtype == dtype], **kinds).items():
            held[kind][name] = over_ranks(size, engine.device, "max")
    return held


def computed_bytes(engine: deepspeed.DeepSpeedEngine, sizes: list[int]) -> dict[str, float]:
    """What config/plan.py says to that. Its optimizer is 12 bytes a parameter: master weight 4, Adam's moments 8."""
    stage, ranks = engine.zero_optimization_stage(), engine.dp_world_size
    plan = model_state_bytes(sum(sizes), ranks, stage, NAMES[engine.get_data_types()[0]])
    # At ZeRO-1 a rank keeps, in the precision of the parameters, each gradient that its slice touches.
    owned = owned_gradient_elements(tuple(sizes), ranks) if stage else sum(sizes)
    moments = 8 * sum(sizes) / (ranks if stage else 1)
    masters = plan["optimizer"] - moments  # 0 in fp32 without ZeRO: the parameters are their own masters
    if engine.bf16_master_weights_and_gradients() or engine.fp16_master_weights_and_gradients():
        masters /= 2  # the plan does not know these
    if engine.bf16_optimizer_states():
        moments /= 2
    computed = {"parameters": plan["parameters"], "masters": masters, "moments": moments}
    if not engine.zero_cpu_offload():  # offload has them in buffers of its own
        computed["gradients"] = owned * plan["parameters"] / sum(sizes)
    return computed
