"""One trial of the tuner: a few steps with the settings of a file, under a memory limit, in its own processes. Day 27.

    deepspeed --num_accelerators 2 --module capstone.trial --spec runs/capstone/tiny/tune/trial.json

Expect a last line `row {...}` with tokens/s and peak bytes; or a line `no memory: ...` and exit code 1. tune.py starts
it. The limit is PyTorch's on a GPU and the operating system's on CPU, as on day 12 (day12/labs/trial.py).
"""

import argparse
import ctypes
import json
import os
import re
import resource
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator

from capstone.config import load_config
from capstone.model import build, parameter_groups, speed_up
from capstone.train import clips_here
from capstone.tune import NO_ROOM
from common.cpu import start_without_compiler
from common.errors import clear_errors
from common.model import get_preset
from common.ranks import over_ranks, print0, require_launcher

WARM_UP = 2  # steps that pay for the first allocations, kernels and compilations


def status_bytes(name: str) -> int:
    """A figure of this process from the kernel: VmData (private memory), VmRSS (in RAM), VmHWM (most so far)."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def limit_memory(limit: int, device: torch.device) -> int:
    """Let this rank take `limit` bytes from now on; return what it holds already, which no setting changes."""
    if device.type == "cpu":
        ctypes.CDLL(None).mallopt(-3, 2**16)  # glibc: each tensor over 64 KiB its own mapping, given back when freed
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + limit, hard))
        return status_bytes("VmRSS")
    share = min(1.0, limit / get_accelerator().total_memory())
    torch.get_device_module(device).set_per_process_memory_fraction(share, device)
    return 0


def measure(spec: dict, device: torch.device) -> dict:
    """Train on random ids: memory and speed do not depend on what they say."""
    torch.manual_seed(0)
    asked = [f"model={json.dumps(spec['model'])}", f"train.recompute={json.dumps(spec['recompute'])}"]
    model = build(load_config(overrides=asked), spec["vocabulary"], eos_token_id=0)  # any config: only these count
    clip = clips_here(spec["deepspeed"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=spec["deepspeed"])
    speed_up(engine)
    alone = engine.zero_optimization_stage() == 0 and engine.dp_world_size == 1
    maybe_average = engine.no_sync if alone else nullcontext  # all as in train.py: what is measured is what will run
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    draw = torch.Generator().manual_seed(engine.global_rank)
    shape, times = (accumulation, micro_batch, get_preset(spec["model"]["preset"]).block_size), []
    batches = torch.randint(spec["vocabulary"], shape, generator=draw)
    for _ in range(WARM_UP + spec["steps"]):
        get_accelerator().synchronize()
        start = time.perf_counter()
        for ids in batches:
            ids = ids.to(device)
            with maybe_average():
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
            if clip and engine.is_gradient_accumulation_boundary():
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            engine.step()
        loss.item()  # waits for the device
        times.append(over_ranks(time.perf_counter() - start, device, "max"))
    stage = engine.zero_optimization_stage()
    return {"tokens_per_s": batches.numel() * engine.dp_world_size / median(times[WARM_UP:]), "stage": stage}


def leave_with(parent: int) -> None:
    """End this process when the tuner has ended: the launcher in between would go on, and disturb the next trial."""
    while psutil.pid_exists(parent):
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", required=True, help="JSON: model, vocabulary, deepspeed, recompute, steps, limit")
    parser.add_argument("--parent", type=int, help="process id of the tuner: when it is gone, so is this trial")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    args = parser.parse_args()
    require_launcher()
    if args.parent:
        threading.Thread(target=leave_with, args=(args.parent,), daemon=True).start()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    device = torch.device(get_accelerator().current_device_name())
    spec = json.loads(Path(args.spec).read_text())
    held = limit_memory(spec["limit"], device)
    try:
        row = measure(spec, device)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not NO_ROOM.search(str(error)) and not isinstance(error, MemoryError):
            raise
        sys.stdout.write(f"no memory: {type(error).__name__}: {' '.join(str(error).split())}\n")
        sys.stdout.flush()
        os._exit(1)  # at once: the other ranks wait for this one, and the launcher ends them when it is gone
    peak = status_bytes("VmHWM") - held if device.type == "cpu" else get_accelerator().max_memory_allocated()
    print0(f"row {json.dumps({**row, 'peak_bytes': int(over_ranks(peak, device, 'max'))})}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
