"""Day 23: compare - full fine-tuning against LoRA: same data, same steps, several learning rates and ranks each.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day23/labs/compare.py
    deepspeed --num_accelerators 2 day23/labs/compare.py --pretrained tiny-llama --steps 12
    deepspeed --num_accelerators 4 day23/labs/compare.py --steps 200 --lora_ranks 1 2 4 8 16 32 64 --max_length 512

Expect a row a run: what is trained, bytes, tokens/s, the held-out loss, and the loss on text that was not tuned on.
Checked with deepspeed 0.19.8 and peft 0.21.2. Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers.integrations import HfDeepSpeedConfig

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensor_bytes
from common.cpu import start_without_compiler
from common.data import to_device
from common.errors import clear_errors
from common.plots import plot_bars, plot_loss
from common.ranks import over_ranks, print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path
from day22.chat_data import answers, collate, endless_order, held_out_loss, load_chat
from day22.pretrained import load_model, load_tokenizer
from day23.lora import add_lora, held_bytes, numel

CONFIGS = {"full": HERE.parent / "day22/ds_config.json", "lora": HERE / "ds_config.json"}


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
    parser.add_argument("--run_dir", default=default_run_dir("day23"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--pretrained", default="smollm2", help="smollm2, a preset of day 22, a folder, a hub name")
    parser.add_argument(
        "--dataset", default="chat", help="chat, a JSON-lines file, a hub data set, or a shipped corpus"
    )
    parser.add_argument("--other_corpus", default="moby_dick", help="what must not be forgotten: as --dataset")
    parser.add_argument("--other_samples", type=int, default=16, help="held-out samples of --other_corpus")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sample")
    return parser.parse_args()


def read_config(kind: str, lr: float, args: argparse.Namespace) -> dict:
    """Day 22's JSON for full fine-tuning, this day's for LoRA, with the stage, rate and steps of this run."""
    config = json.loads(CONFIGS[kind].read_text())
    config["zero_optimization"] |= {"stage": args.stage}
    config["optimizer"]["params"]["lr"] = lr
    config["scheduler"]["params"]["total_num_steps"] = args.steps
    config["bf16"] = {"enabled": not args.fp32}
    if get_accelerator().device_name() != "cpu":
        config["optimizer"]["params"].pop("torch_adam", None)  # FusedAdam, compiled on first use
    return config


def measure(kind: str, rank: int | None, lr: float, data: dict, args: argparse.Namespace, before: int) -> dict:
    """Train one case; return its row."""
    get_accelerator().reset_peak_memory_stats()
    config = read_config(kind, lr, args)
    alive = HfDeepSpeedConfig(config)  # noqa: F841 - as in train.py
    model = load_model(args.pretrained, torch.float32 if args.fp32 else torch.bfloat16)
    torch.manual_seed(args.seed)
    if kind == "lora":  # the same alpha / r whatever the rank: the rate then means the same
        model = add_lora(model, rank, alpha=2 * rank, targets=args.targets)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    device, pad, rows, times, saved, tokens = engine.device, data["pad"], [], [], {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows.append({"step": 0, "held_out_loss": held_out_loss(model, data["held_out"], pad, device)})
    other = [held_out_loss(model, data["other"], pad, device)]
    order = endless_order(data["train"], engine.train_micro_batch_size_per_gpu(), args.seed)
    for step in range(1, args.steps + 1):
        batch = collate([data["train"][i] for i in next(order)], pad)
        share = over_ranks(answers(batch), device, "mean")
        get_accelerator().synchronize()
        start = time.perf_counter()
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor) if step == 1 else None
        if hooks:  # once: what autograd keeps until its backward pass
            with hooks:
                loss = engine(**to_device(batch, device), num_items_in_batch=share).loss
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            activations = sum(size for address, size in saved.items() if address not in weights)
        else:
            loss = engine(**to_device(batch, device), num_items_in_batch=share).loss
        engine.backward(loss)
        if step == 2:  # the first step makes the optimizer's states
            with_gradients = live_tensor_bytes(device) - before
        engine.step()
        get_accelerator().synchronize()
        times.append(time.perf_counter() - start)
        tokens.append(over_ranks(int(batch["attention_mask"].sum()), device, "sum"))
        rows.append({"step": step, "loss": over_ranks(loss.item(), device)})
        if step % args.eval_every == 0 or step == args.steps:
            rows.append({"step": step, "held_out_loss": held_out_loss(model, data["held_out"], pad, device)})
    del loss, batch
    other.append(held_out_loss(model, data["other"], pad, device))
    held, between, on_gpu = held_bytes(engine), live_tensor_bytes(device) - before, device.type != "cpu"
    peak = get_accelerator().max_memory_allocated() if on_gpu else between + max(activations, with_gradients - between)
    counts, stage = (sum(map(numel, trained)), sum(map(numel, model.parameters()))), engine.zero_optimization_stage()
    size = sum(numel(p) * p.element_size() for p in trained)
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    step_s = [over_ranks(one, device, "max") for one in times[2:]]
    name = f"lora r={rank} lr={lr:g}" if kind == "lora" else f"full lr={lr:g}"
    engine.destroy()
    return {
        "case": name, "kind": kind, "lora_rank": rank, "lr": lr, "stage": stage, "trained": counts[0],
        "share": counts[0] / counts[1], "held_bytes": held, "gradient_bytes": max(0, with_gradients - between),
        "activation_bytes": activations, "peak_bytes": peak, "save_bytes": size,
        "tokens_per_s": median(t / s for t, s in zip(tokens[2:], step_s, strict=True)),
        "held_out_loss": held_out[-1], "improvement": held_out[0] - held_out[-1], "other_loss": other[-1],
        "forgotten": other[-1] - other[0], "rows": rows,
    }  # fmt: skip


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    tokenizer = load_tokenizer(args.pretrained)
    train, held_out = load_chat(args.dataset, tokenizer, args.max_length)
    other = load_chat(args.other_corpus, tokenizer, args.max_length)[1][: args.other_samples]
    data = {"train": train, "held_out": held_out, "other": other, "pad": tokenizer.pad_token_id}
    device = torch.device(get_accelerator().current_device_name())
    before, table = live_tensor_bytes(device), []
    heads = ["trained", "share", "optim MB", "peak MB", "save MB", "tok/s", "held out", "other text"]
    print0(f"{'case':20}" + "".join(f"{head:>13}" for head in heads))

    def add(kind: str, rank: int | None, lr: float) -> None:
        row = measure(kind, rank, lr, data, args, before)
        gc.collect()
        get_accelerator().empty_cache()
        table.append(row)
        sizes = [f"{n / 1e6:.1f}" for n in (row["held_bytes"]["optimizer"], row["peak_bytes"], row["save_bytes"])]
        cells = [f"{row['trained']:,}", f"{row['share']:.2%}", *sizes, f"{row['tokens_per_s']:.0f}"]
        cells += [f"{row['held_out_loss']:.4f}", f"{row['forgotten']:+.4f}"]
        print0(f"{row['case']:20}" + "".join(f"{cell:>13}" for cell in cells))
        if dist.get_rank() == 0:
            write_results(Path(args.run_dir) / "compare.json", this_command(), table=table)

    def best(kind: str) -> dict:
        return min((row for row in table if row["kind"] == kind), key=lambda row: row["held_out_loss"])

    for lr in args.full_lrs:
        add("full", None, lr)
    for lr in args.lora_lrs:
        add("lora", args.lora_rank, lr)
    rate = best("lora")["lr"]
    for rank in args.lora_ranks:
        add("lora", rank, rate)
    full, lora = best("full"), best("lora")
    share = lora["improvement"] / full["improvement"]
    print0(f"start {table[0]['rows'][0]['held_out_loss']:.4f} | {lora['case']} gains {share:.0%} of {full['case']}")
    if dist.get_rank() == 0:
        folder = Path(args.run_dir)
        title = f"{args.pretrained}, {args.steps} steps, {dist.get_world_size()} ranks"
        shown = [full, *(row for row in table if row["kind"] == "lora" and row["lr"] == rate)]
        plot_loss({row["case"]: row["rows"] for row in shown}, folder / "loss.png", title)
        gains, forgotten = ({row["case"]: row[key] for row in table} for key in ("improvement", "forgotten"))
        plot_bars(gains, folder / "gain.png", title, "held-out loss, nats less")
        plot_bars(forgotten, folder / "forgotten.png", title, "loss on other text, nats more")
        print0(f"table: {show_path(folder)}/compare.json | plots: loss.png, gain.png, forgotten.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
