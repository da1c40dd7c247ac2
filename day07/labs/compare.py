"""Day 07: the three stages side by side - and DDP, FSDP2 and offload: bytes by kind against the plan, sent, speed.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day07/labs/compare.py
    deepspeed --num_accelerators 2 day07/labs/compare.py --cases ddp zero2 zero3 --model mini --global_batch 4
    deepspeed --num_accelerators 4 day07/labs/compare.py --model gpt2-xl --global_batch 32 --bf16 --recompute

Expect a table, and compare.json, memory.png and speed.png in the run folder. All cases train in one process group, one
after the other, with the same first weights and the same batches, so that their losses must agree.
Checked with deepspeed 0.19.8. Source: arXiv:1910.02054, section 5 and figure 1; config/plan.py has the arithmetic.
"""

import argparse
import gc
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import bucket_tensors, bytes_by_kind, live_tensors, settled_tensors
from bench.memory import free, peak_bytes
from bench.table import Table
from bench.timing import slowest_median, time_step
from bench.traffic import count_traffic
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.plan import DTYPE_BYTES, model_state_bytes
from config.read import read_config
from day07.loops import build_ddp, build_deepspeed, build_fsdp2

CONFIGS = {
    "zero0": "ds_config_zero0.json", "zero1": "ds_config_zero1.json", "zero2": "ds_config_zero2.json",
    "zero3": "ds_config.json", "zero3_leaf": "ds_config_leaf.json", "zero3_tight": "ds_config_tight.json",
    "zero2_offload": "ds_config_zero2_offload.json", "offload_optimizer": "ds_config_offload_optimizer.json",
    "offload": "ds_config_offload.json",
}  # fmt: skip
BASELINES = {"ddp": build_ddp, "fsdp2": build_fsdp2}
CASES = [*BASELINES, *CONFIGS]
COLUMNS = {
    "param.": "held_bytes.parameters:MB", "grad.": "held_bytes.gradients:MB", "optim.": "held_bytes.optimizer:MB",
    "buckets": "held_bytes.buckets:MB", "other": "held_bytes.other:MB", "held": "total_bytes:MB",
    "plan": "held_of_plan:.3f", "sent": "sent_bytes:MB", "peak": "peak_bytes:MB", "tok/s": "tokens_per_s:.0f",
    "diff": "difference:.0e",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = f"what to train, in this order: {', '.join(CASES)}, or the path of a DeepSpeed JSON"
    parser.add_argument("--cases", nargs="+", default=CASES, help=cases)
    parser.add_argument("--global_batch", type=int, default=16, help="sequences an optimizer step, all ranks together")
    parser.add_argument("--bf16", action="store_true", help="bf16 (from ZeRO-1 on) instead of fp32")
    parser.add_argument(
        "--cpu_adam",
        action="store_true",
        help="offload with DeepSpeedCPUAdam, which a compiler builds on first use, not PyTorch's AdamW",
    )
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing, switched on in the model")
    parser.add_argument(
        "--buckets",
        type=int,
        help="elements of the buckets, for large models; small weights then stay whole as by default",
    )
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate; a bold one magnifies rounding: day 02")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day07"), help="folder for compare.json and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    if args.steps < 6:
        raise UserError(f"--steps {args.steps}: at least 6, as the first five warm up, count bytes and are not timed")
    if unknown := [case for case in args.cases if case not in CASES and not case.endswith(".json")]:
        raise UserError(f"--cases {unknown[0]}: none of {', '.join(CASES)}, and no path of a DeepSpeed JSON")


def case_config(case: str, args: argparse.Namespace) -> dict:
    """The config of a case, with the batch, learning rate, precision and buckets of the command line."""
    path = HERE / CONFIGS[case] if case in CONFIGS else Path(case)
    config = read_config(path)
    if missing := {"optimizer", "zero_optimization"} - set(config):
        raise UserError(f"{path} has no {' and no '.join(sorted(missing))}: both are needed to compare it")
    config["train_micro_batch_size_per_gpu"] = args.global_batch // dist.get_world_size()
    config["optimizer"]["params"]["lr"] = args.lr
    config["optimizer"]["params"]["fused"] = True  # PyTorch's one-kernel AdamW, as in the baselines: nothing to compile
    zero = config["zero_optimization"]
    if args.cpu_adam and "offload_optimizer" in zero:  # what DeepSpeed takes when the JSON asks for nothing else
        config.pop("zero_force_ds_cpu_optimizer", None)
        for key in ("torch_adam", "fused"):
            config["optimizer"]["params"].pop(key, None)
    if args.bf16 and zero["stage"]:
        config["bf16"] = {"enabled": True}
    elif args.bf16:  # bf16 without ZeRO makes its first ten steps too short (0.19.8): autocast over fp32, as DDP does
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}  # without a dtype it is float16 on GPUs
    if args.buckets:
        buckets = {"reduce_bucket_size", "stage3_prefetch_bucket_size"} & set(zero)
        zero.update(dict.fromkeys(buckets, args.buckets))
        zero.pop("stage3_param_persistence_threshold", None)
    return config


