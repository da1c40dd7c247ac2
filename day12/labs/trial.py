"""Day 12: one trial - a few training steps under a memory limit, with the cure that the flags name. oom.py runs many.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day12/labs/trial.py
    deepspeed --num_accelerators 2 day12/labs/trial.py --limit_gib 0.2
    deepspeed --num_accelerators 2 day12/labs/trial.py --limit_gib 0.2 --recompute --loss_chunks 8

Expect a line with peak memory, tokens/s and the loss; or the allocator's complaint and exit code 1. On a GPU the limit
is PyTorch's, on CPU the operating system's (RLIMIT_DATA), counted from where this process starts to build its model.
Checked with deepspeed 0.19.8. Source: torch.cuda.set_per_process_memory_fraction; man 2 setrlimit
"""

import argparse
import json
import sys
from pathlib import Path

import deepspeed
import torch

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.memory import limit_memory, out_of_memory_ends, peak_bytes
from bench.timing import slowest_median, time_step
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.ranks import over_ranks, print0
from config.read import read_config
from day12.gpt import build_gpt

VOCABULARY = {"tiny": 4096, "mini": 4096}  # the others have GPT-2's 50,257 ids


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config_fp32.json"), help="DeepSpeed JSON config")
    parser.add_argument("--limit_gib", type=float, help="memory of a rank in GiB (default: all there is)")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences a rank and micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches an optimizer step")
    parser.add_argument("--precision", choices=["fp32", "autocast", "bf16"], default="fp32", help="as on day 11")
    parser.add_argument("--stage", type=int, default=0, help="ZeRO stage")
    parser.add_argument("--offload", action="store_true", help="optimizer states in host memory")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing, switched on in the model")
    parser.add_argument("--loss_chunks", type=int, default=1, help="parts of the logits, one after the other")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    return parser.parse_args()


def make_config(args: argparse.Namespace, num_params: int) -> dict:
    """The base config with what the flags change."""
    config = read_config(args.deepspeed_config)
    config.pop("scheduler", None)  # a few steps are no run: no warm-up either
    config |= {"train_micro_batch_size_per_gpu": args.micro_batch, "gradient_accumulation_steps": args.accumulation}
    config |= {"zero_optimization": {"stage": args.stage, "reduce_bucket_size": max(500_000, num_params // 10)}}
    if args.precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif args.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if args.offload:  # with PyTorch's Adam on the host: DeepSpeedCPUAdam is faster there, and compiled on first use
        config |= {"zero_force_ds_cpu_optimizer": False}
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def train(args: argparse.Namespace, device: torch.device) -> dict:
    """Train on random ids: memory and speed do not depend on what they say. Return losses and tokens/s. Collective."""
    preset = get_preset(args.model)
    vocabulary = VOCABULARY.get(args.model, 50257)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    with device:
        model = build_gpt(args.model, vocabulary)
    model.recompute, model.loss_chunks = args.recompute, args.loss_chunks
    config = make_config(args, model.num_params)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    draw = torch.Generator().manual_seed(args.seed + engine.global_rank)
    batch = torch.randint(vocabulary, (args.accumulation * args.micro_batch, preset.block_size), generator=draw)

    def step() -> float:
        loss_sum = 0.0
        for ids in batch.to(device).split(args.micro_batch):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            loss_sum += loss.item() / args.accumulation
        return loss_sum

    times, losses = [], []
    for _ in range(args.steps):
        seconds, loss = time_step(step)
        times.append(seconds)
        losses.append(over_ranks(loss, device))
    tokens = batch.numel() * engine.dp_world_size
    return {"losses": losses, "tokens_per_s": tokens / slowest_median(times, device, warm_up=1)}


def main() -> None:
    args = parse_args()
    for name, least in {"steps": 2, "loss_chunks": 1}.items():  # the first step, which sets up, is not timed
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: take {least} or more")
    device = join_world()
    held = limit_memory(args.limit_gib and int(args.limit_gib * 2**30), device)
    with out_of_memory_ends():
        row = train(args, device)
    row["peak_bytes"] = over_ranks(peak_bytes(device, held), device, "max")
    print0(f"{row['peak_bytes'] / 2**30:.3f} GiB | {row['tokens_per_s']:.0f} tok/s | loss {row['losses'][-1]:.6f}")
    print0(f"row {json.dumps(row)}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
