"""Day 23: choose - the learning rate and the number of epochs, early stopping, and the variants of LoRA in one table.

From the repository root, on two CPU processes or two GPUs; a part at a time, each goes on where the last one ended:

    deepspeed --num_accelerators 2 day23/labs/choose.py --run_dir runs/day23/choose --parts full
    deepspeed --num_accelerators 2 day23/labs/choose.py --run_dir runs/day23/choose --parts lora variants
    deepspeed --num_accelerators 2 day23/labs/choose.py --pretrained tiny-llama --fp32 --samples 64 --epochs 2

Expect a row a run: its best epoch, the held-out loss there, and the loss on text that was not tuned on. A case that is
in the folder's choose.json already is not run again.
Checked with deepspeed 0.19.8 and peft 0.21.2. Source: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732 (rsLoRA);
Liu et al. 2024, https://arxiv.org/abs/2402.09353 (DoRA).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import deepspeed
import matplotlib.pyplot as plt
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.world import join_world
from common.data import to_device
from common.errors import UserError, clear_errors
from common.plots import save_plot
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.read import read_config
from day22.chat_data import answers, collate, endless_order, held_out_loss, load_chat
from day22.pretrained import load_tokenizer
from day23.case import CONFIGS, build_engine
from day23.lora import numel

PARTS = ("full", "lora", "variants")
LORA = {"rank": 8, "alpha": 16}
# Each at LoRA's best rate. 42 (d_in + d_out) of q and v are about as many parameters as 8 of all seven matrices.
VARIANTS = {
    "r=1": {"rank": 1, "alpha": 2},
    "r=64, alpha=16": {"rank": 64, "alpha": 16},
    "r=64, alpha=16, rsLoRA": {"rank": 64, "alpha": 16, "use_rslora": True},
    "r=8, DoRA": {**LORA, "use_dora": True},
    "r=42, q and v alone": {"rank": 42, "alpha": 84, "targets": ["q_proj", "v_proj"]},
}
COLUMNS = {
    "trained": "trained:,", "best epoch": "best_epoch:", "held out": "held_out_loss:.4f", "gain": "improvement:.4f",
    "last": "last_held_out_loss:.4f", "other text": "forgotten:+.4f", "s": "seconds:.0f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to run now")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--fp32", action="store_true", help="fp32 instead of bf16")
    parser.add_argument("--full_lrs", nargs="+", type=float, default=[3e-5, 1e-4, 3e-4, 1e-3], help="of full tuning")
    parser.add_argument("--lora_lrs", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], help="of LoRA")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="of LoRA")
    parser.add_argument("--epochs", type=int, default=4, help="most epochs of a run")
    parser.add_argument("--patience", type=int, default=1, help="epochs without a lower held-out loss until a run ends")
    parser.add_argument("--samples", type=int, default=64, help="training samples: few, so that epochs are short")
    parser.add_argument("--held_out", type=int, default=32, help="held-out samples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day23"), help="folder for choose.json and its plot")
    parser.add_argument("--pretrained", default="smollm2", help="smollm2, a preset of day 22, a folder, a hub name")
    parser.add_argument(
        "--dataset", default="chat", help="chat, a file of dialogues, a hub data set, or a corpus of plain text"
    )
    parser.add_argument("--other_corpus", default="moby_dick", help="what must not be forgotten: as --dataset")
    parser.add_argument("--other_samples", type=int, default=4, help="held-out samples of --other_corpus")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sample")
    return parser.parse_args()


def train_epoch(engine: deepspeed.DeepSpeedEngine, order, items: list, pad: int, steps: int) -> None:
    for _ in range(steps):
        batch = collate([items[i] for i in next(order)], pad)
        share = over_ranks(answers(batch), engine.device, "mean")
        engine.backward(engine(**to_device(batch, engine.device), num_items_in_batch=share).loss)
        engine.step()


def measure(kind: str, lr: float, lora: dict, data: dict, args: argparse.Namespace) -> dict:
    """Train one case until its held-out loss no longer falls; return its row. Collective."""
    since = time.perf_counter()
    micro_batch = read_config(CONFIGS[kind])["train_micro_batch_size_per_gpu"]
    steps = len(data["train"]) // (micro_batch * dist.get_world_size())
    if steps < 1:
        raise UserError(f"--samples {args.samples}: fewer than one step of {micro_batch} samples on each rank")
    engine = build_engine(kind, lr, steps * args.epochs, args, **lora)

    def look() -> dict:
        parts = ("held_out", "other")
        return {part: held_out_loss(engine.module, data[part], data["pad"], engine.device) for part in parts}

    order = endless_order(data["train"], micro_batch, args.seed)
    seen = [look()]  # before the first epoch, and after each
    best = 0
    while len(seen) <= args.epochs and len(seen) - 1 - best < args.patience:  # early stopping
        train_epoch(engine, order, data["train"], data["pad"], steps)
        seen.append(look())
        best = min(range(len(seen)), key=lambda epoch: seen[epoch]["held_out"])
    trained = sum(numel(parameter) for parameter in engine.module.parameters() if parameter.requires_grad)
    engine.destroy()
    return {
        "kind": kind, "lr": lr, "trained": trained, "best_epoch": best, "epochs": seen,
        "held_out_loss": seen[best]["held_out"], "last_held_out_loss": seen[-1]["held_out"],
        "improvement": seen[0]["held_out"] - seen[best]["held_out"],
        "forgotten": seen[best]["other"] - seen[0]["other"], "seconds": time.perf_counter() - since,
    }  # fmt: skip


def open_table(folder: Path) -> Table:
    """The table, with the rows that earlier parts left in its file."""
    path = folder / "choose.json"
    rows = json.loads(path.read_text())["table"] if path.exists() else []
    dist.barrier()  # all have read before rank 0 writes
    table = Table(path, COLUMNS, width=28)
    for row in rows:
        table.add(row)
    return table


def best_rate(table: Table, kind: str) -> float:
    rows = [row for row in table.rows if row.get("kind") == kind and "error" not in row and "lr=" in row["case"]]
    if not rows:
        raise UserError(f"no run of {kind} is in {table.path}: --parts {kind} comes first")
    return min(rows, key=lambda row: row["held_out_loss"])["lr"]


def plot_rates(table: Table, title: str) -> None:
    """Draw rate.png: the lowest held-out loss against the learning rate."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for kind in ("full", "lora"):
        rows = [row for row in table.rows if row.get("kind") == kind and "lr=" in row["case"] and "error" not in row]
        points = sorted((row["lr"], row["held_out_loss"]) for row in rows)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=kind)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="lowest held-out loss (nats a token)", title=title)
    save_plot(figure, axes, table.path.with_name("rate.png"))


