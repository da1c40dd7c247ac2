"""Day 24: train on several hosts, so that a lost host costs the steps since the last checkpoint and nothing else.

From the repository root, on two CPU processes or two GPUs; on two hosts, after `make lab` or with a hostfile of yours:

    deepspeed --num_accelerators 2 day24/train.py
    deepspeed --hostfile runs/lab/hostfile day24/train.py --run_dir runs/day24/mine --timeout_s 8
    python day24/supervise.py "deepspeed --hostfile runs/lab/hostfile day24/train.py --run_dir runs/day24/mine"

Expect a line that says which ranks are on which host and that code and config are the same there; then day 18's run.
Checked with deepspeed 0.19.8. Source: deepspeed/launcher/runner.py, deepspeed/comm/comm.py (init_distributed).
"""

import argparse
import os
import platform
import sys
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Take the modules of days 17, 18 and 24 along, and replace the others with your own.
from common.cpu import start_without_compiler
from common.data import load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir, read_rows, show_path
from config.read import read_config
from day17 import checkpoints as ckpt
from day17.saving import save
from day18.loading import load_safely
from day24.watch import Beats, fingerprint, require_same

START_S = 120  # hosts start at different moments: the first meeting may take longer than a step ever does


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day24"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--save_every", type=int, default=10, help="optimizer steps between two checkpoints")
    parser.add_argument("--keep_last", type=int, default=2, help="checkpoints kept, beside the best one")
    parser.add_argument("--timeout_s", type=float, default=60, help="a collective that takes longer is an error")
    parser.add_argument("--host_log", default=None, help="folder on each host's own disk for a log of each rank")
    return parser.parse_args()


def join_hosts(timeout_s: float) -> None:
    """Join the process group, and give it and every group made later `timeout_s`. Collective."""
    deepspeed.init_distributed(timeout=timedelta(seconds=START_S))
    dist.barrier()
    patience, new_group = timedelta(seconds=timeout_s), dist.new_group
    dist.distributed_c10d._set_pg_timeout(patience)
    # DeepSpeed trains in groups of its own, and gives them no time-out: PyTorch's 30 minutes (10 with NCCL)
    dist.new_group = lambda *args, **kwargs: new_group(*args, **{"timeout": patience, **kwargs})


def choose(root: Path, config: dict) -> tuple[Path | None, dict]:
    """Return the checkpoint to load and its manifest; switch the config to universal loading on other ranks."""
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
        return None, {}
    facts = ckpt.read_manifest(found)
    if facts["ranks"] != dist.get_world_size():
        universal = root / f"universal_{found.name}"
        if problem := ckpt.problem_with(universal):
            change = f"{found.name} was saved by {facts['ranks']} ranks, this run has {dist.get_world_size()}"
            raise UserError(f"{change}; first: python day18/convert.py {show_path(root)} ({universal.name}: {problem})")
        config.setdefault("checkpoint", {})["load_universal"] = True
        found = universal
    return found, facts


def train(args: argparse.Namespace, config: dict, beats: Beats, stop: ckpt.StopSignals) -> None:
    root = Path(args.run_dir) / "checkpoints"
    join_hosts(args.timeout_s)
    require_same(fingerprint(args.deepspeed_config))
    hosts = ckpt.from_all_ranks(platform.node())
    placed = " | ".join(
        f"{h}: rank {', '.join(str(r) for r, o in enumerate(hosts) if o == h)}" for h in dict.fromkeys(hosts)
    )
    found, facts = choose(root, config)
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)

    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    start = sequences = 0
    if found:
        path, state = engine.load_checkpoint(str(found.parent), tag=found.name)
        if path is None:  # DeepSpeed only warns, and would train on from fresh weights
            raise UserError(f"DeepSpeed loaded nothing from {found}")
        start, sequences = state["step"], state["sequences"]
    print0(f"hosts {placed} | same code and config | time-out {args.timeout_s:g} s | {engine.device.type}")
    print0(
        f"resume: {found.name if found else 'no checkpoint'}, step {start}, global batch {engine.train_batch_size()}"
    )

    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    order = ckpt.GlobalOrder(len(train_blocks), micro_batch, args.seed, start=sequences)
    batches = iter(DataLoader(train_blocks, batch_size=micro_batch, sampler=order))
    logged = start and dist.get_rank() == 0 and (Path(args.run_dir) / "metrics.jsonl").exists()
    kept = [row for row in read_rows(args.run_dir) if row["step"] <= start] if logged else []
    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    for row in kept:
        log.record(**row)
    for step in range(start + 1, args.steps + 1):
        local_loss = 0.0
        for _ in range(accumulation):
            beats.beat(step, "batch")
            batch = to_device(next(batches), engine.device)
            beats.beat(step, "compute")
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel())
        beats.beat(step, "boundary")
        stopped_by = stop.agreed()
        if step % args.save_every == 0 or step == args.steps or stopped_by:
            save(engine, root, step, args.keep_last, None)
        if stopped_by:
            print0(f"stopped by {stopped_by} after step {step}, which is saved: the same command continues")
            break
    else:
        ckpt.mark_finished(Path(args.run_dir), args.steps)
    log.close()
    beats.beat(args.steps, "done")


def main() -> None:
    args = parse_args()
    require_launcher()
    if min(args.save_every, args.keep_last) < 1 or args.timeout_s <= 0:
        flags = f"--save_every {args.save_every} --keep_last {args.keep_last} --timeout_s {args.timeout_s:g}"
        raise UserError(f"{flags}: all three must be positive")
    config = read_config(args.deepspeed_config)
    start_without_compiler()
    load_safely()
    stop = ckpt.StopSignals()
    beats = Beats(args.run_dir, int(os.environ["RANK"]), args.host_log)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    with beats.last_words():
        train(args, config, beats, stop)
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
