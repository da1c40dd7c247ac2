"""Day 21: memory to the byte - GPT-2 with recomputation: which blocks, by whom, and what the worst moment then takes.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day21/train.py
    deepspeed --num_accelerators 2 day21/train.py --every 0
    deepspeed --num_accelerators 2 day21/train.py --way deepspeed --every 1 --loss_tiles 8

Expect lines that say who recomputes what, how often the blocks ran in a step and what its worst moment took, and the
same losses whatever the flags: recomputation changes no digit.
Checked with deepspeed 0.19.8. Source: https://deepspeed.readthedocs.io/en/latest/activation-checkpointing.html
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from common.cpu import start_without_compiler
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir
from day21.peak import step_peak
from day21.recompute import WAYS, recompute_every
from day21.tiles import TiledLoss


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=10, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day21"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--every", type=int, default=2, help="blocks a checkpoint; 0: keep all, recompute nothing")
    parser.add_argument("--way", choices=list(WAYS), default="torch", help="who recomputes, or takes it to the host")
    parser.add_argument("--loss_tiles", type=int, default=1, help="parts in which logits and loss are computed")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    if args.every < 0 or args.loss_tiles < 1:
        raise UserError(f"--every {args.every} --loss_tiles {args.loss_tiles}: from 0 and from 1 on")
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)
    blocks = recompute_every(model, max(args.every, 1), WAYS[args.way], None if args.every else 0)
    model = TiledLoss(model, args.loss_tiles) if args.loss_tiles > 1 else model

    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=args.deepspeed_config
    )  # reads the section "activation_checkpointing", and does nothing with it
    deepspeed.checkpointing.configure(mpu_=None, deepspeed_config=args.deepspeed_config)  # this does
    accumulation = engine.gradient_accumulation_steps()
    partitions = deepspeed.checkpointing.PARTITION_ACTIVATIONS
    how = f"{args.way}, {args.every} blocks a checkpoint" if args.every else "nothing"
    print0(f"zero stage {engine.zero_optimization_stage()} | recompute {how} | loss in {args.loss_tiles} parts")
    print0(f"deepspeed.checkpointing configured {deepspeed.checkpointing.is_configured()}, partitions {partitions}")
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(train_blocks, engine.train_micro_batch_size_per_gpu(), sampler=sampler, drop_last=True)
    batches = endless_batches(loader)

    def train_step() -> torch.Tensor:
        local_loss = 0.0
        for _ in range(accumulation):
            batch = to_device(next(batches), engine.device)
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        return local_loss

    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    log.held_out(0, held_out_loss(engine, held_out_blocks, engine.device, max_blocks=64))
    losses = []
    for step in range(1, args.steps + 1):
        if step == 2:  # the first one made Adam's states
            blocks.runs[:] = [0] * len(blocks.runs)
            peak = step_peak(lambda: losses.append(train_step()), engine.device)
            print0(f"step 2 ran {sum(blocks.runs)} blocks of {len(blocks.runs)}; worst moment {peak / 1e6:.1f} MB more")
            log.record(step=step, block_runs=sum(blocks.runs), step_peak_bytes=peak)
        else:
            losses.append(train_step())
        tokens = accumulation * engine.train_micro_batch_size_per_gpu() * preset.block_size
        log.step(step, losses[-1], tokens=tokens)
    log.held_out(args.steps, held_out_loss(engine, held_out_blocks, engine.device, max_blocks=64))
    log.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
