"""Day 16: stages - the stages of every cut, timed one after the other on one device: before you have a GPU for each.

From the repository root, plain Python, no launcher; the second on one GPU:

    python day16/labs/stages.py
    python day16/labs/stages.py --model gpt2-xl --bf16 --stages 4 --micro_batch 4

Expect, for each different cut, the milliseconds of its stages, slowest / fastest, the sums of the single layers' times,
and the tokens/s that a pipeline of such stages could reach without messages and optimizer; stages.json and a plot.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/pipe/module.py (`_partition_layers`); arXiv:2104.04473.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import partition_balanced, partition_uniform

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.plots import plot_bars
from common.run_log import default_run_dir
from day16 import gpt2_pipe as gpt2
from day16.stage_times import in_ms, profile_layers, shortest_step, time_layers


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2, help="stages of the pipeline")
    parser.add_argument("--micro_batch", type=int, default=2, help="sequences of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=8, help="of a step, for the tokens/s")
    parser.add_argument("--bf16", action="store_true", help="bf16 instead of fp32")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each cut gets")
    parser.add_argument("--run_dir", default=default_run_dir("day16"), help="folder for stages.json and stages.png")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--num_layers", type=int, help="blocks, in place of the preset's number")
    return parser.parse_args()


def all_cuts(sizes: list[int], costs: list[float], stages: int) -> dict[tuple[int, ...], str]:
    """{parts: the methods that cut so}. The first three as PipelineModule computes them, the last by measured time."""
    is_block = [0, 0, *[1] * (len(sizes) - 4), 0, 0]
    ways = {"uniform": partition_uniform(len(sizes), stages), "parameters": partition_balanced(sizes, stages)}
    ways |= {"type:GPT2Block": partition_balanced(is_block, stages), "balanced": gpt2.best_parts(costs, stages)}
    cuts = {}
    for name, parts in ways.items():
        cuts.setdefault(tuple(map(int, parts)), []).append(name)
    return {parts: " = ".join(names) for parts, names in cuts.items()}


COLUMNS = {
    "cut before layer": "parts:", "ms, stage by stage": "stage_ms:", "ms, sums of layers": "layers_ms:",
    "slowest/fastest": "slowest_by_fastest:.2f", "at most tok/s": "tokens_per_s:.0f",
}  # fmt: skip


def main() -> None:
    args = parse_args()
    for name in ("stages", "micro_batch", "micro_batches", "rounds", "num_layers"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1")
    shape = gpt2.shape_of(args.model, len(load_tokenizer(get_preset(args.model).tokenizer)), args.num_layers)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in spec.build().parameters()) for spec in gpt2.layer_specs(shape)]
    costs = profile_layers(shape, args.micro_batch, dtype)
    cuts = all_cuts(sizes, costs, args.stages)
    times = {parts: [[] for _ in range(args.stages)] for parts in cuts}
    for _ in range(args.rounds):  # alternately: what else the machine does meets all cuts
        for parts, stages in times.items():
            for start, stop, seconds in zip(parts, parts[1:], stages, strict=False):
                seconds.append(time_layers(shape, range(start, stop), args.micro_batch, dtype))
                get_accelerator().empty_cache()

    layers = [{"layer": n, "ms": 1000 * cost} for n, cost in zip(gpt2.layer_names(shape), costs, strict=True)]
    table = Table(Path(args.run_dir) / "stages.json", COLUMNS, width=max(map(len, cuts.values())) + 2, layers=layers)
    tokens = args.micro_batches * args.micro_batch * shape.n_positions
    for parts, names in cuts.items():
        stage_s = [median(seconds) for seconds in times[parts]]
        layers_s = [sum(costs[start:stop]) for start, stop in zip(parts, parts[1:], strict=False)]
        row = {"case": names, "cut": names, "parts": " ".join(map(str, parts))}
        row |= {"stage_ms": in_ms(stage_s), "layers_ms": in_ms(layers_s)}
        row["slowest_by_fastest"] = max(stage_s) / min(stage_s)
        row["tokens_per_s"] = tokens / shortest_step(stage_s, args.micro_batches)
        table.add(row)
    bars = {f"{row['cut']}: stage {i}": float(ms) for row in table.rows for i, ms in enumerate(row["stage_ms"].split())}
    title = f"{args.model}, {shape.n_layer} blocks, {args.stages} stages, one at a time"
    plot_bars(bars, table.path.with_suffix(".png"), title, "ms forward and backward a micro-batch")
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
