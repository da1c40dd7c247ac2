"""Day 12: one trial - a few training steps under a memory limit, with the cure that the flags name. oom.py runs many.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day12/labs/trial.py
    deepspeed --num_accelerators 2 day12/labs/trial.py --limit_gib 0.2
    deepspeed --num_accelerators 2 day12/labs/trial.py --limit_gib 0.2 --recompute --loss_chunks 8

Expect a line with peak memory, tokens/s and the loss; or the allocator's complaint and exit code 1. On a GPU the limit
is PyTorch's, on CPU the operating system's (RLIMIT_DATA), counted from where this process starts to build its model.
Checked with deepspeed 0.19.8. Source: torch.cuda.set_per_process_memory_fraction; man 2 setrlimit
"""

import argparse
import ctypes
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from statistics import median

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.cpu import start_without_compiler
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.ranks import over_ranks, print0, require_launcher
from day12.gpt import build_gpt

VOCABULARY = {"tiny": 4096, "mini": 4096}  # the others have GPT-2's 50,257 ids
NO_ROOM = re.compile(r"can't allocate memory|out of memory|Cannot allocate memory")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config_fp32.json"), help="DeepSpeed JSON config")
    parser.add_argument("--limit_gib", type=float, help="memory of a rank in GiB (default: all there is)")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences a rank and micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches an optimizer step")
    parser.add_argument("--precision", choices=["fp32", "autocast", "bf16"], default="fp32", help="as on day 11")
    parser.add_argument("--stage", type=int, default=0, help="ZeRO stage")
    parser.add_argument("--offload", action="store_true", help="optimizer states in host memory")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing, switched on in the model")
    parser.add_argument("--loss_chunks", type=int, default=1, help="parts of the logits, one after the other")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    return parser.parse_args()


def read_config(args: argparse.Namespace, num_params: int) -> dict:
    """The base config with what the flags change."""
    config = json.loads(Path(args.deepspeed_config).read_text())
    config.pop("scheduler", None)  # a few steps are no run: no warm-up either
    config |= {"train_micro_batch_size_per_gpu": args.micro_batch, "gradient_accumulation_steps": args.accumulation}
    config |= {"zero_optimization": {"stage": args.stage, "reduce_bucket_size": max(500_000, num_params // 10)}}
    if args.precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif args.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if args.offload:  # with PyTorch's Adam on the host: DeepSpeedCPUAdam is faster there, and compiled on first use
        config |= {"zero_force_ds_cpu_optimizer": False}
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def status_bytes(name: str) -> int:
    """A figure of this process from the kernel: VmData (private memory), VmRSS (in RAM), VmHWM (most so far)."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def set_limit(limit_gib: float | None, device: torch.device) -> int:
    """Limit what this rank may allocate from now on; return what it holds now."""
    limit = limit_gib and int(limit_gib * 2**30)
    if device.type == "cpu":
        ctypes.CDLL(None).mallopt(-3, 2**16)  # glibc: each tensor over 64 KiB its own mapping, given back when freed
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        if limit:
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + limit, hard))
        return status_bytes("VmRSS")
    if limit:
        total = get_accelerator().total_memory()
        torch.get_device_module(device).set_per_process_memory_fraction(min(1.0, limit / total), device)
    return 0


def train(args: argparse.Namespace, device: torch.device) -> dict:
    """Train on random ids: memory and speed do not depend on what they say. Return losses and median step time."""
    preset, vocabulary = get_preset(args.model), VOCABULARY.get(args.model, 50257)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    with device:
        model = build_gpt(args.model, vocabulary)
    model.recompute, model.loss_chunks = args.recompute, args.loss_chunks
    config = read_config(args, model.num_params)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    draw = torch.Generator().manual_seed(args.seed + engine.global_rank)
    batch = torch.randint(vocabulary, (args.accumulation * args.micro_batch, preset.block_size), generator=draw)
    times, losses = [], []
    for _ in range(args.steps):
        get_accelerator().synchronize()
        start, loss_sum = time.perf_counter(), 0.0
        for ids in batch.to(device).split(args.micro_batch):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            loss_sum += loss.item() / args.accumulation
        times.append(time.perf_counter() - start)
        losses.append(over_ranks(loss_sum, device))
    tokens = batch.numel() * engine.dp_world_size
    return {"losses": losses, "tokens_per_s": tokens / over_ranks(median(times[1:]), device, "max")}


def main() -> None:
    args = parse_args()
    require_launcher()
    for name, least in {"steps": 2, "loss_chunks": 1}.items():  # the first step, which sets up, is not timed
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: take {least} or more")
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    device = torch.device(get_accelerator().current_device_name())
    held = set_limit(args.limit_gib, device)
    try:
        row = train(args, device)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not NO_ROOM.search(str(error)):
            raise
        sys.stdout.write(f"rank {os.environ['RANK']}: {type(error).__name__}: {' '.join(str(error).split())}\n")
        sys.stdout.flush()
        os._exit(1)  # at once: the other ranks wait for this one, and the launcher ends them when it is gone
    peak = status_bytes("VmHWM") - held if device.type == "cpu" else get_accelerator().max_memory_allocated()
    row["peak_bytes"] = over_ranks(peak, device, "max")
    print0(f"{row['peak_bytes'] / 2**30:.3f} GiB | {row['tokens_per_s']:.0f} tok/s | loss {row['losses'][-1]:.6f}")
    print0(f"row {json.dumps(row)}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
