"""Day 11: overflow - watch the loss scale of fp16 move, steps being skipped, hysteresis, and the end; then the cures.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day11/labs/overflow.py
    deepspeed --num_accelerators 1 day11/labs/overflow.py --model gpt2

Expect eight scenes in one process group, a line a step: loss, loss scale and hysteresis before and after, and whether
weights and Adam's states changed, compared bit by bit. overflow.json in the run folder has the same.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/fp16/loss_scaler.py, class DynamicLossScaler.
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir, show_path
from config.read import read_config
from day11.precision import emulate_fp16

SCENES = {  # changes to fp16 (None: bf16), steps with a loss 2**20 times as large, growth of a layer's weights, steps
    "first scale too high": ({"initial_scale_power": 21, "loss_scale_window": 3}, set(), 1, 12),
    "cure: a lower first scale": ({"initial_scale_power": 12}, set(), 1, 4),
    "bad batches, hysteresis 1": ({"hysteresis": 1}, {3, 5, 7}, 1, 8),
    "bad batches, hysteresis 2": ({"hysteresis": 2}, {3, 5, 7}, 1, 8),
    "cure: consecutive_hysteresis": ({"hysteresis": 2, "consecutive_hysteresis": True}, {3, 5, 7}, 1, 8),
    "the end: activations beyond 65504": ({"initial_scale_power": 2}, set(), 2**20, 8),
    "cure: bf16, same weights": (None, set(), 2**20, 4),
    "no cure: a nan in the weights, bf16": (None, set(), float("nan"), 4),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", nargs="+", choices=[*SCENES], default=[*SCENES], help="what to show, in this order")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day11"), help="folder for overflow.json")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    return parser.parse_args()


def all_bits(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    """A copy of the weights, of the fp32 master weights and of Adam's states, byte by byte."""
    states = [t for weights, state in engine.basic_optimizer.state.items() for t in (weights, *state.values())]
    tensors = [t.detach().to(engine.device).reshape(-1) for t in (*engine.module.parameters(), *states)]
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors])


def play(scene: str, blocks, vocab_size: int, args: argparse.Namespace, device: torch.device) -> dict:
    """Train through a scene and print it; {"steps": a row each, "skipped", "updates", "error"}."""
    fp16, bad_steps, growth, num_steps = SCENES[scene]
    print0(f"\n{scene}: {fp16 or 'bf16'}")
    torch.manual_seed(args.seed)
    with device:
        model = build_model(args.model, vocab_size)
    model.transformer.h[0].mlp.c_proj.weight.data *= growth
    config = read_config(HERE / "ds_config_fp16.json") | {"train_micro_batch_size_per_gpu": 1}
    config |= {"bf16": {"enabled": True}, "fp16": {}} if fp16 is None else {"fp16": config["fp16"] | fp16}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    scaler, rows, error = engine.optimizer.loss_scaler, [], None
    batches = endless_batches(DataLoader(blocks, 1, sampler=DistributedSampler(blocks, seed=args.seed)))
    for step in range(1, num_steps + 1):
        loss = engine(**to_device(next(batches), engine.device)).loss
        before, scale, hysteresis = all_bits(engine), scaler.cur_scale, getattr(scaler, "cur_hysteresis", "-")
        engine.backward(loss * 2**20 if step in bad_steps else loss)
        try:
            engine.step()
        except Exception as end:  # DynamicLossScaler.update_scale raises just that
            error = f"{type(end).__name__}: {end}"
            print0(f"step {step:2} | {error}")
            break
        row = {"step": step, "loss": over_ranks(loss.item(), engine.device), "applied": engine.was_step_applied()}
        row |= {"scale": scale, "next_scale": scaler.cur_scale, "unchanged": torch.equal(before, all_bits(engine))}
        row |= {"hysteresis": hysteresis, "next_hysteresis": getattr(scaler, "cur_hysteresis", "-")}
        rows.append(row)
        done = "updated" if row["applied"] else "skipped", "unchanged" if row["unchanged"] else "changed"
        scales = (
            f"scale {scale:9,.0f} -> {scaler.cur_scale:9,.0f} | hysteresis {hysteresis} -> {row['next_hysteresis']}"
        )
        print0(f"step {step:2} | loss {row['loss']:7.4f} | {scales} | {done[0]}, weights and states {done[1]}")
    updates = max((int(state["step"]) for state in engine.basic_optimizer.state.values()), default=0)
    print0(f"{engine.global_steps} steps, {engine.skipped_steps} skipped, Adam counts {updates}")
    engine.destroy()
    return {"steps": rows, "skipped": engine.skipped_steps, "updates": updates, "error": error}


def main() -> None:
    args = parse_args()
    emulate_fp16()
    device = join_world()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus("all", tokenizer, preset.block_size)
    scenes = {scene: play(scene, blocks, len(tokenizer), args, device) for scene in args.scenes}
    if torch.distributed.get_rank() == 0:
        write_results(Path(args.run_dir) / "overflow.json", this_command(), model=args.model, scenes=scenes)
        print0(f"\nall of this: {show_path(args.run_dir)}/overflow.json")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
