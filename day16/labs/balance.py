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
import sys
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import partition_balanced
from transformers import GPT2Config

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.timing import time_step
from bench.world import join_world
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.plots import plot_bars
from common.ranks import print0
from common.run_log import default_run_dir
from day16 import gpt2_pipe as gpt2
from day16.stage_times import StageClock, config_to_measure, dtype_of, in_ms, profile_layers


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps (not micro-batches)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each cut gets")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day16"), help="folder for balance.json and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--micro_batch", type=int, help="sequences of a micro-batch, in place of the config's number")
    parser.add_argument("--num_layers", type=int, help="blocks, in place of the preset's number")
    parser.add_argument("--stages", type=int, help="stages of the pipeline; must divide the ranks (default: all ranks)")
    return parser.parse_args()


def build(shape: GPT2Config, stages: int, method: str) -> gpt2.CutPipeline:
    with torch.device(get_accelerator().current_device_name()):
        specs = gpt2.layer_specs(shape)
        return gpt2.CutPipeline(specs, num_stages=stages, loss_fn=gpt2.next_token_loss, partition_method=method)


def all_cuts(shape: GPT2Config, stages: int, costs: list[float]) -> dict[tuple[int, ...], str]:
    """{where to cut: the methods that come to it}: DeepSpeed's three, and the best one by these times."""
    methods = {name: name for name in ("uniform", "parameters", "type:GPT2Block")}
    cuts = {}
    for name, method in (methods | {"balanced": gpt2.best_balanced(costs, stages)}).items():
        cuts.setdefault(tuple(map(int, build(shape, stages, method).parts)), []).append(name)
    return {parts: " = ".join(names) for parts, names in cuts.items()}


def train(model: gpt2.CutPipeline, config: dict, ids: torch.Tensor, steps: int) -> tuple[list[float], list[float], int]:
    """(seconds of the steps, seconds this rank computes for a micro-batch in them, sequences of a step); 1 warms up."""
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    clock = StageClock(engine)
    seconds, busy = [], []
    for _ in range(steps):
        dist.barrier()
        seconds.append(time_step(lambda: engine.train_batch(iter([(ids, ids)] * engine.micro_batches)))[0])
        busy.append(clock.take() / engine.micro_batches)
    engine.destroy()
    return seconds[1:], busy[1:], engine.train_batch_size()


def measure(args, cuts: dict[tuple[int, ...], str], shape: GPT2Config, start: dict, config: dict) -> list[dict]:
    """A row for each cut, trained alternately: every rank's stage and its median times. Collective."""
    torch.manual_seed(args.seed)
    ids = torch.randint(shape.vocab_size, (config["train_micro_batch_size_per_gpu"], shape.n_positions))
    device = torch.device(get_accelerator().current_device_name())
    step_s, busy_s = {parts: [] for parts in cuts}, {parts: [] for parts in cuts}
    for _ in range(args.rounds):
        for parts in cuts:
            kept = live_tensors(device)
            model = build(shape, len(parts) - 1, "parts:" + ",".join(map(str, parts)))
            gpt2.load_hf(model, shape, start)
            seconds, busy, sequences = train(model, config, ids, args.steps)
            step_s[parts] += seconds
            busy_s[parts] += busy
            free(device, kept)
    rows = []
    for parts, names in cuts.items():
        found = gpt2.from_all_ranks((model.stage_id, median(step_s[parts]), median(busy_s[parts])))
        stage_s = [max(busy for at, _, busy in found if at == stage) for stage in range(len(parts) - 1)]
        row = {"case": names, "cut": names, "parts": " ".join(map(str, parts)), "stage_ms": in_ms(stage_s)}
        row |= {"slowest_s": max(stage_s), "slowest_by_fastest": max(stage_s) / min(stage_s)}
        row["tokens_per_s"] = sequences * shape.n_positions / max(seconds for _, seconds, _ in found)
        rows.append(row)
    return rows


COLUMNS = {
    "cut before layer": "parts:", "ms, stage by stage": "stage_ms:", "ms, sums of layers": "predicted_ms:",
    "slowest/fastest": "slowest_by_fastest:.2f", "tok/s": "tokens_per_s:.0f", "gain": "gain:.2f",
}  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.steps < 2 or args.rounds < 1:
        sizes = f"--steps {args.steps} --rounds {args.rounds}"
        raise UserError(f"{sizes}: 2 steps (the first warms up) and 1 round at least")
    config = config_to_measure(args.deepspeed_config, args.micro_batch)
    device = join_world()
    stages = args.stages or dist.get_world_size()
    shape = gpt2.shape_of(args.model, len(load_tokenizer(get_preset(args.model).tokenizer)), args.num_layers)
    with device:  # weights are drawn there, which takes a GPU seconds and a CPU minutes
        start = gpt2.whole_model(shape, args.seed).state_dict()
    start = {name: tensor.cpu() for name, tensor in start.items()}  # on the host; each rank copies its stage
    costs = profile_layers(shape, config["train_micro_batch_size_per_gpu"], dtype_of(config))
    names = gpt2.layer_names(shape)
    sizes = [sum(v.numel() for k, v in start.items() if k.startswith(f"{name}.")) for name in names]
    layers = [{"layer": n, "ms": 1000 * c, "parameters": p} for n, c, p in zip(names, costs, sizes, strict=True)]
    print0("ms forward and backward of one micro-batch, and parameters, of each layer:")
    for layer in layers:
        print0(f"{layer['layer']:18} {layer['ms']:8.2f} ms {layer['parameters']:12,}")
    cuts = all_cuts(shape, stages, costs)
    theirs = list(map(int, partition_balanced(costs, stages)))
    print0(f"DeepSpeed's partition_balanced, given these times, cuts at {theirs}")

    rows = measure(args, cuts, shape, start, config)
    facts = {"layers": layers, "partition_balanced": theirs}
    table = Table(Path(args.run_dir) / "balance.json", COLUMNS, width=max(map(len, cuts.values())) + 2, **facts)
    for row, parts in zip(rows, cuts, strict=True):
        row["predicted_ms"] = in_ms(sum(costs[a:b]) for a, b in zip(parts, parts[1:], strict=False))
        row["gain"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        table.add(row)
    if dist.get_rank() == 0:
        what = f"{args.model}, {shape.n_layer} blocks, {stages} stages"
        folder = Path(args.run_dir)
        plot_bars({layer["layer"]: layer["ms"] for layer in layers}, folder / "layers.png", what, "ms a micro-batch")
        bars = {f"{r['cut']}: stage {i}": float(ms) for r in rows for i, ms in enumerate(r["stage_ms"].split())}
        plot_bars(bars, folder / "stages.png", what, "ms forward and backward a micro-batch")
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
