"""Day 11: all precisions side by side - loss curves on the same batches, bytes by kind and precision, speed, memory.

From the repository root, on two CPU processes or GPUs (fp16 on CPU takes ten times as long):

    deepspeed --num_accelerators 2 day11/labs/compare.py
    deepspeed --num_accelerators 2 day11/labs/compare.py --cases fp32 bf16_zero0 fp16_zero0 autocast_fp16_zero1
    deepspeed --num_accelerators 1 day11/labs/compare.py --model gpt2 --global_batch 8

Expect a table, and compare.json, loss.png, difference.png, memory.png and speed.png in the run folder. All cases train
in one process group, with the same first weights and batches. The second command shows what goes wrong in 0.19.8.
Checked with deepspeed 0.19.8. Source: arXiv:1710.03740; deepspeed/runtime/engine.py, zero/stage_1_and_2.py.
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
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from common.cpu import start_without_compiler
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.plots import plot_bars, plot_loss
from common.ranks import over_ranks, print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path
from day11.precision import NAMES, computed_bytes, emulate_fp16, forget_autocast, held_bytes, loss_scale

CASES = {  # the config of day11/, and the ZeRO stage where it is not the config's
    "fp32": ("_fp32", None), "bf16": ("", None), "fp16": ("_fp16", None), "autocast_bf16": ("_autocast_bf16", None),
    "autocast_fp16": ("_autocast_fp16", None), "fp16_unscaled": ("_fp16_unscaled", None),
    "bf16_states": ("_bf16_states", None),
}  # fmt: skip
TRAPS = {"bf16_zero0": ("", 0), "fp16_zero0": ("_fp16", 0), "autocast_fp16_zero1": ("_autocast_fp16", 1)}
COMPILE = {"bf16_master": ("_bf16_master", None), "fp16_master": ("_fp16_master", None)}  # DeepSpeedCPUAdam: g++, ninja


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [*CASES, *TRAPS, *COMPILE]
    parser.add_argument("--cases", nargs="+", choices=cases, default=[*CASES], help="what to train, in this order")
    parser.add_argument("--global_batch", type=int, default=4, help="sequences an optimizer step, all ranks together")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate; a bold one magnifies rounding: day 02")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day11"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def read_config(case: str, args: argparse.Namespace) -> dict:
    """The config of a case, with the batch and learning rate of the command line."""
    variant, stage = {**CASES, **TRAPS, **COMPILE}[case]
    config = json.loads((HERE / f"ds_config{variant}.json").read_text())
    config["train_micro_batch_size_per_gpu"] = args.global_batch // dist.get_world_size()
    config["optimizer"]["params"]["lr"] = args.lr
    if stage is not None:
        config["zero_optimization"] = {"stage": stage} | ({"reduce_bucket_size": 500_000} if stage else {})
    if get_accelerator().device_name() != "cpu" and case not in COMPILE:
        config["optimizer"]["params"]["fused"] = True  # PyTorch's own: one kernel, and nothing to compile
    return config


def forward(engine: deepspeed.DeepSpeedEngine, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
    """Return (loss, {precision: bytes saved for the backward pass}); the parameters themselves do not count."""
    saved, parameters = {}, {p.untyped_storage().data_ptr() for p in engine.module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype in NAMES and tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.dtype, tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine(**batch).loss
    return loss, {name: sum(size for kind, size in saved.values() if kind == dtype) for dtype, name in NAMES.items()}


def measure(case: str, blocks, held_out_blocks, vocab_size: int, args: argparse.Namespace, device) -> dict:
    """Train one case: losses, loss scale, bytes of the rank that holds most, tokens/s (median after the first five)."""
    get_accelerator().reset_peak_memory_stats()
    torch.manual_seed(args.seed)
    with device:
        model = build_model(args.model, vocab_size)
    sizes = [parameter.numel() for parameter in model.parameters()]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=read_config(case, args))
    sampler = DistributedSampler(blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(blocks, engine.train_micro_batch_size_per_gpu(), sampler=sampler, drop_last=True)
    batches = endless_batches(loader)
    losses, times = [], []
    for step in range(args.steps):
        batch = to_device(next(batches), device)
        get_accelerator().synchronize()
        start = time.perf_counter()
        if step == 1:  # the step that is looked into; its time is left out
            loss, saved = forward(engine, batch)
        else:
            loss = engine(**batch).loss
        engine.backward(loss)
        local_loss = loss.detach()
        del loss
        if step == 1:
            held = held_bytes(engine)
        engine.step()
        get_accelerator().synchronize()
        times.append(time.perf_counter() - start)
        losses.append(over_ranks(local_loss.item(), device))
    peak = None if device.type == "cpu" else over_ranks(get_accelerator().max_memory_allocated(), device, "max")
    total = {kind: sum(precisions.values()) for kind, precisions in held.items()}
    between = sum(total[kind] for kind in ("parameters", "masters", "moments"))
    row = {"case": case, "stage": engine.zero_optimization_stage(), "held": held, "held_bytes": total}
    row |= {"precision": {kind: max(of, key=of.get) if total[kind] else "–" for kind, of in held.items()}}
    row |= {"computed_bytes": computed_bytes(engine, sizes), "between_steps_bytes": between, "saved_bytes": saved}
    row |= {"loss_scale": loss_scale(engine), "skipped_steps": engine.skipped_steps, "peak_bytes": peak}
    step_s = over_ranks(median(times[5:] or times), device, "max")
    row |= {"tokens_per_s": args.global_batch * blocks.block_size / step_s, "losses": losses}
    row["held_out_loss"] = held_out_loss(engine, held_out_blocks, device, max_blocks=16)
    engine.destroy()
    return row


def free(device: torch.device) -> None:
    """Empty what a case made, and forget autocast: `engine.destroy()` leaves both (0.19.8)."""
    for tensor in live_tensors(device).values():
        if tensor.untyped_storage().resizable():
            tensor.untyped_storage().resize_(0)
    get_accelerator().empty_cache()
    forget_autocast()


def draw(table: list[dict], folder: Path, title: str) -> None:
    """The loss curves; their distance to the first case's; bytes held between steps; speed."""
    curves = {row["case"]: list(enumerate(row["losses"], start=1)) for row in table}
    runs = {case: [{"step": step, "loss": loss} for step, loss in curve] for case, curve in curves.items()}
    plot_loss(runs, folder / "loss.png", title)
    first = table[0]["losses"]
    apart = {
        case: [{"step": step, "loss": loss - first[step - 1]} for step, loss in curve]
        for case, curve in list(curves.items())[1:]
    }
    if apart:
        plot_loss(apart, folder / "difference.png", f"{title}: loss minus the loss of {table[0]['case']}")
    held = {row["case"]: row["between_steps_bytes"] / 1e6 for row in table}
    plot_bars(held, folder / "memory.png", title, "MB a rank between steps")
    plot_bars({row["case"]: row["tokens_per_s"] for row in table}, folder / "speed.png", title, "tokens/s")


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    emulate_fp16()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    num_ranks, device = dist.get_world_size(), torch.device(get_accelerator().current_device_name())
    if args.global_batch < num_ranks or args.global_batch % num_ranks:
        raise UserError(f"--global_batch {args.global_batch} does not divide by {num_ranks} ranks")
    if args.steps < 2:
        raise UserError(f"--steps {args.steps}: the bytes are counted in step 2, take at least 2")
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    gc.freeze()  # what is here now is no case's: walks over the live tensors no longer see it, and are fast
    table = []
    print0(
        "MB on the rank that holds most; saved: for the backward pass; diff: largest of the losses to the first case's"
    )
    heads = ["loss", "diff", "scale", "skipped", "param.", "grad.", "masters", "moments", "saved", "peak", "tok/s"]
    print0(f"{'case':20}" + "".join(f"{head:>13}" for head in heads))
    for case in args.cases:
        row = measure(case, blocks, held_out_blocks, len(tokenizer), args, device)
        free(device)
        table.append(row)
        row["difference"] = max(abs(a - b) for a, b in zip(row["losses"], table[0]["losses"], strict=True))
        cells = [f"{row['losses'][-1]:.4f}", f"{row['difference']:.1e}", row["loss_scale"] or "-", row["skipped_steps"]]
        cells += [f"{row['held_bytes'][k] / 1e6:.2f} {row['precision'][k]}" for k in list(row["held_bytes"])[:4]]
        cells += [f"{sum(row['saved_bytes'].values()) / 1e6:.2f}", f"{(row['peak_bytes'] or 0) / 1e6:.2f}"]
        print0(f"{case:20}" + "".join(f"{cell!s:>13}" for cell in [*cells, f"{row['tokens_per_s']:.0f}"]))

    if dist.get_rank() == 0:
        folder = Path(args.run_dir)
        write_results(folder / "compare.json", this_command(), ranks=num_ranks, model=args.model, table=table)
        draw(table, folder, f"{args.model}, {num_ranks} ranks")
        print0(f"table: {show_path(folder)}/compare.json | plots: loss, difference, memory, speed.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
