"""Day 13: a training that is watched - signals, ranks compared by hash, a hang noticed, the flight recorder on.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day13/train.py
    deepspeed --num_accelerators 2 day13/train.py --log_every 1 --steps 10

Expect the log line of every day, and below it what is watched; at the end what DeepSpeed's monitor wrote by itself and
what it was handed, and how many collectives the flight recorder holds.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/tutorials/monitor/, day13/notes.md
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
from torch.utils.data import DataLoader, DistributedSampler
from transformers import set_seed

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0
from common.run_log import RunLog, default_run_dir
from config.read import read_config
from day13.flight import dump, read, turn_on
from day13.signals import Watch, first_signals
from day13.stuck import join_with_timeout, of_rank_0, watch_for_hangs

DRAWN = ("loss", "grad_norm", "update_ratio", "least_ratio", "skipped", "memory_gib")  # handed to the monitor


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=10, help="optimizer steps between two log lines")
    parser.add_argument("--hang_after", type=float, default=60, help="seconds without a step until a rank reports")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day13"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="moby_dick", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def report(engine: deepspeed.DeepSpeedEngine, rows: list[dict], log: RunLog) -> None:
    """Write the newest row of signals to metrics.jsonl and to the monitor, and print what shows for the first time."""
    row = rows[-1]
    log.record(watch=row)
    events = [(f"Watch/{name}", row[name], engine.global_samples) for name in DRAWN if row[name] is not None]
    engine.monitor.write_events(events)  # (4) or the monitor would have the rate alone
    norm = row["grad_norm"] or float("nan")  # nobody computes it at ZeRO-0 in fp32
    print0(f"  gradient {norm:.2f} | update/weight {row['update_ratio']:.1e} | rate {row['lr']:.1e}")
    for signal in first_signals(rows).keys() - first_signals(rows[:-1]).keys():  # (5) the rules, over all rows so far
        print0(f"  SIGNAL at step {row['step']}: {signal} {'; '.join(row['disagreements'])}")


def main() -> None:
    args = parse_args()
    turn_on(Path(args.run_dir) / "flight")  # (1) before the process group: the flight recorder
    device = join_with_timeout(600)  # (2) no collective of any group waits longer
    run_dir = Path(of_rank_0(args.run_dir))  # all ranks' dumps in one folder
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    set_seed(args.seed)  # random, numpy and torch, on every rank alike: then they can be compared
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)
    config = read_config(args.deepspeed_config)
    if "csv_monitor" in config:
        config["csv_monitor"]["output_path"] = str(run_dir / "monitor")  # a folder a run
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    if engine.gradient_accumulation_steps() > 1:
        raise UserError(f"accumulation in {args.deepspeed_config}: this day's loop is one micro-batch a step (day 10)")
    micro_batch, watch, rows = engine.train_micro_batch_size_per_gpu(), Watch(engine), []
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    batches = endless_batches(DataLoader(train_blocks, micro_batch, sampler=sampler, drop_last=True))
    print0(
        f"zero stage {engine.zero_optimization_stage()} | {len(watch.matrices())} matrices watched"
        f" | monitor {engine.monitor.enabled} | hang after {args.hang_after:g} s | {device.type}"
    )

    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    log.held_out(0, held_out_loss(engine, held_out_blocks, device, max_blocks=64))
    with watch_for_hangs(args.hang_after, run_dir / "flight") as beat:
        for step in range(1, args.steps + 1):
            beat()  # (3) a step without a beat for so long is a hang
            batch = to_device(next(batches), device)
            watch.see(step, batch)
            logged = step == 1 or step % args.log_every == 0
            before = watch.matrices() if logged else None
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            log.step(step, loss.detach(), tokens=batch["input_ids"].numel())
            if logged:
                rows.append(watch.after_step(step, loss, batch, before))
                report(engine, rows, log)
        beat()
        log.held_out(args.steps, held_out_loss(engine, held_out_blocks, device, max_blocks=64))
    log.close()
    dump(run_dir / "flight")
    torch.distributed.barrier()
    calls = [len(ranks[0]) for ranks in read(run_dir / "flight").values()]
    print0(f"signals: {first_signals(rows) or 'none'}")
    agreed = sum(not row["disagreements"] for row in rows)
    print0(
        f"flight recorder: {sum(calls)} collectives in {len(calls)} groups | ranks agreed {agreed} of {len(rows)} times"
    )
    if engine.global_rank == 0:
        print0(f"monitor: {', '.join(sorted(path.stem for path in run_dir.glob('monitor/*/*.csv')))}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
