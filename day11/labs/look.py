"""Day 11: look inside engines - what a rank keeps in which precision, in bytes, beside the arithmetic.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day11/labs/look.py
    deepspeed --num_accelerators 2 day11/labs/look.py --configs day11/ds_config.json my.json --model mini

Expect, for each config, a line a kind: parameters, gradients, the optimizer's own (master) weights, and its moments.
All engines run in one process group, one after the other, two optimizer steps each.
Checked with deepspeed 0.19.8. Source: arXiv:1710.03740; arXiv:1910.02054, section 3.1. The arithmetic: config/plan.py.
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.world import join_world
from common.data import load_tokenizer
from common.errors import clear_errors
from common.model import build_model, get_preset
from common.ranks import print0
from day11.precision import computed_bytes, emulate_fp16, forget_autocast, held_bytes, loss_scale

VARIANTS = ("_fp32", "", "_fp16", "_autocast_bf16", "_autocast_fp16", "_bf16_states")
CONFIGS = [str(HERE / f"ds_config{variant}.json") for variant in VARIANTS]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="DeepSpeed JSON configs to look into")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    emulate_fp16()
    join_world()
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
