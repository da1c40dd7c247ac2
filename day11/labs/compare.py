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
import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free, peak_bytes, saved_for_backward
from bench.table import Table
from bench.timing import slowest_median, time_step
from bench.world import join_world
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.plots import plot_loss
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.read import read_config
from day11.precision import NAMES, computed_bytes, emulate_fp16, forget_autocast, held_bytes, loss_scale

CASES = {  # the config of day11/, and the ZeRO stage where it is not the config's
    "fp32": ("_fp32", None), "bf16": ("", None), "fp16": ("_fp16", None), "autocast_bf16": ("_autocast_bf16", None),
    "autocast_fp16": ("_autocast_fp16", None), "fp16_unscaled": ("_fp16_unscaled", None),
    "bf16_states": ("_bf16_states", None),
}  # fmt: skip
TRAPS = {"bf16_zero0": ("", 0), "fp16_zero0": ("_fp16", 0), "autocast_fp16_zero1": ("_autocast_fp16", 1)}
COMPILE = {"bf16_master": ("_bf16_master", None), "fp16_master": ("_fp16_master", None)}  # DeepSpeedCPUAdam: g++, ninja

KINDS = ("parameters", "gradients", "masters", "moments")
COLUMNS = {
    "loss": "losses.-1:.4f", "diff": "difference:.1e", "scale": "loss_scale:,.0f", "skipped": "skipped_steps:d",
    "param.": "held_bytes.parameters:MB", "grad.": "held_bytes.gradients:MB", "masters": "held_bytes.masters:MB",
    "moments": "held_bytes.moments:MB", "precision of these": "precisions:s", "saved": "saved_in_all_bytes:MB",
    "peak": "peak_bytes:MB", "tok/s": "tokens_per_s:.0f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [*CASES, *TRAPS, *COMPILE]
    parser.add_argument("--cases", nargs="+", choices=cases, default=[*CASES], help="what to train, in this order")
    parser.add_argument("--global_batch", type=int, default=4, help="sequences an optimizer step, all ranks together")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate; a bold one magnifies rounding: day 02")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day11"), help="folder for compare.json and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def case_config(case: str, args: argparse.Namespace) -> dict:
    """The config of a case, with the batch and learning rate of the command line."""
    variant, stage = {**CASES, **TRAPS, **COMPILE}[case]
    config = read_config(HERE / f"ds_config{variant}.json")
    config["train_micro_batch_size_per_gpu"] = args.global_batch // dist.get_world_size()
    config["optimizer"]["params"]["lr"] = args.lr
    if stage is not None:
        config["zero_optimization"] = {"stage": stage} | ({"reduce_bucket_size": 500_000} if stage else {})
    if get_accelerator().device_name() != "cpu" and case not in COMPILE:
        config["optimizer"]["params"]["fused"] = True  # PyTorch's own: one kernel, and nothing to compile
    return config


def train_step(engine: deepspeed.DeepSpeedEngine, batch: dict) -> torch.Tensor:
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def look_into_step(engine: deepspeed.DeepSpeedEngine, batch: dict) -> tuple[torch.Tensor, dict]:
    """A step; return its loss, and the bytes saved for its backward pass and those held after it, by precision."""
    with saved_for_backward(engine.module.parameters()) as saved:
        loss = engine(**batch).loss
    engine.backward(loss)
    local_loss = loss.detach()
    del loss
    found = {"held": held_bytes(engine), "saved_bytes": {name: saved.get(dtype, 0) for dtype, name in NAMES.items()}}
    engine.step()
    return local_loss, found


