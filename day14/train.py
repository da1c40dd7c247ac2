"""Day 14: a training that measures itself - windows on a waiting clock, speed with its interval, cost, time to a loss.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day14/train.py
    deepspeed --num_accelerators 2 day14/train.py --target_loss 6.5 --price 2.50

Expect training, and at the end the figures by which runs are compared: tokens/s with an interval, FLOP/s and MFU, peak
memory, device hours (with --price: dollars) for a million tokens, and when the held-out loss reached the target.
Checked with deepspeed 0.19.8. Source: https://docs.pytorch.org/docs/stable/notes/cuda.html (asynchronous execution).
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from common.cpu import start_without_compiler
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0, require_launcher
from common.run_log import RunLog, default_run_dir
from day12.resources import peak_flops
from day14.cases import per_million_tokens
from day14.stats import CONFIDENCE, MIN_TURNS, interval

WARM_UP = 2  # windows that are not counted: allocators, caches and compilers come to rest


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=5, help="optimizer steps between two log lines")
    parser.add_argument("--target_loss", type=float, default=6.7, help="held-out loss to be reached, nats a token")
    parser.add_argument("--price", type=float, help="dollars per device and hour, for the cost")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day14"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def report(window_s: list[float], held_out: list[float], sizes: dict, args: argparse.Namespace) -> list[str]:
    """The figures by which runs are compared, a line each. `window_s`, `held_out`: of each window of log_every steps;
    `sizes`: tokens and FLOPs (of one rank) of an optimizer step, ranks, peak FLOP/s of a device or None.
    """
    speeds = [args.log_every * sizes["tokens"] / seconds for seconds in window_s[WARM_UP:]]
    speed, (low, high), ranks = median(speeds), interval(speeds), sizes["ranks"]
    flops = speed / sizes["tokens"] * sizes["flops"]  # a second, on each rank
    mfu = f"{flops / sizes['peak']:.1%}" if sizes["peak"] else "unknown: no peak FLOP/s known for this device"
    cost = per_million_tokens(speed, ranks, args.price)
    dollars = f" | {cost['dollars_per_mtoken']:.4f} dollars" if args.price is not None else ""
    there = next((at for at, loss in enumerate(held_out, start=1) if loss <= args.target_loss), None)
    after = "not reached"
    if there:
        after = f"reached after {there * args.log_every} steps, {sum(window_s[:there]):.1f} s of training"
    return [
        f"speed: {speed:,.0f} tok/s | {CONFIDENCE:.0%} interval {low:,.0f} to {high:,.0f} | {len(speeds)} windows",
        f"use: {flops / 1e12:.4f} TFLOP/s a rank | MFU {mfu}",
        f"cost of a million tokens: {cost['device_hours_per_mtoken']:.4f} device hours{dollars}",
        f"target: held-out loss {args.target_loss} {after}",
    ]


def main() -> None:
    args = parse_args()
    if args.steps // args.log_every < WARM_UP + MIN_TURNS:
        least = (WARM_UP + MIN_TURNS) * args.log_every
        raise UserError(f"--steps {args.steps}: at least {least}, {WARM_UP} windows warm up, {MIN_TURNS} count")
    require_launcher()
    start_without_compiler()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    device, ranks = engine.device, engine.world_size
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    equation = f"batch {engine.train_batch_size()} = {micro_batch} micro x {accumulation} accumulation x {ranks} ranks"
    print0(f"zero stage {engine.zero_optimization_stage()} | {equation} | {device.type}")
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    batches = endless_batches(DataLoader(train_blocks, micro_batch, sampler=sampler, drop_last=True))

    counter = FlopCounterMode(display=False)  # a forward pass, operation by operation; backward takes twice as many
    with counter, torch.no_grad():
        engine(**to_device(next(batches), device))
    tokens = accumulation * micro_batch * preset.block_size  # of this rank, in an optimizer step
    sizes = {"tokens": ranks * tokens, "flops": 3 * accumulation * counter.get_total_flops()}
    sizes |= {"ranks": ranks, "peak": peak_flops(device)}
    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    window_s, held_out = [], []
    for step in range(1, args.steps + 1):
        if step % args.log_every == 1 or args.log_every == 1:
            get_accelerator().synchronize()  # a GPU works behind the host's back: wait before each look at the clock
            start = time.perf_counter()
        local_loss = 0.0
        for _ in range(accumulation):
            loss = engine(**to_device(next(batches), device)).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        if step % args.log_every:
            log.step(step, local_loss, tokens)
            continue
        get_accelerator().synchronize()
        window_s.append(over_ranks(time.perf_counter() - start, device, "max"))  # the slowest rank's
        log.step(step, local_loss, tokens)  # from here on the clock stands still
        held_out.append(held_out_loss(engine, held_out_blocks, device, max_blocks=64))
        log.held_out(step, held_out[-1])
    print0("\n".join(report(window_s, held_out, sizes, args)))
    log.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
