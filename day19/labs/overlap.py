"""Day 19: overlap - how much of the all-reduce hides behind the backward pass: read from traces, engine by engine.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day19/labs/overlap.py
    deepspeed --num_accelerators 2 day19/labs/overlap.py --hidden 4096 --tokens 4096 --bucket_mb 25

Expect a row an engine: compute, communication, the share of it that is hidden, what is left open, and the speed against
the first row, by turns and without the profiler. Then overlap.json and a trace for each row and rank.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/zero/stage_1_and_2.py; arXiv:2006.15704 (DDP), section 3.2
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import ratio, take_turns
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir
from day19.traces import record_steps, shared_folder, summarize

COLUMNS = {
    "step ms": "step_ms:.1f", "compute": "compute_ms:.1f", "comm": "comm_ms:.1f", "hidden": "hidden:.0%",
    "open": "exposed_ms:.1f", "messages": "messages:.0f", "speed": "speed:.2f",
}  # fmt: skip
CASES = {  # ZeRO's keys, where DeepSpeed trains
    "naive": None,
    "ddp": None,
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero1_overlap": {"stage": 1, "overlap_comm": True},
    "zero2_overlap": {"stage": 2, "overlap_comm": True},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="engines, in this order")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model's square layers")
    parser.add_argument("--layers", type=int, default=8, help="number of them")
    parser.add_argument("--tokens", type=int, default=512, help="rows of a rank's batch")
    parser.add_argument("--bucket_mb", type=float, default=1.0, help="MB of gradients in a message")
    parser.add_argument("--turns", type=int, default=6, help="windows of 3 steps that each case takes, by turns")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day19"), help="folder for overlap.json and the traces")
    return parser.parse_args()


def build(case: str, args: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    """Return a training step of the case, all on the same layers and data."""
    torch.manual_seed(args.seed)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    layers = [part for _ in range(args.layers) for part in (torch.nn.Linear(args.hidden, args.hidden), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers).to(device, dtype)
    x = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    if CASES[case] is not None:
        zero = CASES[case] | {"reduce_bucket_size": int(args.bucket_mb * 1e6 / dtype.itemsize)}
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": zero}
        config |= {"zero_allow_untested_optimizer": True, "bf16": {"enabled": dtype == torch.bfloat16}}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

        def train_step() -> None:
            engine.backward(engine(x).float().square().mean())
            engine.step()

        return train_step
    module = DistributedDataParallel(model, bucket_cap_mb=args.bucket_mb) if case == "ddp" else model

    def train_step() -> None:
        module(x).float().square().mean().backward()
        if case == "naive":  # as one writes it first: when all gradients are there
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, op=dist.ReduceOp.SUM)
                parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()

    return train_step


def main() -> None:
    args = parse_args()
    if min(args.hidden, args.layers, args.tokens) < 1 or args.bucket_mb <= 0 or args.turns < 2:
        sizes = f"--hidden {args.hidden} --layers {args.layers} --tokens {args.tokens}"
        raise UserError(
            f"{sizes} --bucket_mb {args.bucket_mb:g} --turns {args.turns}: sizes are positive, turns 2 or more"
        )
    device = join_world()
    run_dir = shared_folder(args.run_dir)
    steps = {case: build(case, args, device) for case in args.cases}
    runs = take_turns({case: lambda step=step: [step() for _ in range(3)] for case, step in steps.items()}, args.turns)
    gradient_mb = 4 * args.layers * (args.hidden**2 + args.hidden) / 1e6 / (1 if device.type == "cpu" else 2)
    table = Table(run_dir / "overlap.json", COLUMNS, ranks=dist.get_world_size(), gradient_mb=gradient_mb)
    for case in args.cases:
        with table.row(case) as row:
            trace = record_steps(steps[case], run_dir / f"overlap_{case}_rank{dist.get_rank()}.json.gz")
            row |= summarize(trace) | {"speed": ratio(runs[args.cases[0]], runs[case])}
    table.bars("hidden", "share of communication hidden", f"{dist.get_world_size()} ranks", name="hidden")
    table.close()
    steps.clear()  # DDP before the group: as its last holder it can deadlock on gloo (torch 2.13)
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
