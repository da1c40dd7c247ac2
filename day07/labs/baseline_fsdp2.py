"""Day 07: the baseline - the same training in plain PyTorch, sharded with FSDP2 (`fully_shard`) or copied with DDP.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day07/labs/baseline_fsdp2.py
    deepspeed --num_accelerators 2 day07/labs/baseline_fsdp2.py --ddp

Expect the losses of day07/train.py; compare.py measures both beside DeepSpeed's stages. Checked with torch 2.13.0.
Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir
from day07.loops import build_ddp, build_fsdp2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ddp", action="store_true", help="DistributedDataParallel instead of FSDP2")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16; weights and Adam's states stay fp32")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences a rank and micro-batch")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day07"), help="folder for metrics.jsonl")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_launcher()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cpu":  # this rank's GPU
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id).to(device)
    train_step, _ = (build_ddp if args.ddp else build_fsdp2)(model, args.lr, args.bf16)
    weight = model.transformer.wte.weight
    print0(f"{'DDP' if args.ddp else 'FSDP2'} | {type(weight).__name__} {tuple(weight.shape)} | {device.type}")
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(train_blocks, batch_size=args.micro_batch, sampler=sampler, drop_last=True)

    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    log.held_out(0, held_out_loss(model, held_out_blocks, device))
    batches = endless_batches(loader)
    for step in range(1, args.steps + 1):
        batch = to_device(next(batches), device)
        log.step(step, train_step(batch), tokens=batch["input_ids"].numel())
    log.held_out(args.steps, held_out_loss(model, held_out_blocks, device))
    log.close()
    del train_step  # and with it DDP, before the group: as its last holder, DDP can deadlock on gloo (torch 2.13)
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
