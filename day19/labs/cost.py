"""Day 19: cost - what looking costs: the same training step under each tool, by turns.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day19/labs/cost.py
    deepspeed --num_accelerators 2 day19/labs/cost.py --model gpt2 --micro_batch 8

Expect a row a tool: milliseconds per step, and how many times as long as without it. Then cost.json.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py; https://docs.pytorch.org/docs/stable/profiler.html
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.profiling.flops_profiler import FlopsProfiler
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import ratio, take_turns
from bench.traffic import count_traffic
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.run_log import default_run_dir
from config.read import read_config
from day12.gpt import build_gpt

VOCABULARY = 4096


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9, help="windows of each tool, by turns")
    parser.add_argument("--window", type=int, default=3, help="steps between two looks at the clock")
    parser.add_argument("--micro_batch", type=int, default=4, help="sequences a rank and micro-batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day19"), help="folder for cost.json")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    return parser.parse_args()


def build(args: argparse.Namespace, breakdown: bool) -> tuple[deepspeed.DeepSpeedEngine, Callable[[], None]]:
    """An engine that waits for the device in no step of its own accord (the JSON), and its training step."""
    torch.manual_seed(args.seed)
    model = build_gpt(args.model, VOCABULARY)
    config = read_config(HERE / "ds_config_case.json") | {"wall_clock_breakdown": breakdown}
    config["train_micro_batch_size_per_gpu"] = args.micro_batch
    if get_accelerator().device_name() == "cpu":
        config.pop("bf16")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    ids = torch.randint(VOCABULARY, (args.micro_batch, get_preset(args.model).block_size), device=engine.device)

    def train_step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    return engine, train_step


def count_flops(engine: deepspeed.DeepSpeedEngine, train_step: Callable[[], None]) -> None:
    """A step with DeepSpeed's flops profiler on, as the engine has it in the one step that the JSON names."""
    profiler = FlopsProfiler(engine.module, engine)
    profiler.start_profile()
    train_step()
    profiler.stop_profile()
    profiler.end_profile()


def main() -> None:
    args = parse_args()
    if args.turns < 2 or args.window < 1:
        raise UserError(
            f"--turns {args.turns} --window {args.window}: two turns or more, the first does not count; window from 1"
        )
    join_world()
    engine, train_step = build(args, breakdown=False)
    _, timed_step = build(args, breakdown=True)
    on_cpu = get_accelerator().device_name() == "cpu"
    activities = [ProfilerActivity.CPU] if on_cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    record = partial(profile, activities=activities)

    def window(look: Callable, step: Callable[[], None]) -> None:
        with look():
            for _ in range(args.window):
                step()

    quiet = partial(contextlib.redirect_stdout, io.StringIO())  # it prints three lines a step
    tools = {
        "none": partial(window, contextlib.nullcontext, train_step),
        "wall_clock_breakdown": partial(window, quiet, timed_step),
        "flops profiler": partial(window, contextlib.nullcontext, partial(count_flops, engine, train_step)),
        "comms logger": partial(window, count_traffic, train_step),
        "torch profiler": partial(window, record, train_step),
        "with shapes and stacks": partial(
            window, partial(record, record_shapes=True, profile_memory=True, with_stack=True), train_step
        ),
    }
    runs = take_turns(tools, args.turns)
    columns = {"ms": "ms:,.1f", "times as long": "slower:.2f"}
    table = Table(Path(args.run_dir) / "cost.json", columns, width=24, ranks=dist.get_world_size())
    for case, windows in runs.items():
        ms = 1e3 * median(seconds for seconds, _ in windows[1:]) / args.window
        table.add({"case": case, "ms": ms, "slower": 1 / ratio(runs["none"], windows)})
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
