"""Day 06: ZeRO-2 - gradients partitioned: each rank keeps the averaged gradients of its own slice, and frees the rest.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day06/train.py
    deepspeed --num_accelerators 2 day06/train.py --deepspeed_config day06/ds_config_zero1.json

Expect the life of the gradients in one optimizer step, in bytes on each rank after every micro-batch; then training.
Checked with deepspeed 0.19.8. Source: Rajbhandari et al. 2019 (ZeRO), arXiv:1910.02054, section 5.2.
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
from bench.held import live_tensors
from common.cpu import start_without_compiler
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir
from day06.gradients import gradients_held


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=5, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day06"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def print_gradients(engine: deepspeed.DeepSpeedEngine, at_boundary: set[int], when: str) -> None:
    """Print what each rank holds. Collective."""
    held = gradients_held(engine, at_boundary)
    ranks = [None] * engine.dp_world_size
    torch.distributed.all_gather_object(ranks, f"{held['other']:,} + {held['buckets']:,}")
    print0(f"{when}: gradients + bucket, bytes on each rank: {' | '.join(ranks)}")


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)

    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=args.deepspeed_config
    )
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    stage = engine.zero_optimization_stage()
    if stage not in (1, 2):
        raise UserError(f"zero stage {stage} in {args.deepspeed_config}: this day needs 1 or 2")
    partitioned = (
        f"gradients partitioned {optimizer.partition_gradients} | bucket {optimizer.reduce_bucket_size:,} elements"
    )
    print0(f"zero stage {stage} | {partitioned} | {engine.device.type}")
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print0(f"all gradients of this model: {weight_bytes:,} bytes")
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(train_blocks, batch_size=micro_batch, sampler=sampler, drop_last=True)

    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    log.held_out(0, held_out_loss(engine, held_out_blocks, engine.device, max_blocks=64))
    batches = endless_batches(loader)
    for step in range(1, args.steps + 1):
        local_loss, at_boundary = 0.0, set(live_tensors(engine.device)) if step == 2 else None
        for micro_step in range(1, accumulation + 1):
            batch = to_device(next(batches), engine.device)
            num_tokens = batch["input_ids"].numel()
            loss = engine(**batch).loss
            engine.backward(loss)  # ZeRO-2: each full bucket is averaged over the ranks here, in every micro-batch
            local_loss += loss.detach() / accumulation
            del batch, loss  # or they would count as held below
            if step == 2:
                print_gradients(engine, at_boundary, f"after micro-batch {micro_step}")
            engine.step()
        if step == 2:
            print_gradients(engine, at_boundary, "after the step    ")
        log.step(step, local_loss, tokens=accumulation * num_tokens)
    log.held_out(args.steps, held_out_loss(engine, held_out_blocks, engine.device, max_blocks=64))
    log.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
