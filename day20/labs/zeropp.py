"""Day 20: zeropp - ZeRO-3 with quantised weights and gradients: tokens/s, bytes, and the loss beside them. For GPUs.

From the repository root, on two GPUs; then over sockets in place of NVLink, as if they were in two machines:

    deepspeed --num_accelerators 2 day20/labs/zeropp.py
    deepspeed --num_accelerators 2 day20/labs/zeropp.py --sockets --steps 12

Expect a row for each case. Each GPU is taken for a host of its own, for within one host 0.19.8 leaves quantised
gradients out and does not say so. Their kernels read fp16 whatever they are given: qgz sends bf16, qgz_fp16 fp16.
DeepSpeed compiles the kernels on first use, about a minute. On CPUs zero3 alone runs.
Checked with deepspeed 0.19.8. Source: Wang et al. 2023 (ZeRO++), arXiv:2306.10209; deepspeed/runtime/zero/stage3.py
and deepspeed/runtime/comm/coalesced_collectives.py.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.timing import slowest_median, time_step
from bench.traffic import count_traffic, ring_share
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks
from common.run_log import default_run_dir
from day20.bandwidth import SOCKETS, bus_share, make_collective

FP16 = {"communication_data_type": "fp16"}
# case: (zero_optimization, what else)
CASES = {
    "zero3": ({}, {}),
    "qwz": ({"zero_quantized_weights": True}, {}),
    "qgz_fp16": ({"zero_quantized_gradients": True}, FP16),
    "both_fp16": ({"zero_quantized_weights": True, "zero_quantized_gradients": True}, FP16),
    "qgz": ({"zero_quantized_gradients": True}, {}),
}
COUNTED = 2  # the step whose messages are counted, and which is not timed
COLUMNS = {"tok/s": "tokens_per_s:,.0f", "ms": "ms:.1f", "sent MB": "sent_bytes:MB", "last loss": "last_loss:.4f"}
ALL_TO_ALL = 0.5  # of those logged: the first of qgZ's two all-to-alls stays within the host, which is one GPU here


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES], help="what to train, one by one")
    parser.add_argument("--sockets", action="store_true", help="NCCL over sockets: as between machines without RDMA")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (not micro-batches)")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences per rank and micro-batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day20"), help="folder for zeropp.json")
    parser.add_argument("--model", default="gpt2", help="preset of common/model.py")
    parser.add_argument("--corpus", default="moby_dick", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def sent_bytes(calls: dict[str, dict[int, int]]) -> float:
    """Bytes that this rank sent to the other ones, by the ring algorithms, from DeepSpeed's log."""
    ranks, total = dist.get_world_size(), 0.0
    for operation, sizes in calls.items():
        if operation == "all_to_all_single":
            share = bus_share("all_to_all", ranks) * ALL_TO_ALL
        else:
            share = ring_share(operation, ranks)
        total += share * sum(size * count for size, count in sizes.items())
    return total


def train_step(engine: deepspeed.DeepSpeedEngine, batch: dict) -> torch.Tensor:
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def measure(case: str, blocks, vocab_size: int, args: argparse.Namespace, device: torch.device) -> dict:
    """Train `args.steps` steps from the same weights on the same batches."""
    zero, more = CASES[case]
    config = {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "overlap_comm": True, **zero},
        **more,
    }
    torch.manual_seed(args.seed)
    with device:
        model = build_model(args.model, vocab_size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    sampler = DistributedSampler(blocks, seed=args.seed)  # each rank its own blocks
    batches = endless_batches(DataLoader(blocks, args.micro_batch, sampler=sampler, drop_last=True))
    row, seconds, losses = {}, [], []
    for step in range(1, args.steps + 1):
        batch = to_device(next(batches), device)
        with count_traffic(enabled=step == COUNTED) as traffic:
            spent, loss = time_step(partial(train_step, engine, batch))
        seconds.append(spent)
        losses.append(over_ranks(loss.item(), device))
        if step == COUNTED:
            row["sent_bytes"], row["calls"] = sent_bytes(traffic.calls), traffic.calls
    median = slowest_median(seconds, device, warm_up=COUNTED + 1)
    row |= {"ms": 1e3 * median, "tokens_per_s": args.micro_batch * blocks.block_size * dist.get_world_size() / median}
    engine.destroy()
    return row | {"last_loss": losses[-1], "losses": losses}


def main() -> None:
    args = parse_args()
    if args.steps < COUNTED + 2:
        raise UserError(f"--steps {args.steps}: at least {COUNTED + 2}, as the first warm up and are counted")
    if args.sockets:
        os.environ |= SOCKETS
    device = join_world()
    cases = args.cases if device.type != "cpu" else [case for case in args.cases if case == "zero3"]
    if not cases:
        raise UserError(f"--cases {' '.join(args.cases)}: quantisation has kernels for GPUs alone; zero3 runs on CPUs")
    get_accelerator().device_count = lambda: 1  # from now on DeepSpeed takes each GPU for a host of its own
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    vocab_size = -(-len(tokenizer) // 128) * 128  # qgZ cuts each matrix into equal parts
    size = 2**26
    call = make_collective("all_gather", size, device)
    seconds = [time_step(call)[0] for _ in range(5)]
    busbw = bus_share("all_gather", dist.get_world_size()) * size / slowest_median(seconds, device, warm_up=2)
    table = Table(Path(args.run_dir) / "zeropp.json", COLUMNS, width=14, all_gather_busbw=busbw / 1e9)
    del call
    for case in cases:
        kept = live_tensors(device)
        with table.row(case) as row:
            row |= measure(case, blocks, vocab_size, args, device)
        free(device, kept)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
