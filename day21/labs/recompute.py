"""Day 21: recompute - none, every k blocks, selective, DeepSpeed's, on the host: the worst moment, time and gradients.

From the repository root, one process, on a CPU or a GPU:

    deepspeed --num_accelerators 1 day21/labs/recompute.py
    deepspeed --num_accelerators 1 day21/labs/recompute.py --family llama --hidden 2048 --heads 16 --seq_len 2048 --bf16

Expect a row for each way: the peak of one forward and backward pass (day21/peak.py) beside the formula, how often the
blocks ran, the time in turns, and the largest difference of any gradient to that without recomputation. Then
recompute.json and plots.
Checked with deepspeed 0.19.8, torch 2.13.0. Source: Chen et al. 2016, arXiv:1604.06174, section 4 (the square root)
"""

import argparse
import math
import sys
from pathlib import Path
from statistics import median

import torch

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

import deepspeed

from bench.table import Table
from bench.timing import ratio, take_turns
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.plots import plt, save_plot
from common.run_log import default_run_dir
from config.plan import DTYPE_BYTES, Model, activation_bytes, layer_bytes
from day21.peak import step_peak
from day21.recompute import WAYS, blocks_of, recompute_every
from day21.shapes import add_shape_flags, build_shape, random_ids

COLUMNS = {
    "peak MB": "peak_bytes:MB", "formula MB": "formula_bytes:MB", "peak/formula": "peak_of_formula:.3f",
    "block runs": "runs:d", "ms": "ms:.1f", "time": "time:.2f", "grad diff": "difference:.1e",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(parser, layers=16, hidden=256, heads=4, seq_len=256, micro_batch=2, vocab=512)
    parser.add_argument("--every", type=int, nargs="*", help="segments to try (default: all powers of 2)")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS)[1:], help="other ways (default: all that make sense)")
    parser.add_argument(
        "--turns", type=int, default=5, help="turns in which all cases are timed, the first for nothing"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day21"), help="folder for recompute.json and plots")
    return parser.parse_args()


def formula(shape: Model, args: argparse.Namespace, way: str, every: int) -> float:
    """The larger of two moments: the loss, and the backward pass of the last segment."""
    precision = "bf16" if args.bf16 else "fp32"
    width, tokens = DTYPE_BYTES[precision], args.seq_len * args.micro_batch
    need = activation_bytes(shape, args.seq_len, args.micro_batch, precision, every > 0, every=max(every, 1))
    if way == "selective":  # the outputs of products and attention, besides each layer's input
        keys = shape.hidden * (shape.kv_heads or shape.heads) / shape.heads
        kept = 7 * shape.hidden + shape.mlp if shape.family == "gpt2" else 5 * shape.hidden + 2 * keys + 2 * shape.mlp
        need["layers"] = shape.layers * tokens * width * kept
        need["recompute"] -= tokens * width * (kept - shape.hidden)  # those are there already
    if way == "host":  # one layer's, on its way back
        need["layers"], need["recompute"] = 0, tokens * layer_bytes(shape, precision, args.seq_len)["kept"]
    head = width * shape.vocab * shape.hidden  # the gradient of the last layer, before it is added to what is there
    loss = need["layers"] + need["outside"] + need["logits"]
    return max(loss, need["layers"] + need["recompute"] + need["meanwhile"] + head)


def plot(rows: list[dict], layers: int, path: Path) -> None:
    """Peak against k, measured and by the formula."""
    figure, axes = plt.subplots(figsize=(7, 4))
    shown = [row for row in rows if row["way"] == "torch" and row["every"]]
    for key, style, label in (("peak_bytes", "o-", "measured"), ("formula_bytes", "x--", "formula")):
        axes.plot([row["every"] for row in shown], [row[key] / 1e6 for row in shown], style, label=label)
    axes.axhline(rows[0]["peak_bytes"] / 1e6, color="gray", linewidth=1, label="no recomputation")
    axes.set_xscale("log", base=2)
    axes.set(
        xlabel=f"k: blocks a checkpoint, of {layers}", ylabel="peak of a step, MB", title="Recompute every k blocks"
    )
    axes.set_ylim(bottom=0)
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    device = join_world()
    if args.turns < 2:
        raise UserError(f"--turns {args.turns}: take 2 or more, the first is not counted")
    model, shape = build_shape(args, device)
    owner, name = blocks_of(model)
    blocks, ids = getattr(owner, name), random_ids(args, device)
    deepspeed.checkpointing.configure(mpu_=None)  # recompute, and nothing else
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    powers = args.every or [2**n for n in range(int(math.log2(args.layers)) + 1) if args.layers % 2**n == 0]
    ways = args.ways if args.ways is not None else [w for w in list(WAYS)[1:] if w != "host" or device.type != "cpu"]
    cases = {"none": ("torch", 0)} | {f"every {k}": ("torch", k) for k in powers} | {way: (way, 1) for way in ways}
    lists = {}
    for case, (way, every) in cases.items():
        setattr(owner, name, blocks)
        lists[case] = recompute_every(model, max(every, 1), WAYS[way], len(blocks) if every else 0)

    def step(case: str) -> None:
        setattr(owner, name, lists[case])
        model(input_ids=ids, labels=ids).loss.backward()

    def gradients() -> list[torch.Tensor]:
        return [parameter.grad.clone() for parameter in model.parameters()]

    table = Table(Path(args.run_dir) / "recompute.json", COLUMNS, width=12, shape=vars(args) | {"run_dir": None})
    rows, first = [], None
    for case, (way, every) in cases.items():
        for _ in range(2):  # the first warms up; with "none" it shows what a repetition changes (atomic sums on GPUs)
            model.zero_grad(set_to_none=False)
            step(case)
            first = first or gradients()
        apart = max((a - b).abs().max().item() for a, b in zip(gradients(), first, strict=True))
        lists[case].runs[:] = [0] * len(blocks)
        peak = step_peak(lambda case=case: step(case), device)
        planned = formula(shape, args, way, every)
        row = {"case": case, "way": way, "every": every, "peak_bytes": peak, "formula_bytes": planned}
        rows.append(row | {"peak_of_formula": peak / planned, "runs": sum(lists[case].runs), "difference": apart})
    times = take_turns({case: lambda case=case: step(case) for case in cases}, args.turns)
    for row in rows:
        runs = times[row["case"]]
        row["ms"], row["time"] = 1e3 * median(s for s, _ in runs[1:]), 1 / ratio(times["none"], runs)
        table.add(row)
    plot(rows, args.layers, table.path.with_name("recompute.png"))
    table.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
