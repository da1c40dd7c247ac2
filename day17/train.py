"""Day 17: save checkpoints - every N steps, on a scheduler's signal, the last K and the best, each whole or not there.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day17/train.py --run_dir runs/day17/mine
    deepspeed --num_accelerators 2 day17/train.py --deepspeed_config day17/ds_config_zero3.json
    python day17/checkpoints.py runs/day17/mine/checkpoints

Expect a line for each checkpoint: its bytes, how long training stood still, which ones are kept. Day 18 continues.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py, save_checkpoint.
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Take day17/checkpoints.py along, and replace the others with your own data, model and logger.
from common.cpu import start_without_compiler
from common.data import held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir, show_path
from day17 import checkpoints as ckpt
from day17.saving import save


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day17"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--save_every", type=int, default=10, help="optimizer steps between two checkpoints")
    parser.add_argument("--keep_last", type=int, default=2, help="checkpoints kept, beside the best one")
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout: each rank draws its own random numbers")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_launcher()
    if min(args.save_every, args.keep_last) < 1:
        raise UserError(f"--save_every {args.save_every} --keep_last {args.keep_last}: both must be at least 1")
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout {args.dropout}: the part of the activations to drop, from 0 to less than 1")
    start_without_compiler()
    stop = ckpt.StopSignals()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)
    for module in (part for part in model.modules() if isinstance(part, torch.nn.Dropout)):
        module.p = args.dropout

    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    root = Path(args.run_dir) / "checkpoints"
    if ckpt.checkpoints(root):
        raise UserError(f"{show_path(root)} has checkpoints: take another --run_dir, or continue with day18/train.py")
    if engine.global_rank == 0:
        ckpt.clear_up(root, None)  # what a run left that was killed in its first save
    print0(
        f"zero stage {engine.zero_optimization_stage()} | saves every {args.save_every} steps | {engine.device.type}"
    )
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    order = ckpt.GlobalOrder(len(train_blocks), micro_batch, args.seed)  # each rank its own blocks
    batches = iter(DataLoader(train_blocks, batch_size=micro_batch, sampler=order))
    ckpt.seed_all(args.seed * 1000 + engine.global_rank)  # from here on, each rank its own dropout masks

    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    for step in range(1, args.steps + 1):
        local_loss = 0.0
        for _ in range(accumulation):
            batch = to_device(next(batches), engine.device)
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel())
        stopped_by = stop.agreed()
        if step % args.save_every == 0 or step == args.steps or stopped_by:
            held_out = None if stopped_by else held_out_loss(engine, held_out_blocks, engine.device, max_blocks=64)
            save(engine, root, step, args.keep_last, held_out)
        if stopped_by:
            print0(f"stopped by {stopped_by} after step {step}, which is saved: day18/train.py continues from it")
            break
    else:
        ckpt.mark_finished(Path(args.run_dir), args.steps)
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
