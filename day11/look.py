"""Day 11: look inside engines - what a rank keeps in which precision, in bytes, beside the arithmetic.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day11/look.py
    deepspeed --num_accelerators 2 day11/look.py --configs day11/ds_config.json my.json --model mini

Expect, for each config, a line a kind: parameters, gradients, the optimizer's own (master) weights, and its moments.
All engines run in one process group, one after the other, two optimizer steps each.
Checked with deepspeed 0.19.8. Source: arXiv:1710.03740; arXiv:1910.02054, section 3.1. The arithmetic: config/plan.py.
"""

import argparse
import sys
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime import torch_autocast
from train import emulate_fp16, loss_scale

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # Python puts only this folder on the path; common/ is one level up

from common.cpu import start_without_compiler
from common.data import load_tokenizer
from common.errors import clear_errors
from common.memory import bytes_by_kind, live_tensors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0, require_launcher
from config.plan import model_state_bytes, owned_gradient_elements

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
VARIANTS = ("_fp32", "", "_fp16", "_autocast_bf16", "_autocast_fp16", "_bf16_states")
CONFIGS = [str(HERE / f"ds_config{variant}.json") for variant in VARIANTS]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="DeepSpeed JSON configs to look into")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    return parser.parse_args()


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
    time.sleep(0.1)  # gloo's thread lets go of the last message a moment after it has arrived
    held, tensors = {kind: {} for kind in [*kinds, "other"]}, live_tensors(engine.device).values()
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


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    emulate_fp16()
    deepspeed.init_distributed()
    vocab_size = len(load_tokenizer(get_preset(args.model).tokenizer))
    for path in args.configs:
        torch.manual_seed(0)  # the same on every rank, so every rank builds the same weights
        model = build_model(args.model, vocab_size)
        sizes = [parameter.numel() for parameter in model.parameters()]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=path)
        ids = torch.randint(vocab_size, (1, model.config.n_positions), device=engine.device)
        for step in range(2):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            if step == 1:  # all there is exists now: Adam's moments since the first step, gradients until engine.step()
                held = held_bytes(engine)
            engine.step()
        computed = computed_bytes(engine, sizes)
        print0(f"{Path(path).name} | zero stage {engine.zero_optimization_stage()} | loss scale {loss_scale(engine)}")
        for kind, precisions in held.items():
            cells = " + ".join(f"{name} {size:,.0f}" for name, size in precisions.items() if size > 99) or "none"
            line = f"    {kind:10} {cells:30}" + (f" | computed {computed[kind]:,.0f}" if kind in computed else "")
            print0(line.rstrip())
        engine.destroy()
        forget_autocast()
        del engine, model  # or the next case would count them
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
