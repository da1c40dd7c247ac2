"""Day 06: compare ZeRO-1 and ZeRO-2 - gradient bytes held, bytes sent, speed; with and without accumulation.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day06/labs/compare.py
    deepspeed --num_accelerators 2 day06/labs/compare.py --accumulations 1 16 --model tiny --micro_batch 8

Expect a table, compare.json and two plots in the run folder. All cases train in one process group, one after the other,
with the same first weights and the same batches, so that their losses must agree.
Checked with deepspeed 0.19.8. Source: arXiv:1910.02054, sections 5.2 and 7.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.timing import slowest_median, time_step
from bench.traffic import count_traffic
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks
from common.run_log import default_run_dir
from config.read import read_config
from day06.gradients import gradients_held

COUNTED, LOOKED_AT = 2, 3  # the step whose messages are counted, the step whose gradients are; neither is timed
COLUMNS = {
    "gradients MB": "gradient_bytes:MB",
    "bucket MB": "bucket_bytes:MB",
    "sent per step MB": "sent_bytes:MB",
    "tok/s": "tokens_per_s:,.0f",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = [str(HERE / f"ds_config{name}.json") for name in ("_zero1", "", "_reduce")]
    parser.add_argument("--configs", nargs="+", default=configs, help="DeepSpeed JSON configs to compare")
    parser.add_argument("--accumulations", nargs="+", type=int, default=[1, 4], help="micro-batches an optimizer step")
    parser.add_argument("--micro_batch", type=int, default=1, help="sequences per rank and micro-batch")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day06"), help="folder for compare.json and plots")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def train_step(engine: deepspeed.DeepSpeedEngine, batches, at_boundary: set[int] | None) -> tuple[float, dict]:
    """One optimizer step: this rank's loss and, given `at_boundary`, what it holds after the first backward pass."""
    local_loss, held = 0.0, {}
    for micro_step in range(engine.gradient_accumulation_steps()):
        batch = to_device(next(batches), engine.device)
        loss = engine(**batch).loss
        engine.backward(loss)
        local_loss += loss.detach() / engine.gradient_accumulation_steps()
        del batch, loss  # or they would count as held
        if at_boundary and micro_step == 0:
            held = gradients_held(engine, at_boundary)
        engine.step()
    return local_loss, held


def measure(config: dict, blocks, vocab_size: int, args: argparse.Namespace, device: torch.device) -> dict:
    """Train with `config`; return losses, tokens/s, and bytes on the rank with most: sent per step, gradients."""
    torch.manual_seed(args.seed)
    model = build_model(args.model, vocab_size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    sampler = DistributedSampler(blocks, seed=args.seed)  # each rank its own blocks
    batches = endless_batches(DataLoader(blocks, batch_size=args.micro_batch, sampler=sampler, drop_last=True))
    row = {"stage": engine.zero_optimization_stage(), "accumulation": engine.gradient_accumulation_steps()}
    losses, seconds = [], []
    for step in range(1, args.steps + 1):
        at_boundary = set(live_tensors(device)) if step == LOOKED_AT else None
        with count_traffic(enabled=step == COUNTED) as traffic:
            spent, (local_loss, held) = time_step(partial(train_step, engine, batches, at_boundary))
        seconds.append(spent)
        losses.append(over_ranks(float(local_loss), device))
        if step == COUNTED:
            row["sent_bytes"] = traffic.sent_bytes()
        if step == LOOKED_AT:
            row["gradient_bytes"] = over_ranks(held["other"], device, "max")
            row["bucket_bytes"] = over_ranks(held["buckets"], device, "max")
    tokens = engine.train_batch_size() * blocks.block_size
    row["tokens_per_s"] = tokens / slowest_median(seconds, device, warm_up=LOOKED_AT)
    row["num_params"] = sum(p.numel() for p in model.parameters())
    engine.destroy()
    return row | {"losses": losses}


def main() -> None:
    args = parse_args()
    if args.steps <= LOOKED_AT:
        raise UserError(f"--steps {args.steps}: at least 4, as the first three warm up, count bytes and are not timed")
    configs = {Path(path).stem: read_config(path) for path in args.configs}
    device = join_world()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    table = Table(Path(args.run_dir) / "compare.json", COLUMNS, width=28)
    for accumulation in args.accumulations:
        for name, config in configs.items():
            config |= {"train_micro_batch_size_per_gpu": args.micro_batch, "gradient_accumulation_steps": accumulation}
            kept = live_tensors(device)
            with table.row(f"{name}, {accumulation} micro", config=name) as row:
                row |= measure(config, blocks, len(tokenizer), args, device)
            free(device, kept)
    title = f"{args.model}, {dist.get_world_size()} ranks"
    table.bars("gradient_bytes", "MB of gradients per rank", title, scale=1e6)
    table.bars("sent_bytes", "MB sent per rank and step", title, scale=1e6)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
