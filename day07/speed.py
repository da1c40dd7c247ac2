"""Day 07: from 0.5x to 1x - ZeRO-3 beside FSDP2 on the same batches, change by change, and where a step's time goes.

From the repository root, on GPUs (on two CPU processes it runs as well, and its figures mean nothing):

    deepspeed --num_accelerators 2 day07/speed.py --model gpt2-xl
    deepspeed --num_accelerators 2 day07/speed.py --cases fsdp2 defaults leaf --steps 8 --micro_batch 2

Expect a table: tokens/s a rank, ratio to FSDP2, peak memory, loss; for some cases, the time of one step by what it went
into. Each rung keeps the changes of the rung it names.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/zero/parameter_offload.py, partitioned_param_coordinator.py.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from baseline_fsdp2 import build_fsdp2
from compare import build_deepspeed, free
from deepspeed.accelerator import get_accelerator
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # Python puts only this folder on the path; common/ is one level up

from common.cpu import start_without_compiler
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import clear_errors
from common.model import build_model, get_preset
from common.plots import plot_bars
from common.ranks import over_ranks, print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path

LEAF = {"leaf_module": {"classes": ["transformers.models.gpt2.modeling_gpt2.GPT2Block"]}}
LIVE = {"stage3_max_live_parameters": 4_000_000_000, "stage3_max_reuse_distance": 4_000_000_000}
BUCKETS = {"reduce_bucket_size": 100_000_000, "stage3_prefetch_bucket_size": 100_000_000}
# case: (what it starts from, what it changes in zero_optimization, blocks compiled)
RUNGS = {
    "zero2": (None, {"stage": 2, "overlap_comm": True}, False),
    "zero2_compiled": ("zero2", {}, True),
    "defaults": (None, {"stage": 3}, False),
    "leaf": ("defaults", LEAF, False),
    "leaf_copies": ("leaf", {"contiguous_gradients": False}, False),
    "leaf_buckets": ("leaf", BUCKETS, False),
    "leaf_live": ("leaf", LIVE, False),
    "leaf_compiled": ("leaf", {}, True),
    "tuned": ("leaf", {"contiguous_gradients": False, **BUCKETS}, True),
    "tuned_live": ("tuned", LIVE, True),
    "granularity": ("defaults", {"stage3_module_granularity_threshold": 4_000_000, **BUCKETS}, True),
}
BASELINES = ["fsdp2", "fsdp2_compiled"]
HOOKS = [f"{when}_sub_module_{way}_function" for when in ("pre", "post") for way in ("forward", "backward")]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [*BASELINES, *RUNGS]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, help="what to train, in this order")
    parser.add_argument("--profile", nargs="*", choices=cases, default=[], help="cases to look into for one more step")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences a rank and optimizer step")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day07"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def zero_options(case: str) -> dict:
    """The `zero_optimization` of a rung: its own changes over those of the rung it starts from."""
    base, changes, _ = RUNGS[case]
    return (zero_options(base) if base else {}) | changes


def read_config(case: str, micro_batch: int) -> dict:
    """Day 07's config with bf16, and with the `zero_optimization` of `case`: what it does not name has its default."""
    config = json.loads((HERE / "ds_config.json").read_text())
    config |= {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": zero_options(case)}
    config["bf16"] = {"enabled": True}
    config["optimizer"]["params"]["lr"] = 1e-4
    if get_accelerator().device_name() != "cpu":  # FusedAdam, compiled on first use: FSDP2 uses PyTorch's fused AdamW
        del config["optimizer"]["params"]["torch_adam"]
    return config


def time_hooks(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """Count, from now on, the seconds that the host spends in ZeRO-3's hooks and with gradients; waiting included."""
    seconds = {}

    def timed(function, kind):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[kind] = seconds.get(kind, 0.0) + time.perf_counter() - start
            return result

        return wrapper

    for name in HOOKS:
        setattr(
            engine.optimizer.parameter_offload, name, timed(getattr(engine.optimizer.parameter_offload, name), "hooks")
        )
    reduce_one = engine.optimizer.reduce_ready_partitions_and_remove_grads
    engine.optimizer.reduce_ready_partitions_and_remove_grads = timed(reduce_one, "gradients")
    engine.optimizer.step = timed(engine.optimizer.step, "step")
    return seconds


def length(spans: list[tuple[float, float]]) -> float:
    """Length of the union of [start, end] spans."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def look_into_a_step(train_step, batch: dict, path: Path) -> dict[str, float]:
    """Milliseconds of one step on this rank: wall time, and from the trace what GPU and host did of it."""
    with profile(activities=[ProfilerActivity.CUDA] if torch.cuda.is_available() else [ProfilerActivity.CPU]) as trace:
        start = time.perf_counter()
        train_step(batch)
        get_accelerator().synchronize()
        wall = time.perf_counter() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans = {name: [(e["ts"], e["ts"] + e["dur"]) for e in group] for name, group in {
        "gpu_busy": on_gpu, "gpu_computing": [e for e in on_gpu if "nccl" not in e["name"]],
        "host_waiting": [e for e in events if e.get("cat") == "cuda_runtime" and "Synchronize" in e["name"]],
        "host_launching": [e for e in events if e.get("cat") == "cuda_runtime" and "Synchronize" not in e["name"]],
    }.items()}  # fmt: skip
    return (
        {"wall": wall * 1e3} | {name: length(group) / 1e3 for name, group in spans.items()} | {"kernels": len(on_gpu)}
    )


def measure(case: str, blocks, vocab_size: int, args: argparse.Namespace, device: torch.device) -> dict:
    """Train one case; return losses, tokens/s a rank (median step after the first five), peak and held GiB."""
    get_accelerator().reset_peak_memory_stats()
    torch.manual_seed(args.seed)
    with device:
        model = build_model(args.model, vocab_size)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if RUNGS[case][2] if case in RUNGS else case == "fsdp2_compiled":
        torch.compiler.reset()
        for block in model.transformer.h:  # what runs inside the hooks; compiled once, all blocks share the code
            block.forward = torch.compile(block.forward)
    row, seconds = {"case": case}, {}
    if case in RUNGS:
        row["zero_optimization"] = zero_options(case)
        train_step, engine = build_deepspeed(model, read_config(case, args.micro_batch))
    else:
        (train_step, _), engine = build_fsdp2(model, 1e-4, bf16=True), None
    sampler = DistributedSampler(blocks, seed=args.seed)  # each rank its own blocks
    batches = endless_batches(DataLoader(blocks, args.micro_batch, sampler=sampler))
    losses, times = [], []
    for _ in range(args.steps):
        batch = to_device(next(batches), device)
        get_accelerator().synchronize()
        start = time.perf_counter()
        loss = train_step(batch)
        get_accelerator().synchronize()
        times.append(time.perf_counter() - start)
        losses.append(over_ranks(loss.item(), device))
    row |= {"step_ms": over_ranks(median(times[5:]), device, "max") * 1e3, "first_step_s": times[0], "losses": losses}
    row["tokens_per_s"] = args.micro_batch * blocks.block_size / row["step_ms"] * 1e3
    if device.type != "cpu":
        row["held_gib"] = get_accelerator().memory_allocated() / 2**30
        row["peak_gib"] = get_accelerator().max_memory_allocated() / 2**30
    if case in args.profile:
        path = Path(args.run_dir) / f"trace_{case}_rank{dist.get_rank()}.json"
        row["trace_ms"] = look_into_a_step(train_step, batch, path)
        if engine and engine.zero_optimization_stage() == 3:
            seconds = time_hooks(engine)
            start = time.perf_counter()
            train_step(batch)
            get_accelerator().synchronize()
            row["host_ms"] = {kind: value * 1e3 for kind, value in seconds.items()}
            row["host_ms"]["wall"] = (time.perf_counter() - start) * 1e3
    if engine:
        engine.destroy()
    return row


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    deepspeed.init_distributed()
    device = torch.device(get_accelerator().current_device_name())
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    gc.freeze()  # what is here now is no case's: `free` below must not see it
    table = []
    print0(f"{'case':16}{'tok/s/rank':>11}{'x fsdp2':>9}{'held GiB':>9}{'peak GiB':>9}{'last loss':>11}")
    for case in args.cases:
        try:
            row = measure(case, blocks, len(tokenizer), args, device)
        except torch.OutOfMemoryError:
            row = {"case": case, "error": "out of memory"}
        free(device)
        table.append(row)
        if "error" in row:
            print0(f"{case:16}  {row['error']}")
            continue
        row["ratio"] = row["tokens_per_s"] / table[0]["tokens_per_s"]
        memory = "".join(f"{row[kind]:9.2f}" if kind in row else f"{'-':>9}" for kind in ("held_gib", "peak_gib"))
        print0(f"{case:16}{row['tokens_per_s']:11.0f}{row['ratio']:9.3f}{memory}{row['losses'][-1]:11.4f}")
        for kind in ("trace_ms", "host_ms"):
            if kind in row:
                print0(f"    {kind}: {' | '.join(f'{name} {value:.1f}' for name, value in row[kind].items())}")
        if dist.get_rank() == 0:  # after each case, so that an interrupted run leaves what it has
            path = Path(args.run_dir) / "speed.json"
            write_results(path, this_command(), ranks=dist.get_world_size(), model=args.model, table=table)
    if dist.get_rank() == 0:
        speed = {row["case"]: row["tokens_per_s"] for row in table if "error" not in row}
        title = f"{args.model}, {dist.get_world_size()} ranks, {args.micro_batch} sequences a rank"
        plot_bars(speed, Path(args.run_dir) / "speed.png", title, "tokens/s a rank")
        print0(f"table: {show_path(args.run_dir)}/speed.json | plot: speed.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
