"""Day 16: balance - the time of each layer, the cut that makes the slowest stage fastest, and what that gains.

From the repository root, on two CPU processes or two GPUs; the last one on four GPUs (bf16, ZeRO-1):

    deepspeed --num_accelerators 2 day16/labs/balance.py
    deepspeed --num_accelerators 2 day16/labs/balance.py --num_layers 2
    deepspeed --num_accelerators 4 day16/labs/balance.py --model gpt2-xl --deepspeed_config day16/ds_config_bf16.json

Expect the measured layers, each method's cut, then for each different cut the stages' times, slowest / fastest and
tokens/s, measured in turns; balance.json and two plots.
Checked with deepspeed 0.19.8. Source: https://github.com/deepspeedai/DeepSpeed/issues/2974, which asks for this.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import partition_balanced

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.cpu import start_without_compiler
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.plots import plot_bars
from common.ranks import print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path
from day16 import gpt2_pipe as gpt2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps (not micro-batches)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each cut gets")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day16"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--micro_batch", type=int, help="sequences of a micro-batch, in place of the config's number")
    parser.add_argument("--num_layers", type=int, help="blocks, in place of the preset's number")
    parser.add_argument("--stages", type=int, help="stages of the pipeline; must divide the ranks (default: all ranks)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_launcher()
    if args.steps < 2 or args.rounds < 1:
        raise UserError(
            f"--steps {args.steps} --rounds {args.rounds}: 2 steps (the first warms up) and 1 round at least"
        )
    config = gpt2.config_to_measure(args.deepspeed_config, args.micro_batch)
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    stages, micro_batch = args.stages or dist.get_world_size(), config["train_micro_batch_size_per_gpu"]
    vocab_size = len(load_tokenizer(get_preset(args.model).tokenizer))
    shape = gpt2.shape_of(args.model, vocab_size, args.num_layers)
    device = torch.device(get_accelerator().current_device_name())
    with device:  # weights are drawn there, which takes a GPU seconds and a CPU minutes
        start = gpt2.whole_model(shape, args.seed).state_dict()
    start = {name: tensor.cpu() for name, tensor in start.items()}  # on the host; each rank copies its stage
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    costs = gpt2.profile_layers(shape, micro_batch, dtype)
    names = gpt2.layer_names(shape)
    sizes = [sum(v.numel() for k, v in start.items() if k.startswith(f"{name}.")) for name in names]
    print0("ms forward and backward of one micro-batch, and parameters, of each layer:")
    for name, cost, size in zip(names, costs, sizes, strict=True):
        print0(f"{name:18} {cost * 1000:8.2f} ms {size:12,}")

    def module(method: str) -> gpt2.CutPipeline:
        specs = gpt2.layer_specs(shape)
        with device:
            return gpt2.CutPipeline(specs, num_stages=stages, loss_fn=gpt2.next_token_loss, partition_method=method)

    balanced, cuts = gpt2.best_balanced(costs, stages), {}
    methods = {method: method for method in ("uniform", "parameters", "type:GPT2Block")} | {"balanced": balanced}
    for name, method in methods.items():
        cuts.setdefault(tuple(map(int, module(method).parts)), []).append(name)  # some come to the same cut
    theirs = list(map(int, partition_balanced(costs, stages)))
    print0(f"DeepSpeed's partition_balanced, given these times, cuts at {theirs}")

    torch.manual_seed(args.seed)
    ids = torch.randint(vocab_size, (micro_batch, shape.n_positions))
    rows = {parts: {"cut": " = ".join(who), "parts": " ".join(map(str, parts))} for parts, who in cuts.items()}
    times = {parts: ([], []) for parts in cuts}  # seconds a step; seconds of the passes of each rank
    for _ in range(args.rounds):
        for parts in cuts:
            model = module("parts:" + ",".join(map(str, parts)))
            gpt2.load_hf(model, shape, start)
            engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
            clock, micro_batches = gpt2.StageClock(engine), engine.micro_batches
            for step in range(args.steps):
                dist.barrier()
                begin = time.perf_counter()
                engine.train_batch(iter([(ids, ids)] * micro_batches))
                get_accelerator().synchronize()
                seconds, busy = time.perf_counter() - begin, clock.take()
                if step:  # the first one warms up
                    times[parts][0].append(seconds)
                    times[parts][1].append(busy / micro_batches)
            rows[parts]["tokens"] = engine.train_batch_size() * ids.shape[1]
            engine.destroy()
            get_accelerator().empty_cache()
    for parts, row in rows.items():
        found = gpt2.from_all_ranks((model.stage_id, median(times[parts][0]), median(times[parts][1])))
        stage_s = [max(busy for at, _, busy in found if at == stage) for stage in range(stages)]
        predicted = [sum(costs[a:b]) for a, b in zip(parts, parts[1:], strict=False)]
        row["stage_ms"] = gpt2.in_ms(stage_s)
        row["predicted_ms"] = gpt2.in_ms(predicted)
        row |= {"slowest_s": max(stage_s), "slowest_by_fastest": max(stage_s) / min(stage_s)}
        row["tokens_per_s"] = row.pop("tokens") / max(seconds for _, seconds, _ in found)
    table, first = list(rows.values()), next(iter(rows.values()))
    for row in table:
        row["gain"] = row["tokens_per_s"] / first["tokens_per_s"]
        print0(f"{row['cut']} | cut at {row['parts']} | stages {row['stage_ms']} ms (layers {row['predicted_ms']})")
        line = f"slowest / fastest {row['slowest_by_fastest']:.2f} | {row['tokens_per_s']:.0f} tok/s"
        print0(f"    {line} | {row['gain']:.2f} times the first")

    if dist.get_rank() == 0:
        layers = [
            {"layer": name, "ms": cost * 1000, "parameters": size}
            for name, cost, size in zip(names, costs, sizes, strict=True)
        ]
        values = {"layers": layers, "partition_balanced": theirs, "table": table}
        write_results(Path(args.run_dir) / "balance.json", this_command(), **values)
        path, what = Path(args.run_dir), f"{args.model}, {shape.n_layer} blocks, {stages} stages"
        plot_bars(
            dict(zip(names, (1000 * c for c in costs), strict=True)), path / "layers.png", what, "ms a micro-batch"
        )
        stage_times = {f"{r['cut']}: stage {i}": float(ms) for r in table for i, ms in enumerate(r["stage_ms"].split())}
        plot_bars(stage_times, path / "stages.png", what, "ms forward and backward a micro-batch")
        print0(f"table: {show_path(args.run_dir)}/balance.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
