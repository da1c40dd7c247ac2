"""Day 23: compare - full fine-tuning against LoRA: same data, same steps, several learning rates and ranks each.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day23/labs/compare.py
    deepspeed --num_accelerators 2 day23/labs/compare.py --pretrained tiny-llama --steps 12
    deepspeed --num_accelerators 4 day23/labs/compare.py --steps 200 --lora_ranks 1 2 4 8 16 32 64 --max_length 512

Expect a row a run: what is trained, bytes, tokens/s, the held-out loss, and the loss on text that was not tuned on.
Checked with deepspeed 0.19.8 and peft 0.21.2. Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensor_bytes, live_tensors
from bench.memory import free, saved_for_backward
from bench.table import Table
from bench.timing import time_step
from bench.world import join_world
from common.data import to_device
from common.errors import UserError, clear_errors
from common.plots import plot_loss
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from day22.chat_data import answers, collate, endless_order, held_out_loss, load_chat
from day22.pretrained import load_tokenizer
from day23.case import build_engine
from day23.lora import held_bytes, numel

COLUMNS = {
    "trained": "trained:,", "share": "share:.2%", "optim MB": "held_bytes.optimizer:MB", "peak MB": "peak_bytes:MB",
    "save MB": "save_bytes:MB", "tok/s": "tokens_per_s:,.0f", "held out": "held_out_loss:.4f",
    "other text": "forgotten:+.4f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--fp32", action="store_true", help="fp32 instead of bf16")
    parser.add_argument("--full_lrs", nargs="+", type=float, default=[5e-5, 1e-4, 3e-4], help="of full fine-tuning")
    parser.add_argument("--lora_lrs", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3], help="of LoRA")
    parser.add_argument("--lora_rank", type=int, default=8, help="r: rows of A, columns of B")
    parser.add_argument("--lora_ranks", nargs="*", type=int, default=[2, 32], help="more ranks, at LoRA's best rate")
    parser.add_argument("--targets", nargs="+", default=["all-linear"], help="names of the matrices that get a bypass")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--eval_every", type=int, default=10, help="optimizer steps between two held-out losses")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day23"), help="folder for compare.json and plots")
    parser.add_argument("--pretrained", default="smollm2", help="smollm2, a preset of day 22, a folder, a hub name")
    parser.add_argument(
        "--dataset", default="chat", help="chat, a file of dialogues, a hub data set, or a corpus of plain text"
    )
    parser.add_argument("--other_corpus", default="moby_dick", help="what must not be forgotten: as --dataset")
    parser.add_argument("--other_samples", type=int, default=16, help="held-out samples of --other_corpus")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sample")
    return parser.parse_args()


def train_step(
    engine: deepspeed.DeepSpeedEngine, batch: dict, share: float, found: dict, step: int, before: int
) -> torch.Tensor:
    """One optimizer step; return its loss. Into `found` go bytes: of what step 1 saves, of what step 2 holds."""
    batch = to_device(batch, engine.device)
    if step == 1:  # once: what autograd keeps until its backward pass
        with saved_for_backward(engine.module.parameters()) as saved:
            loss = engine(**batch, num_items_in_batch=share).loss
        found["activation_bytes"] = sum(saved.values())
    else:
        loss = engine(**batch, num_items_in_batch=share).loss
    engine.backward(loss)
    if step == 2:  # the first step makes the optimizer's states
        found["with_gradients"] = live_tensor_bytes(engine.device) - before
    engine.step()
    return loss.detach()


def train(engine: deepspeed.DeepSpeedEngine, data: dict, args: argparse.Namespace, before: int) -> tuple[dict, list]:
    """Train one case. Return what was found, and rows of losses as in metrics.jsonl. Collective."""
    found, times, tokens = {}, [], []
    rows = [{"step": 0, "held_out_loss": held_out_loss(engine.module, data["held_out"], data["pad"], engine.device)}]
    order = endless_order(data["train"], engine.train_micro_batch_size_per_gpu(), args.seed)
    for step in range(1, args.steps + 1):
        batch = collate([data["train"][i] for i in next(order)], data["pad"])
        share = over_ranks(answers(batch), engine.device, "mean")
        seconds, loss = time_step(partial(train_step, engine, batch, share, found, step, before))
        times.append(over_ranks(seconds, engine.device, "max"))
        tokens.append(over_ranks(int(batch["attention_mask"].sum()), engine.device, "sum"))
        rows.append({"step": step, "loss": over_ranks(loss.item(), engine.device)})
        if step % args.eval_every == 0 or step == args.steps:
            loss = held_out_loss(engine.module, data["held_out"], data["pad"], engine.device)
            rows.append({"step": step, "held_out_loss": loss})
    found["tokens_per_s"] = median(t / s for t, s in zip(tokens[2:], times[2:], strict=True))
    return found, rows


def measure(kind: str, rank: int | None, lr: float, data: dict, args: argparse.Namespace, device) -> dict:
    """Train one case; return its row. Collective."""
    before = live_tensor_bytes(device)
    get_accelerator().reset_peak_memory_stats()
    # the same alpha / r whatever the rank: the rate then means the same
    lora = {"rank": rank, "alpha": 2 * rank, "targets": args.targets} if kind == "lora" else {}
    engine = build_engine(kind, lr, args.steps, args, **lora)
    other = held_out_loss(engine.module, data["other"], data["pad"], device)
    found, rows = train(engine, data, args, before)
    other_after = held_out_loss(engine.module, data["other"], data["pad"], device)
    between = live_tensor_bytes(device) - before
    gradients = max(0, found.pop("with_gradients") - between)
    peak = between + max(found["activation_bytes"], gradients)
    parameters = list(engine.module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    row = {
        "kind": kind, "lora_rank": rank, "lr": lr, "stage": engine.zero_optimization_stage(),
        "trained": sum(map(numel, trained)), "share": sum(map(numel, trained)) / sum(map(numel, parameters)),
        "held_bytes": held_bytes(engine), "gradient_bytes": gradients, **found,
        "peak_bytes": peak if device.type == "cpu" else get_accelerator().max_memory_allocated(),
        "save_bytes": sum(numel(p) * p.element_size() for p in trained), "held_out_loss": held_out[-1],
        "improvement": held_out[0] - held_out[-1], "other_loss": other_after, "forgotten": other_after - other,
        "rows": rows,
    }  # fmt: skip
    engine.destroy()
    return row


def best(table: Table, kind: str) -> dict:
    """The row of this kind with the lowest held-out loss at its end."""
    rows = [row for row in table.rows if row.get("kind") == kind and "error" not in row]
    if not rows:
        raise UserError(f"no case of {kind!r} has trained: look at the rows above")
    return min(rows, key=lambda row: row["held_out_loss"])


def main() -> None:
    args = parse_args()
    if args.steps < 3:
        raise UserError(f"--steps {args.steps}: the first two are not timed, so take 3 at least")
    device = join_world()
    tokenizer = load_tokenizer(args.pretrained)
    train_items, held_out_items = load_chat(args.dataset, tokenizer, args.max_length)
    other_items = load_chat(args.other_corpus, tokenizer, args.max_length)[1][: args.other_samples]
    data = {"train": train_items, "held_out": held_out_items, "other": other_items, "pad": tokenizer.pad_token_id}
    table = Table(Path(args.run_dir) / "compare.json", COLUMNS)

    def add(kind: str, rank: int | None, lr: float) -> None:
        kept = live_tensors(device)
        with table.row(f"lora r={rank} lr={lr:g}" if kind == "lora" else f"full lr={lr:g}") as row:
            row |= measure(kind, rank, lr, data, args, device)
        free(device, kept)

    for lr in args.full_lrs:
        add("full", None, lr)
    for lr in args.lora_lrs:
        add("lora", args.lora_rank, lr)
    rate = best(table, "lora")["lr"]
    for rank in args.lora_ranks:
        add("lora", rank, rate)
    full, lora = best(table, "full"), best(table, "lora")
    share = lora["improvement"] / full["improvement"]
    print0(f"start {full['rows'][0]['held_out_loss']:.4f} | {lora['case']} gains {share:.0%} of {full['case']}")
    title = f"{args.pretrained}, {args.steps} steps, {dist.get_world_size()} ranks"
    if dist.get_rank() == 0:
        loras = [row for row in table.rows if row.get("kind") == "lora" and "error" not in row]
        shown = [full, *(row for row in loras if row["lr"] == rate)]
        plot_loss({row["case"]: row["rows"] for row in shown}, Path(args.run_dir) / "loss.png", title)
    table.bars("improvement", "held-out loss, nats less", title, name="gain")
    table.bars("forgotten", "loss on other text, nats more", title)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
