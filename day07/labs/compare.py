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
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import bucket_tensors, bytes_by_kind, live_tensors
from common.cpu import start_without_compiler
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.plots import plot_bars
from common.ranks import over_ranks, print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path
from config.plan import DTYPE_BYTES, model_state_bytes
from day07.loops import build_ddp, build_deepspeed, build_fsdp2

CONFIGS = {
    "zero0": "ds_config_zero0.json", "zero1": "ds_config_zero1.json", "zero2": "ds_config_zero2.json",
    "zero3": "ds_config.json", "zero3_leaf": "ds_config_leaf.json", "zero3_tight": "ds_config_tight.json",
    "zero2_offload": "ds_config_zero2_offload.json", "offload_optimizer": "ds_config_offload_optimizer.json",
    "offload": "ds_config_offload.json",
}  # fmt: skip
BASELINES = {"ddp": build_ddp, "fsdp2": build_fsdp2}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [*BASELINES, *CONFIGS]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, help="what to train, in this order")
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
    parser.add_argument("--run_dir", default=default_run_dir("day07"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def read_config(case: str, args: argparse.Namespace) -> dict:
    """The config of a case, with the batch, learning rate, precision and buckets of the command line."""
    config = json.loads((HERE / CONFIGS[case]).read_text())
    config["train_micro_batch_size_per_gpu"] = args.global_batch // dist.get_world_size()
    config["optimizer"]["params"]["lr"] = args.lr
    config["optimizer"]["params"]["fused"] = True  # PyTorch's one-kernel AdamW, as in the baselines: nothing to compile
    zero = config["zero_optimization"]
    if args.cpu_adam and "offload_optimizer" in zero:  # what DeepSpeed takes when the JSON asks for nothing else
        del config["zero_force_ds_cpu_optimizer"]
        for key in ("torch_adam", "fused"):
            del config["optimizer"]["params"][key]
    if args.bf16 and zero["stage"]:
        config["bf16"] = {"enabled": True}
    elif args.bf16:  # bf16 without ZeRO starts wrongly in 0.19.8 (day 03): autocast over fp32 weights, as DDP does
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
        live_tensors(device).values(),
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
        planned += zero["reduce_bucket_size"] * width
    elif "offload_optimizer" in zero:  # a work buffer for a gradient here and one there; without accumulation no others
        planned += width * max(sizes)
        host += width * (max(sizes) - sum(sizes) / dist.get_world_size())
    return planned + (host if device.type == "cpu" else 0)  # on CPU ranks the host is where the rank is


def sent_bytes(num_ranks: int) -> float:
    """Bytes that this rank sent in the counted step, by the ring algorithms: day 06 explains the factors."""
    log, n = comm.comms_logger.comms_dict, num_ranks
    factor = {"all_reduce": 2 * (n - 1) / n, "reduce_scatter_tensor": (n - 1) / n, "all_gather_into_tensor": n - 1}
    factor["broadcast"] = 0  # stage 3 compares the ranks' order of use in its first steps: a few bytes
    return sum(factor[op] * size * entry[0] for op, sizes in log.items() for size, entry in sizes.items())


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
        config = read_config(case, args)
        train_step, engine = build_deepspeed(model, config)
        optimizer = engine.basic_optimizer
    sampler = DistributedSampler(blocks, seed=args.seed)  # each rank its own blocks
    batches = endless_batches(DataLoader(blocks, args.global_batch // dist.get_world_size(), sampler=sampler))
    losses, times = [], []
    for step in range(args.steps):
        comm.configure(enabled=step == 3)  # one step is counted: counting slows each message down
        batch = to_device(next(batches), device)
        get_accelerator().synchronize()
        start = time.perf_counter()
        loss = train_step(batch)
        get_accelerator().synchronize()
        times.append(time.perf_counter() - start)
        losses.append(over_ranks(loss.item(), device))
        if step == 3 and engine:
            sent = sent_bytes(dist.get_world_size())
    comm.comms_logger.comms_dict.clear()
    del batch, loss
    allocated = get_accelerator().memory_allocated()
    held = held_by_kind(model, optimizer, engine and engine.optimizer, device)
    on_gpu, gpu = device.type != "cpu", get_accelerator()
    step_s = over_ranks(median(times[5:]), device, "max")
    row = {"case": case, "held_bytes": held, "total_bytes": over_ranks(sum(held.values()), device, "max")}
    row |= {"planned_bytes": None, "sent_bytes": None}  # the plan and DeepSpeed's log know nothing of the baselines
    if engine:
        row |= {"planned_bytes": planned_bytes(config, sizes, device), "sent_bytes": sent}
        row["stage"] = engine.zero_optimization_stage()
        engine.destroy()
    row["allocated_bytes"] = over_ranks(allocated, device, "max") if on_gpu else None
    row["peak_bytes"] = over_ranks(gpu.max_memory_allocated(), device, "max") if on_gpu else None
    row |= {"tokens_per_s": args.global_batch * blocks.block_size / step_s, "losses": losses}
    return row


def free(device: torch.device) -> None:
    """Empty what a case made: `engine.destroy()` leaves the tensors of stage 3 alive (0.19.8)."""
    for tensor in live_tensors(device).values():
        if tensor.untyped_storage().resizable():
            tensor.untyped_storage().resize_(0)
    get_accelerator().empty_cache()


def as_line(row: dict, first: dict) -> str:
    """A row of the table, for the terminal."""
    if "error" in row:
        return f"{row['case']:18}{row['error']:>9}"
    held, mega = row["held_bytes"], lambda count: "-" if count is None else f"{count / 1e6:.2f}"
    cells = [mega(held[kind]) for kind in ("parameters", "gradients", "optimizer", "buckets", "other")]
    plan = f"{row['total_bytes'] / row['planned_bytes']:.3f}" if row["planned_bytes"] else "-"
    cells += [mega(row["total_bytes"]), plan, mega(row["sent_bytes"]), mega(row["peak_bytes"])]
    difference = max(abs(a - b) for a, b in zip(row["losses"], first.get("losses", row["losses"]), strict=True))
    return f"{row['case']:18}" + "".join(
        f"{cell:>9}" for cell in [*cells, f"{row['tokens_per_s']:.0f}", f"{difference:.0e}"]
    )


def main() -> None:
    args = parse_args()
    if args.steps < 6:
        raise UserError(f"--steps {args.steps}: at least 6, as the first five warm up, count bytes and are not timed")
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    num_ranks, device = dist.get_world_size(), torch.device(get_accelerator().current_device_name())
    if args.global_batch % num_ranks:
        raise UserError(f"--global_batch {args.global_batch} does not divide by {num_ranks} ranks")
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    gc.freeze()  # what is here now is no case's: walks over the live tensors no longer see it, and are fast
    table = []
    print0(
        "MB a rank between steps; plan: held / config/plan.py; sent: MB a rank and step; diff: largest of the losses"
    )
    heads = ["param.", "grad.", "optim.", "buckets", "other", "held", "plan", "sent", "peak", "tok/s", "diff"]
    print0(f"{'case':18}" + "".join(f"{head:>9}" for head in heads))
    for case in args.cases:
        try:
            row = measure(case, blocks, len(tokenizer), args, device)
        except torch.OutOfMemoryError:
            row = {"case": case, "error": "out of memory"}
        free(device)
        table.append(row)
        print0(as_line(row, next((other for other in table if "losses" in other), row)))
        if dist.get_rank() == 0:  # after each case, so that an interrupted run leaves what it has
            path = Path(args.run_dir) / "compare.json"
            write_results(path, this_command(), ranks=num_ranks, model=args.model, table=table)

    if dist.get_rank() == 0:
        trained = [row for row in table if "error" not in row]
        held = {row["case"]: row["total_bytes"] / 1e6 for row in trained}
        plot_bars(held, Path(args.run_dir) / "memory.png", f"{args.model}, {num_ranks} ranks", "MB held between steps")
        speed = {row["case"]: row["tokens_per_s"] for row in trained}
        plot_bars(speed, Path(args.run_dir) / "speed.png", f"{args.model}, {num_ranks} ranks", "tokens/s")
        print0(f"table: {show_path(args.run_dir)}/compare.json | plots: memory.png, speed.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
