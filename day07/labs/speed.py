"""Day 07: from 0.4x to 1x - ZeRO-3 beside FSDP2 on the same batches, change by change, and where a step's time goes.

From the repository root, on GPUs (on two CPU processes it runs as well, and its figures mean nothing):

    deepspeed --num_accelerators 2 day07/labs/speed.py --model gpt2-xl --cases fsdp2 zero2 defaults leaf tuned
    deepspeed --num_accelerators 2 day07/labs/speed.py --cases fsdp2 defaults leaf --steps 8 --micro_batch 2

Expect a table: tokens/s a rank, ratio to the first case, memory, loss; with --profile, where the time of a step went.
All cases are in memory at once (five of GPT-2 XL fit into 80 GB) and take turns.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/zero/parameter_offload.py, partitioned_param_coordinator.py.
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
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.cpu import start_without_compiler
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.plots import plot_bars
from common.ranks import over_ranks, print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path
from day07.loops import build_deepspeed, build_fsdp2

LEAF = {"leaf_module": {"classes": ["transformers.models.gpt2.modeling_gpt2.GPT2Block"]}}
LIVE = {"stage3_max_live_parameters": 4_000_000_000, "stage3_max_reuse_distance": 4_000_000_000}
BUCKETS = {"reduce_bucket_size": 100_000_000, "stage3_prefetch_bucket_size": 100_000_000}
# case: (what it starts from, what it changes in zero_optimization, what it changes in the model)
RUNGS = {
    "fsdp2": (None, None, ()),
    "fsdp2_compiled": (None, None, ("compiled",)),
    "fsdp2_tuned": (None, None, ("compiled", "reentrant")),
    "zero2": (None, {"stage": 2, "overlap_comm": True}, ()),
    "zero2_compiled": ("zero2", {}, ("compiled",)),
    "zero2_tuned": ("zero2", {}, ("compiled", "reentrant")),
    "defaults": (None, {"stage": 3}, ()),
    "leaf": ("defaults", LEAF, ()),
    "leaf_reentrant": ("leaf", {}, ("reentrant",)),
    "leaf_compiled": ("leaf", {}, ("compiled",)),
    "leaf_copies": ("leaf", {"contiguous_gradients": False}, ()),
    "leaf_buckets": ("leaf", BUCKETS, ()),
    "leaf_live": ("leaf", LIVE, ()),
    "tuned": ("leaf", {"contiguous_gradients": False}, ("compiled", "reentrant")),
    "granularity": ("defaults", {"stage3_module_granularity_threshold": 4_000_000}, ()),  # wrong on CUDA: the notes
}
HOOKS = [f"{when}_sub_module_{way}_function" for when in ("pre", "post") for way in ("forward", "backward")]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=RUNGS, default=[*RUNGS][:-1], help="what to train, by turns")
    parser.add_argument("--profile", nargs="*", choices=RUNGS, default=[], help="cases to look into for one more step")
    parser.add_argument("--micro_batch", nargs="+", type=int, default=[8], help="sequences a rank; several: one by one")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps (not micro-batches)")
    parser.add_argument("--window", type=int, default=4, help="steps that a case takes before the next one's turn")
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
    config["optimizer"]["params"]["fused"] = True  # PyTorch's one-kernel AdamW, as in the baseline: nothing to compile
    return config


def host_time(train_step, engine: deepspeed.DeepSpeedEngine, batch: dict) -> dict[str, float]:
    """Milliseconds of one step that the host spends in ZeRO-3's hooks, with gradients and in step(); waits included."""
    seconds = {}

    def timed(function, kind):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[kind] = seconds.get(kind, 0.0) + time.perf_counter() - start
            return result

        return wrapper

    offload = engine.optimizer.parameter_offload
    for name in HOOKS:
        setattr(offload, name, timed(getattr(offload, name), "hooks"))
    reduce_one = engine.optimizer.reduce_ready_partitions_and_remove_grads
    engine.optimizer.reduce_ready_partitions_and_remove_grads = timed(reduce_one, "gradients")
    engine.optimizer.step = timed(engine.optimizer.step, "step")
    start = time.perf_counter()
    train_step(batch)
    get_accelerator().synchronize()
    seconds["wall"] = time.perf_counter() - start
    return {kind: value * 1e3 for kind, value in seconds.items()}


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


def build(case: str, vocab_size: int, args: argparse.Namespace, device: torch.device):
    """Return (train_step(batch) -> loss, engine or None, row with what is known before training)."""
    _, zero, changes = RUNGS[case]
    torch.manual_seed(args.seed)
    with device:
        model = build_model(args.model, vocab_size)
    model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in changes})
    if "compiled" in changes:  # what runs inside the hooks; all blocks share the code
        # By default eight variants of a function for all cases and micro-batches together; later ones would run eager.
        torch._dynamo.config.recompile_limit = 64
        # Nobody changes the modules between two steps: checking that in each call would cost the host time.
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        for block in model.transformer.h:
            block.forward = torch.compile(block.forward, options=options)
    row = {"case": case, "model_changes": sorted(changes)}
    if zero is None:
        return build_fsdp2(model, 1e-4, bf16=True)[0], None, row
    train_step, engine = build_deepspeed(model, read_config(case, args.micro_batch[0]))
    row["zero_optimization"] = zero_options(case)
    if engine.zero_optimization_stage() == 3:  # leaf modules have no hooks inside
        row["num_hooks"] = len(engine.optimizer.parameter_offload.forward_hooks)
    return train_step, engine, row