def main() -> None:
    args = parse_args()
    if args.patience < 1 or args.epochs < 1:
        raise UserError(f"--epochs {args.epochs} --patience {args.patience}: both at least 1")
    device = join_world()
    tokenizer = load_tokenizer(args.pretrained)
    train_items, held_out_items = load_chat(args.dataset, tokenizer, args.max_length)
    other_items = load_chat(args.other_corpus, tokenizer, args.max_length)[1][: args.other_samples]
    spread = train_items[:: max(1, len(train_items) // args.samples)][: args.samples]  # of all sources
    held_out = held_out_items[:: max(1, len(held_out_items) // args.held_out)][: args.held_out]
    data = {"train": spread, "held_out": held_out, "other": other_items, "pad": tokenizer.pad_token_id}
    table = open_table(Path(args.run_dir))

    def add(case: str, kind: str, lr: float, lora: dict | None = None) -> None:
        if any(row["case"] == case for row in table.rows):
            return
        kept = live_tensors(device)
        with table.row(case) as row:
            row |= measure(kind, lr, lora or {}, data, args)
        free(device, kept)

    if "full" in args.parts:
        for lr in args.full_lrs:
            add(f"full, lr={lr:g}", "full", lr)
    if "lora" in args.parts:
        for lr in args.lora_lrs:
            add(f"LoRA r=8, lr={lr:g}", "lora", lr, LORA)
    if "variants" in args.parts:
        rate = best_rate(table, "lora")
        for name in args.variants:
            add(f"LoRA {name}", "lora", rate, VARIANTS[name])
        print0(f"variants at lr={rate:g}, the best of r=8")
    if dist.get_rank() == 0:
        plot_rates(table, f"{args.pretrained}, {len(spread)} samples, up to {args.epochs} epochs")
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
