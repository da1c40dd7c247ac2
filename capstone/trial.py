"""One trial of the tuner: a few steps with the settings of a file, under a memory limit, in its own processes. Day 27.

    deepspeed --num_accelerators 2 --module capstone.trial --spec runs/capstone/tiny/tune/trial.json

Expect a last line `row {...}` with tokens/s and peak bytes; or a line `no memory: ...` and exit code 1. tune.py starts
it. The limit is PyTorch's on a GPU and the operating system's on CPU, as on day 12 (day12/labs/trial.py).
"""

import argparse
import json
import os
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import deepspeed
import psutil
import torch

from bench.memory import limit_memory, out_of_memory_ends, peak_bytes
from bench.timing import time_step
from bench.world import join_world
from capstone.config import load_config
from capstone.model import build, parameter_groups, speed_up
from capstone.training import clips_here
from common.errors import clear_errors
from common.model import get_preset
from common.ranks import over_ranks, print0

WARM_UP = 2  # steps that pay for the first allocations, kernels and compilations


def measure(spec: dict, device: torch.device) -> dict:
    """Train on random ids: memory and speed do not depend on what they say."""
    torch.manual_seed(0)
    asked = [f"model={json.dumps(spec['model'])}", f"train.recompute={json.dumps(spec['recompute'])}"]
    model = build(load_config(overrides=asked), spec["vocabulary"], eos_token_id=0)  # any config: only these count
    clip = clips_here(spec["deepspeed"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=spec["deepspeed"])
    speed_up(engine)
    alone = engine.zero_optimization_stage() == 0 and engine.dp_world_size == 1
    maybe_average = engine.no_sync if alone else nullcontext  # all as in training.py: what is measured is what will run
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    draw = torch.Generator().manual_seed(engine.global_rank)
    shape = (accumulation, micro_batch, get_preset(spec["model"]["preset"]).block_size)
    batches = torch.randint(spec["vocabulary"], shape, generator=draw)

    def one_step() -> None:
        for ids in batches:
            ids = ids.to(device)
            with maybe_average():
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
            if clip and engine.is_gradient_accumulation_boundary():
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            engine.step()

    times = [over_ranks(time_step(one_step)[0], device, "max") for _ in range(WARM_UP + spec["steps"])]
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
    if args.parent:
        threading.Thread(target=leave_with, args=(args.parent,), daemon=True).start()
    device = join_world()
    spec = json.loads(Path(args.spec).read_text())
    held = limit_memory(spec["limit"], device)
    with out_of_memory_ends():
        row = measure(spec, device)
    row["peak_bytes"] = int(over_ranks(peak_bytes(device, held), device, "max"))
    print0(f"row {json.dumps(row)}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
