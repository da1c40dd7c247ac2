"""Day 11: underflow - count the gradients that become 0 in fp16, for loss scales from 1 to 65536.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day11/labs/underflow.py
    deepspeed --num_accelerators 1 day11/labs/underflow.py --model gpt2

Expect training in fp32, then a line a loss scale: shares of the gradients that are 0 in fp16 and not in fp32, and how
far those of the weights are off in all. The same batch and weights each time; underflow.json has the same.
Checked with deepspeed 0.19.8. Source: arXiv:1710.03740, section 3.2 and figure 3.
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0
from common.run_log import default_run_dir, show_path
from config.read import read_config
from day11.precision import emulate_fp16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scales = [2**power for power in (0, 5, 10, 16, 24)]
    parser.add_argument("--scales", nargs="+", type=float, default=scales, help="static loss scales to compare")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences a rank and micro-batch")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day11"), help="folder for underflow.json")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    return parser.parse_args()


def start(weights: dict | None, scale: float | None, vocab_size: int, args: argparse.Namespace, device: torch.device):
    """An engine in fp16 with this static loss scale, or in fp32 (None); with these weights, or fresh ones (None)."""
    torch.manual_seed(args.seed)
    with device:
        model = build_model(args.model, vocab_size)
    if weights:
        model.load_state_dict(weights)
    config = read_config(HERE / "ds_config_fp32.json")
    config["train_micro_batch_size_per_gpu"] = args.micro_batch
    config["zero_optimization"] = {"stage": 2, "reduce_bucket_size": 500_000}  # safe_get_full_grad wants ZeRO
    if scale:
        config["fp16"] = {"enabled": True, "loss_scale": scale}  # static: 0 would be dynamic
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def gradients(engine: deepspeed.DeepSpeedEngine, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of one batch, times the loss scale: of this rank's logits; of the weights, averaged over ranks."""
    output = engine(**batch)
    output.logits.retain_grad()
    engine.backward(output.loss)
    weights = torch.cat([safe_get_full_grad(parameter).float().flatten() for parameter in engine.module.parameters()])
    engine.destroy()
    return output.logits.grad.float(), weights


def main() -> None:
    args = parse_args()
    if wrong := [scale for scale in args.scales if not scale > 0]:
        raise UserError(f"--scales {wrong[0]}: a loss scale is a number above 0, a power of two as a rule")
    emulate_fp16()
    device = join_world()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus("all", tokenizer, preset.block_size)

    engine = start(None, None, len(tokenizer), args, device)
    loader = DataLoader(blocks, args.micro_batch, sampler=DistributedSampler(blocks, seed=args.seed))
    batches = endless_batches(loader)
    for _ in range(args.steps):
        engine.backward(engine(**to_device(next(batches), engine.device)).loss)
        engine.step()
    weights = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    batch = to_device(next(batches), engine.device)

    exact = gradients(engine, batch)
    print0(f"after {args.steps} steps; gradients of {exact[0].numel():,} logits and of {exact[1].numel():,} weights")
    print0(f"{'loss scale':>12} {'logits: 0':>10} {'weights: 0':>11} {'weights off':>12} {'inf or nan':>11}")
    table = []
    for scale in args.scales:
        found = gradients(start(weights, scale, len(tokenizer), args, device), batch)
        lost = [((want != 0) & (got == 0)).float().mean().item() for want, got in zip(exact, found, strict=True)]
        off = ((found[1] / scale - exact[1]).norm() / exact[1].norm()).item()
        row = {"loss_scale": scale, "logits_zero": lost[0], "weights_zero": lost[1]}
        row |= {"weights_off": off if off == off else None, "not_finite": int((~torch.isfinite(found[1])).sum())}
        table.append(row)
        print0(f"{scale:12,.0f} {lost[0]:10.2%} {lost[1]:11.2%} {off:12.2%} {row['not_finite']:11,}")
    if torch.distributed.get_rank() == 0:
        write_results(Path(args.run_dir) / "underflow.json", this_command(), model=args.model, table=table)
        print0(f"table: {show_path(args.run_dir)}/underflow.json")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
