"""Day 10: scaling - which learning rate goes with which batch size, on the shipped corpus, for the same text read.

From the repository root, on two CPU processes or two GPUs (minutes: a dozen trainings):

    deepspeed --num_accelerators 2 day10/labs/scaling.py
    deepspeed --num_accelerators 2 day10/labs/scaling.py --accumulations 1 4 --lrs 0.001 0.004 --sequences 512

Expect a table of held-out losses, a row for each batch size and learning rate; the best rate of each batch; and a plot.
Checked with deepspeed 0.19.8. Source: Malladi et al. 2022, arXiv:2205.10287 (square root rule for Adam);
McCandlish et al. 2018, arXiv:1812.06162 (from which batch size on more of it is wasted).
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.world import join_world
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.plots import plt, save_plot
from common.ranks import print0
from common.run_log import default_run_dir
from config.read import read_config

COLUMNS = {"updates": "steps:d", "held-out loss": "held_out_loss:.4f"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--accumulations", nargs="+", type=int, default=[1, 4, 16], help="micro-batches a step")
    parser.add_argument("--lrs", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3, 4e-3], help="learning rates")
    parser.add_argument("--micro_batch", type=int, default=4, help="sequences a rank and micro-batch")
    parser.add_argument("--sequences", type=int, default=1024, help="sequences read in each training, all ranks")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day10"), help="folder for scaling.json and loss.png")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def train(accumulation: int, lr: float, splits, vocab_size: int, args: argparse.Namespace) -> dict:
    """Read `args.sequences` sequences once, at a constant rate; return what batch, how many steps, which loss."""
    train_blocks, held_out_blocks = splits
    torch.manual_seed(args.seed)
    model = build_model(args.model, vocab_size)
    config = read_config(args.deepspeed_config)
    config.pop("scheduler", None)  # constant: ten steps of warm-up are all of a run of 8, and nothing in one of 128
    config |= {"train_micro_batch_size_per_gpu": args.micro_batch, "gradient_accumulation_steps": accumulation}
    config["optimizer"]["params"]["lr"] = lr
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    batches = endless_batches(DataLoader(train_blocks, args.micro_batch, sampler=sampler, drop_last=True))
    batch_size = engine.train_batch_size()
    if args.sequences % batch_size:
        raise UserError(f"--sequences {args.sequences} is no multiple of the batch of {batch_size}")
    while engine.global_samples < args.sequences:
        engine.backward(engine(**to_device(next(batches), engine.device)).loss)
        engine.step()
    loss = held_out_loss(model, held_out_blocks, engine.device, max_blocks=256)
    engine.destroy()
    return {"batch_size": batch_size, "lr": lr, "steps": engine.global_steps, "held_out_loss": loss}


def plot_rates(table: list[dict], path: Path, title: str) -> None:
    """Held-out loss against learning rate, a line for each batch size."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for batch_size in dict.fromkeys(row["batch_size"] for row in table):
        rows = [row for row in table if row["batch_size"] == batch_size]
        label = f"batch {batch_size}, {rows[0]['steps']} steps"
        axes.plot([row["lr"] for row in rows], [row["held_out_loss"] for row in rows], "o-", label=label)
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss (nats a token)", title=title)
    rates = sorted({row["lr"] for row in table})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    device = join_world()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    splits = load_corpus(args.corpus, tokenizer, preset.block_size)
    print0(f"held-out loss after {args.sequences} sequences")
    path = Path(args.run_dir) / "scaling.json"
    table = Table(path, COLUMNS, width=24, sequences=args.sequences)
    for accumulation in args.accumulations:
        batch_size = args.micro_batch * accumulation * dist.get_world_size()
        for lr in args.lrs:
            kept = live_tensors(device)
            with table.row(f"batch {batch_size}, lr {lr:g}") as row:
                row |= train(accumulation, lr, splits, len(tokenizer), args)
            free(device, kept)
        if trained := [row for row in table.rows[-len(args.lrs) :] if "error" not in row]:
            best = min(trained, key=lambda row: row["held_out_loss"])
            print0(f"best learning rate for a batch of {batch_size}: {best['lr']:g}")
    trained = [row for row in table.rows if "error" not in row]
    if trained and dist.get_rank() == 0:
        title = f"{args.model}, {args.sequences} sequences of {preset.block_size} tokens"
        plot_rates(trained, path.with_name("loss.png"), title)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