def take_turn(train_step, batches, row: dict, num_steps: int, device: torch.device) -> None:
    """Train `num_steps`; add losses, milliseconds and memory to `row`, without what the other cases hold meanwhile."""
    gpu = get_accelerator()
    gpu.reset_peak_memory_stats()
    others = gpu.memory_allocated() - row.get("held_bytes", gpu.memory_allocated())
    for _ in range(num_steps):
        batch = to_device(next(batches), device)
        gpu.synchronize()
        start = time.perf_counter()
        loss = train_step(batch)
        gpu.synchronize()
        row["step_ms"].append((time.perf_counter() - start) * 1e3)
        row["losses"].append(over_ranks(loss.item(), device))
    if device.type != "cpu":
        row["held_bytes"] = gpu.memory_allocated() - others
        row["peak_bytes"] = gpu.max_memory_allocated() - others


def main() -> None:
    args = parse_args()
    if args.steps <= args.window:
        raise UserError(f"--steps {args.steps}: more than --window {args.window}, as the first window is not timed")
    if missing := set(args.profile) - set(args.cases):
        raise UserError(f"--profile {' '.join(sorted(missing))}: only a case that is trained; add it to --cases")
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    device = torch.device(get_accelerator().current_device_name())
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    gc.freeze()  # the libraries' million objects: the garbage collector need not look at them in each step
    running, table = {}, []
    for case in args.cases:
        before = get_accelerator().memory_allocated()
        train_step, engine, row = build(case, len(tokenizer), args, device)
        if device.type != "cpu":
            row["held_bytes"] = get_accelerator().memory_allocated() - before
        running[case] = train_step, engine, row

    for micro_batch in args.micro_batch:
        loader = DataLoader(blocks, micro_batch, sampler=DistributedSampler(blocks, seed=args.seed))  # own blocks
        batches = {case: endless_batches(loader) for case in running}
        for _, _, row in running.values():
            row |= {"micro_batch": micro_batch, "losses": [], "step_ms": []}
        for _ in range(0, args.steps, args.window):  # by turns: what else the machine does meets all cases
            for case, (train_step, _, row) in running.items():
                take_turn(train_step, batches[case], row, args.window, device)

        print0(
            f"micro-batch {micro_batch:<4}{'tok/s':>11}{'ratio':>8}{'held GiB':>10}{'peak GiB':>10}{'last loss':>11}"
        )
        for case, (train_step, engine, row) in running.items():
            row["median_ms"] = over_ranks(
                median(row["step_ms"][args.window :]), device, "max"
            )  # the first turn warms up
            row["tokens_per_s"] = micro_batch * blocks.block_size / row["median_ms"] * 1e3
            row["ratio"] = running[args.cases[0]][2]["median_ms"] / row["median_ms"]
            memory = "".join(f"{row.get(kind, 0) / 2**30:10.2f}" for kind in ("held_bytes", "peak_bytes"))
            print0(f"{case:16}{row['tokens_per_s']:11.0f}{row['ratio']:8.3f}{memory}{row['losses'][-1]:11.4f}")
            if case in args.profile and micro_batch == args.micro_batch[0]:
                batch = to_device(next(batches[case]), device)
                path = Path(args.run_dir) / f"trace_{case}_rank{dist.get_rank()}.json"
                row["trace_ms"] = look_into_a_step(train_step, batch, path)
                if engine and engine.zero_optimization_stage() == 3:
                    row["host_ms"] = host_time(train_step, engine, batch)
                for kind in {"trace_ms", "host_ms"} & set(row):
                    print0(f"    {kind}: {' | '.join(f'{name} {value:.1f}' for name, value in row[kind].items())}")
        table += [dict(row) for _, _, row in running.values()]
        if dist.get_rank() == 0:  # after each micro-batch, so that an interrupted run leaves what it has
            path = Path(args.run_dir) / "speed.json"
            write_results(path, this_command(), ranks=dist.get_world_size(), model=args.model, table=table)
    if dist.get_rank() == 0:
        title = f"{args.model}, {dist.get_world_size()} ranks"
        speed = {f"{row['case']}, {row['micro_batch']}": row["tokens_per_s"] for row in table}
        plot_bars(speed, path.with_suffix(".png"), title, "tokens/s a rank")
        print0(f"table: {show_path(path)} | plot: speed.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
