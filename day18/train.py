"""Day 18: resume - from the newest checkpoint that verifies, to the bit; on other ranks or at another stage as well.

From the repository root, on two CPU processes or two GPUs; the second command continues what the first began:

    deepspeed --num_accelerators 2 day18/train.py --run_dir runs/day18/mine --steps 30
    deepspeed --num_accelerators 2 day18/train.py --run_dir runs/day18/mine --steps 60
    python day18/convert.py runs/day18/mine/checkpoints
    deepspeed --num_accelerators 1 day18/train.py --run_dir runs/day18/mine --steps 80

Expect a sentence that says where it starts and which checkpoints it does not trust and why; then training as on day 17.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py, load_checkpoint.
"""

import argparse
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Take the last three of these along, and replace the others with your own data, model and logger.
from common.cpu import start_without_compiler
from common.data import held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir, read_rows, show_path
from config.read import read_config
from day17 import checkpoints as ckpt
from day17.saving import save
from day18.loading import load_safely
from day18.supervise import Heartbeat


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day18"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--save_every", type=int, default=10, help="optimizer steps between two checkpoints")
    parser.add_argument("--keep_last", type=int, default=2, help="checkpoints kept, beside the best one")
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout: each rank draws its own random numbers")
    return parser.parse_args()


def choose(root: Path, config: dict) -> tuple[Path | None, dict]:
    """Return the checkpoint to load and its manifest; switch the config to universal loading where it needs that."""
    found, rejected = ckpt.newest_good(root)
    for sentence in rejected:
        print0(f"not trusted: {sentence}")
    if rejected and found is None:
        raise UserError(f"none of the {len(rejected)} checkpoints in {show_path(root)} is whole: move them away first")
    with ckpt.all_or_none("clearing up", root):
        if dist.get_rank() == 0:
            ckpt.clear_up(root, found)
            (root.parent / ckpt.FINISHED).unlink(missing_ok=True)  # of an earlier command with fewer steps
    if found is None:
        print0(f"resume: no checkpoint in {show_path(root)}, starting at step 0")
        return None, {}
    facts, stage = ckpt.read_manifest(found), config.get("zero_optimization", {}).get("stage", 0)
    made, now = (facts["ranks"], facts["zero_stage"]), (dist.get_world_size(), stage)
    if made != now:
        universal = root / f"universal_{found.name}"
        change = (
            f"{found.name} was saved by {made[0]} ranks at stage {made[1]}, this run has {now[0]} at stage {now[1]}"
        )
        if 0 in (made[1], stage):
            raise UserError(f"{change}: only checkpoints of stages 1 to 3 convert, and only for those stages")
        if problem := ckpt.problem_with(universal):
            raise UserError(f"{change}; first: python day18/convert.py {show_path(root)} ({universal.name}: {problem})")
        print0(f"resume: {change}: loading {universal.name}")
        config.setdefault("checkpoint", {})["load_universal"] = True
        found, facts = universal, ckpt.read_manifest(universal)
    print0(f"resume: {found.name}, {len(facts['files'])} files verified, continuing after step {facts['step']}")
    return found, facts


def load(engine: deepspeed.DeepSpeedEngine, found: Path, facts: dict) -> tuple[int, int]:
    """Load the checkpoint `found` into the engine; return its step and the sequences seen so far. Collective."""
    path, client_state = engine.load_checkpoint(str(found.parent), tag=found.name)
    if path is None:  # DeepSpeed only warns, and would train on from fresh weights
        raise UserError(f"DeepSpeed loaded nothing from {found}")
    if facts["global_batch"] != engine.train_batch_size():
        print0(f"note: the batch was {facts['global_batch']} and is {engine.train_batch_size()}: other losses follow")
    return client_state["step"], client_state["sequences"]


def continue_log(args: argparse.Namespace, start: int, device: torch.device) -> RunLog:
    """Open the run's log anew; metrics.jsonl goes on where the checkpoint was, after step `start`. Collective."""
    logged = start and dist.get_rank() == 0 and (Path(args.run_dir) / "metrics.jsonl").exists()
    kept = [row for row in read_rows(args.run_dir) if row["step"] <= start] if logged else []
    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    for row in kept:
        log.record(**row)
    return log


def main() -> None:
    args = parse_args()
    require_launcher()
    if min(args.save_every, args.keep_last) < 1:
        raise UserError(f"--save_every {args.save_every} --keep_last {args.keep_last}: both must be at least 1")
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout {args.dropout}: the part of the activations to drop, from 0 to less than 1")
    config = read_config(args.deepspeed_config)
    start_without_compiler()
    load_safely()
    stop, root = ckpt.StopSignals(), Path(args.run_dir) / "checkpoints"
    heart = Heartbeat(args.run_dir, int(os.environ["RANK"]))  # after the handlers: a supervisor may signal from now on
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    found, facts = choose(root, config)
    universal = found and found.name.startswith("universal_")
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)
    for module in (part for part in model.modules() if isinstance(part, torch.nn.Dropout)):
        module.p = args.dropout

    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    start, sequences = load(engine, found, facts) if found else (0, 0)
    print0(f"zero stage {engine.zero_optimization_stage()} | step {engine.global_steps} | {engine.device.type}")

    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    order = ckpt.GlobalOrder(len(train_blocks), micro_batch, args.seed, start=sequences)
    batches = iter(DataLoader(train_blocks, batch_size=micro_batch, sampler=order))
    ckpt.seed_all(args.seed * 1000 + engine.global_rank)  # from here on, each rank its own dropout masks
    if found and not universal:  # after iter(DataLoader), which draws a random number; client_state has rank 0's on all
        mine = found / f"random_rank_{engine.global_rank}.pt"
        ckpt.set_random_state(torch.load(mine, weights_only=True), engine.device)
    log = continue_log(args, start, engine.device)
    for step in range(start + 1, args.steps + 1):
        local_loss = 0.0
        for _ in range(accumulation):
            heart.beat(step, "batch")
            batch = to_device(next(batches), engine.device)
            heart.beat(step, "compute")
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel())
        heart.beat(step, "boundary")
        stopped_by = stop.agreed()
        if step % args.save_every == 0 or step == args.steps or stopped_by:
            held_out = None if stopped_by else held_out_loss(engine, held_out_blocks, engine.device, max_blocks=64)
            save(engine, root, step, args.keep_last, held_out)
        if stopped_by:
            print0(f"stopped by {stopped_by} after step {step}, which is saved: the same command continues")
            break
    else:
        ckpt.mark_finished(Path(args.run_dir), args.steps)
    log.close()
    heart.beat(args.steps, "done")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
