"""Day 06: compare ZeRO-1 and ZeRO-2 - gradient bytes held, bytes sent, speed; with and without accumulation.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day06/labs/compare.py
    deepspeed --num_accelerators 2 day06/labs/compare.py --accumulations 1 16 --model tiny --micro_batch 8

Expect a table, compare.json and two plots in the run folder. All cases train in one process group, one after the other,
with the same first weights and the same batches, so that their losses must agree.
Checked with deepspeed 0.19.8. Source: arXiv:1910.02054, sections 5.2 and 7.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from common.cpu import start_without_compiler
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.plots import plot_bars
from common.ranks import over_ranks, print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path
from day06.gradients import gradients_held


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = [str(HERE / f"ds_config{name}.json") for name in ("_zero1", "", "_reduce")]
    parser.add_argument("--configs", nargs="+", default=configs, help="DeepSpeed JSON configs to compare")
    parser.add_argument("--accumulations", nargs="+", type=int, default=[1, 4], help="micro-batches an optimizer step")
    parser.add_argument("--micro_batch", type=int, default=1, help="sequences a rank and micro-batch")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day06"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def sent_bytes(num_ranks: int) -> float:
    """Bytes that this rank has sent since the log was cleared, by the ring algorithms, from DeepSpeed's own log.

    The log has each message's size: the whole tensor for all-reduce, reduce and reduce-scatter, a rank's part for
    all-gather. A ring all-reduce sends it twice less 1/N, a reduce or reduce-scatter once less 1/N.
    """
    log, n = deepspeed.comm.comm.comms_logger.comms_dict, num_ranks
    factor = {"all_reduce": 2 * (n - 1) / n, "reduce": (n - 1) / n, "reduce_scatter_tensor": (n - 1) / n}
    factor["all_gather_into_tensor"] = n - 1
    return sum(factor[op] * size * entry[0] for op, sizes in log.items() for size, entry in sizes.items())


def measure(config: dict, blocks, vocab_size: int, args: argparse.Namespace) -> dict:
    """Train with `config`; return losses, median step time in s, and bytes a rank: sent a step, held, gradients."""
    torch.manual_seed(args.seed)
    model = build_model(args.model, vocab_size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    sampler = DistributedSampler(blocks, seed=args.seed)  # each rank its own blocks
    batches = endless_batches(DataLoader(blocks, batch_size=args.micro_batch, sampler=sampler, drop_last=True))
    accumulation, losses, times, comm = engine.gradient_accumulation_steps(), [], [], deepspeed.comm.comm
    for step in range(1, args.steps + 1):
        comm.configure(enabled=step == 2)  # one step is counted: counting slows each message down
        at_boundary = set(live_tensors(engine.device)) if step == 3 else None
        get_accelerator().synchronize()
        start, local_loss = time.perf_counter(), 0.0
        for micro_step in range(accumulation):
            batch = to_device(next(batches), engine.device)
            loss = engine(**batch).loss
            engine.backward(loss)
            local_loss += loss.detach() / accumulation
            del batch, loss  # or they would count as held
            if step == 3 and micro_step == 0:
                held = gradients_held(engine, at_boundary)
            engine.step()
        get_accelerator().synchronize()
        times.append(time.perf_counter() - start)
        losses.append(over_ranks(float(local_loss), engine.device))
        if step == 2:
            sent = sent_bytes(engine.dp_world_size)
            comm.comms_logger.comms_dict.clear()
    tokens = engine.train_batch_size() * blocks.block_size
    tokens_per_s = tokens / over_ranks(median(times[3:]), engine.device, "max")
    gradients, buckets = (over_ranks(held[kind], engine.device, "max") for kind in ("other", "buckets"))
    engine.destroy()
    return {
        "stage": engine.zero_optimization_stage(), "accumulation": accumulation, "gradient_bytes": gradients,
        "bucket_bytes": buckets, "sent_bytes": sent, "tokens_per_s": tokens_per_s, "losses": losses,
    }  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.steps < 4:
        raise UserError(f"--steps {args.steps}: at least 4, as the first three warm up, count bytes and are not timed")
    require_launcher()
    start_without_compiler()
    deepspeed.init_distributed()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    table = []
    print0(
        f"{'config':20} {'micro-batches':>13} {'gradients B':>12} {'buckets B':>11} {'sent a step B':>14} {'tok/s':>8}"
    )
    for accumulation in args.accumulations:
        for path in args.configs:
            config = json.loads(Path(path).read_text())
            config |= {"train_micro_batch_size_per_gpu": args.micro_batch, "gradient_accumulation_steps": accumulation}
            row = {"config": Path(path).stem, **measure(config, blocks, len(tokenizer), args)}
            table.append(row)
            numbers = f"{row['gradient_bytes']:12,.0f} {row['bucket_bytes']:11,.0f} {row['sent_bytes']:14,.0f}"
            print0(f"{row['config']:20} {accumulation:13} {numbers} {row['tokens_per_s']:8.0f}")

    if dist.get_rank() == 0:
        num_params = sum(p.numel() for p in build_model(args.model, len(tokenizer)).parameters())
        write_results(Path(args.run_dir) / "compare.json", this_command(), num_params=num_params, table=table)
        labels = {f"{row['config']}, {row['accumulation']} micro": row for row in table}
        title = f"{args.model}, {dist.get_world_size()} ranks"
        for kind, unit in {"gradient_bytes": "MB of gradients a rank", "sent_bytes": "MB sent a rank and step"}.items():
            path = Path(args.run_dir) / f"{kind}.png"
            plot_bars({name: row[kind] / 1e6 for name, row in labels.items()}, path, title, unit)
        print0(f"table: {show_path(args.run_dir)}/compare.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