def measure(case: str, blocks, held_out_blocks, vocab_size: int, args: argparse.Namespace, device) -> dict:
    """Train one case: losses, loss scale, bytes of the rank that holds most, tokens/s (median after the first five)."""
    get_accelerator().reset_peak_memory_stats()
    torch.manual_seed(args.seed)
    with device:
        model = build_model(args.model, vocab_size)
    sizes = [parameter.numel() for parameter in model.parameters()]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=case_config(case, args))
    sampler = DistributedSampler(blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(blocks, engine.train_micro_batch_size_per_gpu(), sampler=sampler, drop_last=True)
    batches = endless_batches(loader)
    losses, seconds = [], []
    for step in range(args.steps):
        batch = to_device(next(batches), device)
        if step == 1:  # it takes longer, and is not timed
            loss, found = look_into_step(engine, batch)
        else:
            step_s, loss = time_step(partial(train_step, engine, batch))
            seconds.append(step_s)
        losses.append(over_ranks(loss.item(), device))
        del loss  # or the next step's look would count it
    peak = None if device.type == "cpu" else over_ranks(peak_bytes(device), device, "max")
    total = {kind: sum(precisions.values()) for kind, precisions in found["held"].items()}
    precision = {kind: max(of, key=of.get) if total[kind] else "–" for kind, of in found["held"].items()}
    row = {"stage": engine.zero_optimization_stage(), **found, "held_bytes": total, "precision": precision}
    row["precisions"] = "/".join(precision[kind] for kind in KINDS)
    row["saved_in_all_bytes"] = sum(found["saved_bytes"].values())
    row["computed_bytes"] = computed_bytes(engine, sizes)
    row["between_steps_bytes"] = sum(total[kind] for kind in ("parameters", "masters", "moments"))
    row |= {"loss_scale": loss_scale(engine), "skipped_steps": engine.skipped_steps, "peak_bytes": peak}
    step_s = slowest_median(seconds, device, warm_up=4)
    row |= {"tokens_per_s": args.global_batch * blocks.block_size / step_s, "losses": losses}
    row["held_out_loss"] = held_out_loss(engine, held_out_blocks, device, max_blocks=16)
    engine.destroy()
    return row


def draw_losses(rows: list[dict], folder: Path, title: str) -> None:
    """The loss curves, and their distance to the first case's."""
    first = rows[0]["losses"]
    curves, apart = {}, {}
    for row in rows:
        steps = list(enumerate(row["losses"], start=1))
        curves[row["case"]] = [{"step": step, "loss": loss} for step, loss in steps]
        if row is not rows[0]:
            apart[row["case"]] = [{"step": step, "loss": loss - first[step - 1]} for step, loss in steps]
    plot_loss(curves, folder / "loss.png", title)
    if apart:
        plot_loss(apart, folder / "difference.png", f"{title}: loss minus the loss of {rows[0]['case']}")


def main() -> None:
    args = parse_args()
    emulate_fp16()
    device = join_world()
    num_ranks = dist.get_world_size()
    if args.global_batch < num_ranks or args.global_batch % num_ranks:
        raise UserError(f"--global_batch {args.global_batch} does not divide by {num_ranks} ranks")
    if args.steps < 2:
        raise UserError(f"--steps {args.steps}: the bytes are counted in step 2, take at least 2")
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    gc.freeze()  # what is here now is no case's: walks over the live tensors no longer see it, and are fast
    print0(
        "MB on the rank that holds most; saved: for the backward pass; diff: largest of the losses to the first case's"
    )
    folder, title = Path(args.run_dir), f"{args.model}, {num_ranks} rank{'s' * (num_ranks > 1)}"
    table = Table(folder / "compare.json", COLUMNS, width=20, ranks=num_ranks, model=args.model)
    for case in args.cases:
        kept = live_tensors(device)
        with table.row(case) as row:
            row |= measure(case, blocks, held_out_blocks, len(tokenizer), args, device)
            row["difference"] = table.from_first(row)
        free(device, kept)
        forget_autocast()
    trained = [row for row in table.rows if "error" not in row]
    if trained and dist.get_rank() == 0:
        draw_losses(trained, folder, title)
    table.bars("between_steps_bytes", "MB a rank between steps", title, name="memory", scale=1e6)
    table.bars("tokens_per_s", "tokens/s", title, name="speed")
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
