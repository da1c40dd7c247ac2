"""Day 13: sick curves - a healthy run and seven sick ones, side by side; which signal shows each, and how early?

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day13/labs/sick.py
    deepspeed --num_accelerators 2 day13/labs/sick.py --cases healthy frozen_layer --steps 20

Expect a line a case: when the illness begins, the first signal, and when the loss curve itself leaves the healthy one.
sick.json has every step of every case, sick.png draws them.
Checked with deepspeed 0.19.8. Source: day13/notes.md, The idea.
"""

import argparse
import copy
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from transformers import set_seed

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.plots import plt
from common.ranks import print0
from common.run_log import default_run_dir, show_path
from config.read import read_config
from day11.precision import emulate_fp16
from day13.signals import Watch, apart_from, first_signals

# Case -> what it changes in the JSON. The others are switches in train() below.
CASES = {
    "healthy": {},
    "lr_too_high": {"scheduler.params.warmup_max_lr": 0.1},
    "no_warmup": {"scheduler": None, "optimizer.params.lr": 0.03},
    "bad_batch": {},
    "overflow": {"fp16": {"enabled": True, "initial_scale_power": 28, "hysteresis": 1, "loss_scale_window": 1000}},
    "data_repeated": {},
    "frozen_layer": {},
    "ranks_disagree": {"zero_optimization.stage": 0},
}
COLUMNS = {"begins": "begins:d", "signal": "signal:s", "at step": "signal_step", "loss apart at": "loss_apart_step"}
TITLES = {
    "lr_too_high": "learning rate 50 times too high",
    "no_warmup": "no warm-up, rate 0.03",
    "bad_batch": "one bad batch",
}
TITLES |= {"overflow": "fp16 overflow", "data_repeated": "data repeated", "frozen_layer": "one layer frozen"}
TITLES |= {"ranks_disagree": "ranks that disagree", "healthy": "healthy"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which, healthy among them")
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps (not micro-batches)")
    parser.add_argument("--fp16_steps", type=int, default=16, help="steps of the overflow, slow where fp16 is emulated")
    parser.add_argument("--micro_batch", type=int, default=4, help="sequences a rank and micro-step")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day13"), help="folder for sick.json and sick.png")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="moby_dick", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def case_config(case: str, micro_batch: int) -> dict:
    """The day's JSON with the changes of `case`; None takes a section out."""
    config = copy.deepcopy(read_config(HERE / "ds_config.json"))
    config.pop("csv_monitor")
    config["train_micro_batch_size_per_gpu"] = micro_batch
    for path, value in CASES[case].items():
        *sections, key = path.split(".")
        place = config
        for section in sections:
            place = place[section]
        place[key] = value
    return {key: value for key, value in config.items() if value is not None}


def train(
    case: str, begins: int, blocks, vocab_size: int, args: argparse.Namespace, device: torch.device
) -> list[dict]:
    """Train with the illness `case`, which begins at step `begins`; return the rows of `Watch`."""
    set_seed(args.seed)  # random, numpy and torch: all three are compared
    with device:
        model = build_model(args.model, vocab_size)
    if case == "frozen_layer":
        model.transformer.h[1].requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    config = case_config(case, args.micro_batch)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    batches = endless_batches(DataLoader(blocks, args.micro_batch, sampler=DistributedSampler(blocks, seed=args.seed)))
    watch, rows, kept = Watch(engine), [], []
    for step in range(1, (min(args.steps, args.fp16_steps) if case == "overflow" else args.steps) + 1):
        batch = to_device(next(batches), device)
        if case == "data_repeated":
            kept.append(batch)
            batch = kept[step - 1] if step < begins else kept[begins - 4 + step % 3]  # the same three again and again
        if case == "bad_batch" and step == begins and dist.get_rank() == 1:  # a broken file: one token for ever
            batch = {name: torch.full_like(tensor, vocab_size - 1) for name, tensor in batch.items()}
        watch.see(step, batch)
        before = watch.matrices()
        loss = engine(**batch).loss
        engine.backward(loss)
        if case == "ranks_disagree" and step >= begins and dist.get_rank() == 1:
            for group in engine.optimizer.param_groups:
                group["lr"] /= 4  # a schedule that listens to this rank's own loss
        engine.step()
        rows.append(watch.after_step(step, loss, batch, before))
    engine.destroy()
    return rows


def draw(runs: dict[str, list[dict]], table: list[dict], path: Path) -> None:
    """Eight panels: the loss of a case over that of the healthy run, where it begins and where the first signal is."""
    figure, panels = plt.subplots(2, -(-len(runs) // 2), figsize=(3.4 * -(-len(runs) // 2), 6), sharey=True)
    for axes, row in zip(panels.flat, table, strict=False):
        case, rows = row["case"], runs[row["case"]]
        axes.plot([r["step"] for r in runs["healthy"]], [r["loss"] for r in runs["healthy"]], color="0.75", lw=3)
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=1.2)
        if case != "healthy":
            axes.axvline(row["begins"], color="0.5", ls=":", lw=1)
            if row["signal_step"]:
                axes.axvline(row["signal_step"], color="tab:red", lw=1)
            if row["loss_apart_step"]:
                axes.axvline(row["loss_apart_step"], color="tab:orange", ls="--", lw=1)
        axes.set_title(f"{TITLES[case]}\n{row['signal']}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_ylim(4.5, 11)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    for axes in panels[:, 0]:
        axes.set_ylabel("loss (nats a token)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    if args.cases[0] != "healthy" or args.steps < 20:
        raise UserError("--cases begins with healthy, to compare with, and --steps is at least 20")
    emulate_fp16()
    device = join_world()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    table, runs = Table(Path(args.run_dir) / "sick.json", COLUMNS, width=16), {}
    for case in args.cases:
        later = case in ("bad_batch", "data_repeated", "ranks_disagree")
        begins = args.steps // 2 if later else 1
        runs[case] = rows = train(case, begins, blocks, len(tokenizer), args, device)
        signals = first_signals(rows)
        signal = next(iter(signals), "none")
        table.add({
            "case": case, "begins": begins, "signal": signal, "signal_step": signals.get(signal), "signals": signals,
            "loss_apart_step": apart_from(rows, runs["healthy"]), "rows": rows,
        })  # fmt: skip
    if dist.get_rank() == 0:
        draw(runs, table.rows, Path(args.run_dir) / "sick.png")
        print0(f"curves: {show_path(args.run_dir)}/sick.png")
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