def held_by_kind(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, zero, device: torch.device
) -> dict[str, int]:
    """Bytes that this rank holds between two steps. `zero`: DeepSpeed's wrapper, None for a baseline."""
    return bytes_by_kind(
        settled_tensors(device).values(),
        parameters=[part for p in model.parameters() for part in (p, getattr(p, "ds_tensor", p))],
        optimizer=[t for w, state in optimizer.state.items() for t in (w, *state.values()) if torch.is_tensor(t)],
        gradients=[t for t in [getattr(zero, "grad_partitions_flat_buffer", None)] if t is not None],
        buckets=bucket_tensors(zero),
    )


def planned_bytes(config: dict, sizes: list[int], device: torch.device) -> float:
    """What config/plan.py says this rank holds between two steps: before stage 3 no gradient outlives the step."""
    zero, precision = config["zero_optimization"], "bf16" if "bf16" in config else "fp32"
    width = DTYPE_BYTES[precision]
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    states = model_state_bytes(
        sum(sizes), dist.get_world_size(), zero["stage"], precision,
        persistent=sum(size for size in sizes if size <= threshold),
        offload_optimizer=zero.get("offload_optimizer", {}).get("device"),
        offload_param=zero.get("offload_param", {}).get("device"),
    )  # fmt: skip
    planned, host = states["total"] - (states["gradients"] if zero["stage"] < 3 else 0), states["host"]
    if zero["stage"] == 3:
        planned += zero.get("reduce_bucket_size", 500_000_000) * width
    elif "offload_optimizer" in zero:  # a work buffer for a gradient here and one there; without accumulation no others
        planned += width * max(sizes)
        host += width * (max(sizes) - sum(sizes) / dist.get_world_size())
    return planned + (host if device.type == "cpu" else 0)  # on CPU ranks the host is where the rank is


def measure(case: str, blocks, vocab_size: int, args: argparse.Namespace, device: torch.device) -> dict:
    """Train one case: losses, tokens/s (median step after the first five), and bytes on this rank."""
    get_accelerator().reset_peak_memory_stats()
    torch.manual_seed(args.seed)
    with device:
        model = build_model(args.model, vocab_size)
    if args.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sizes = [parameter.numel() for parameter in model.parameters()]
    if case in BASELINES:
        (train_step, optimizer), engine = BASELINES[case](model, args.lr, args.bf16), None
    else:
        config = case_config(case, args)
        train_step, engine = build_deepspeed(model, config)
        optimizer = engine.basic_optimizer
    sampler = DistributedSampler(blocks, seed=args.seed)  # each rank its own blocks
    batches = endless_batches(DataLoader(blocks, args.global_batch // dist.get_world_size(), sampler=sampler))
    losses, seconds = [], []
    for step in range(args.steps):
        batch = to_device(next(batches), device)
        with count_traffic(step == 3) as traffic:  # one step is counted: counting slows each message down
            step_s, loss = time_step(partial(train_step, batch))
        if step == 3:
            sent = traffic.sent_bytes()
        seconds.append(step_s)
        losses.append(over_ranks(loss.item(), device))
    del batch, loss
    on_gpu, allocated = device.type != "cpu", get_accelerator().memory_allocated()
    held = held_by_kind(model, optimizer, engine and engine.optimizer, device)
    row = {"held_bytes": held, "total_bytes": over_ranks(sum(held.values()), device, "max")}
    row |= {"planned_bytes": None, "sent_bytes": None}  # the plan and DeepSpeed's log know nothing of the baselines
    if engine:
        row |= {"planned_bytes": planned_bytes(config, sizes, device), "sent_bytes": sent}
        row |= {"held_of_plan": row["total_bytes"] / row["planned_bytes"], "stage": engine.zero_optimization_stage()}
        engine.destroy()
    row["allocated_bytes"] = over_ranks(allocated, device, "max") if on_gpu else None
    row["peak_bytes"] = over_ranks(peak_bytes(device), device, "max") if on_gpu else None
    step_s = slowest_median(seconds, device, warm_up=5)
    return row | {"tokens_per_s": args.global_batch * blocks.block_size / step_s, "losses": losses}


def main() -> None:
    args = parse_args()
    check_args(args)
    device = join_world()
    num_ranks = dist.get_world_size()
    if args.global_batch % num_ranks:
        raise UserError(f"--global_batch {args.global_batch} does not divide by {num_ranks} ranks")
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    gc.freeze()  # what is here now is no case's: walks over the live tensors no longer see it, and are fast
    print0(
        "MB a rank between steps; plan: held / config/plan.py; sent: MB a rank and step; diff: largest of the losses"
    )
    table = Table(Path(args.run_dir) / "compare.json", COLUMNS, ranks=num_ranks, model=args.model)
    for case in args.cases:
        kept = live_tensors(device)
        with table.row(Path(case).stem) as row:
            row |= measure(case, blocks, len(tokenizer), args, device)
            row["difference"] = table.from_first(row)
        free(device, kept)
    title = f"{args.model}, {num_ranks} ranks"
    table.bars("total_bytes", "MB held between steps", title, name="memory", scale=1e6)
    table.bars("tokens_per_s", "tokens/s", title, name="speed")
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
