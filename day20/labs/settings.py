"""Day 20: settings - DeepSpeed's choices of communication: bytes out of a host per step, messages, seconds, loss.

From the repository root, on four CPU processes or GPUs; as root on two hosts that a link of known speed joins:

    deepspeed --num_accelerators 4 day20/labs/settings.py
    python day20/labs/on_link.py "day20/labs/settings.py" --placements AABB

Expect a row for each setting: on a link, the bytes that left the first host in a step, divided by the parameters'
bytes, and what the formula says for hosts of equal size, ranks in order. The losses of rows agree, as every setting
averages the same gradients; communication_data_type rounds them. The model is a stack of linear layers, each used
once, so that each parameter is gathered once a pass. On CPUs, times are those of the link; nothing overlaps.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/docs/config-json/; Wang et al. 2023, arXiv:2306.10209.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.link import INTERFACE, sent_over_link
from bench.table import Table
from bench.timing import slowest_median, time_step
from bench.traffic import count_traffic
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import over_ranks
from common.run_log import default_run_dir

HIDDEN, LAYERS, ROWS = 512, 6, 8  # 1.6 million parameters; 8 rows a rank and step
MICRO_BATCHES = 4  # of the two cases that accumulate
ALL = {"overlap_comm": False, "reduce_bucket_size": 500_000}
THREE = ALL | {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
THREE |= {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0}  # each layer freed: a second gather
# case: (zero_optimization, what else, units of (n - 1)/n times the parameters' bytes that a rank sends)
SETTINGS = {
    "zero0": (ALL | {"stage": 0}, {}, 2),
    "zero0_bf16": (ALL | {"stage": 0}, {"communication_data_type": "bf16"}, 1),
    "zero1": (ALL | {"stage": 1}, {}, 3),
    "zero2": (ALL | {"stage": 2}, {}, 3),
    "zero2_overlap": (ALL | {"stage": 2, "overlap_comm": True}, {}, 3),
    "zero2_buckets": (ALL | {"stage": 2, "reduce_bucket_size": 5_000}, {}, 3),
    "zero2_owners": (ALL | {"stage": 2, "use_multi_rank_bucket_allreduce": False}, {}, None),
    "zero2_bf16": (ALL | {"stage": 2}, {"communication_data_type": "bf16"}, 2),
    "zero2_4micro": (ALL | {"stage": 2}, {"gradient_accumulation_steps": MICRO_BATCHES}, 9),
    "zero2_coalesced": (ALL | {"stage": 2}, {}, 3),  # as many micro-batches, averaged together at the end
    "zero3": (THREE, {}, 4),  # two gathers, and a reduce-scatter that costs 2 on gloo, 1 on NCCL
    "zero3_hpz": (THREE | {"zero_hpz_partition_size": 2}, {}, 3),  # last: its groups stay for the whole process
}
COLUMNS = {
    "left host": "left:.3f", "formula": "formula:.2f", "messages": "messages:d", "ms": "ms:.0f", "loss": "loss:.6f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], help="cases, by the names in this script")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day20"), help="folder for settings.json")
    return parser.parse_args()


def build(case: str, seed: int) -> deepspeed.DeepSpeedEngine:
    zero, more, _ = SETTINGS[case]
    accumulation = more.get("gradient_accumulation_steps", 1)
    config = {
        "train_micro_batch_size_per_gpu": ROWS // accumulation,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": zero,
        **more,
    }
    torch.manual_seed(seed)
    layers = [layer for _ in range(LAYERS) for layer in (torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU())][:-1]
    model = torch.nn.Sequential(*layers)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def train_step(engine: deepspeed.DeepSpeedEngine, rows: torch.Tensor, coalesced: bool) -> float:
    """One optimizer step on this rank's rows, in as many micro-batches as the case has; their mean loss."""
    micro_batches = rows.chunk(MICRO_BATCHES if coalesced else engine.gradient_accumulation_steps())
    losses = [0.0]
    with engine.coalesce_grad_reduction() if coalesced else nullcontext():
        for inputs in micro_batches:
            loss = (engine(inputs) - inputs.sin()).square().mean()
            engine.backward(loss / MICRO_BATCHES if coalesced else loss)  # else the engine divides
            losses.append(loss.item() / len(micro_batches))
            if not coalesced:
                engine.step()
    if coalesced:
        engine.step()
    return sum(losses)


def measure(case: str, args: argparse.Namespace, device: torch.device, on_link: bool) -> dict:
    """Train: bytes of one step (the second), messages of another (the third), the time of the rest."""
    engine = build(case, args.seed)
    psi_bytes = 4 * LAYERS * (HIDDEN * HIDDEN + HIDDEN)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    step = partial(train_step, engine, rows, case == "zero2_coalesced")
    step()
    dist.barrier()
    before = sent_over_link() if on_link else 0
    dist.barrier()
    step()
    dist.barrier()
    left = (sent_over_link() - before) / psi_bytes if on_link else None
    with count_traffic() as traffic:
        step()
    timed = []
    for _ in range(args.steps - 3):
        dist.barrier()
        timed.append(time_step(step))
    row = {"left": left, "messages": sum(n for sizes in traffic.calls.values() for n in sizes.values())}
    row["ms"] = 1e3 * slowest_median([seconds for seconds, _ in timed], device)
    row["loss"] = over_ranks(timed[-1][1], device)
    units = SETTINGS[case][2]  # one rank of a host has its right neighbour in the ring elsewhere: its bytes are counted
    row["formula"] = units and units * (ranks - 1) / ranks
    engine.destroy()
    return row


def main() -> None:
    args = parse_args()
    if unknown := [name for name in args.settings if name not in SETTINGS]:
        raise UserError(f"--settings {unknown[0]}: there are {', '.join(SETTINGS)}")
    if args.steps < 4:
        raise UserError(f"--steps {args.steps}: at least 4, as the first three warm up and are counted")
    device = join_world()
    if "zero3_hpz" in args.settings and dist.get_world_size() % 2:
        raise UserError(f"zero3_hpz pairs ranks up, and {dist.get_world_size()} is odd: leave it out of --settings")
    on_link = os.environ.get("GLOO_SOCKET_IFNAME") == INTERFACE
    table = Table(Path(args.run_dir) / "settings.json", COLUMNS, width=18)
    for case in sorted(args.settings, key=list(SETTINGS).index):
        with table.row(case) as row:
            row |= measure(case, args, device, on_link)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
