"""Day 12: the baseline - the fastest single-GPU loop in plain PyTorch that we can write, same model, same batches.

From the repository root, on one GPU (on CPU it runs uncompiled, to show that the losses agree):

    python day12/labs/baseline_torch.py --model gpt2 --micro_batch 32 --steps 200

Expect the losses of speed.py's rungs: a constant learning rate, no schedule. speed.py measures this loop as well.
Checked with torch 2.13.0. Source: https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import clear_errors
from common.model import get_preset
from common.run_log import RunLog, default_run_dir
from day12.gpt import build_gpt
from day12.torch_loop import build_torch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences a rank and micro-batch")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day12"), help="folder for metrics.jsonl")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)
    model = build_gpt(args.model, len(tokenizer)).to(device)
    model.fused_loss = model.narrow_stream = device.type == "cuda"
    train_step = build_torch(model, compiled=device.type != "cpu")
    sampler = DistributedSampler(train_blocks, num_replicas=1, rank=0, seed=args.seed)
    loader = DataLoader(train_blocks, args.micro_batch, sampler=sampler, drop_last=True)

    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    batches = endless_batches(loader)
    for step in range(1, args.steps + 1):
        batch = to_device(next(batches), device)
        log.step(step, train_step(batch), tokens=batch["input_ids"].numel())
    with torch.autocast(device.type, torch.bfloat16):
        log.held_out(args.steps, held_out_loss(model, held_out_blocks, device, max_blocks=64))
    log.close()


if __name__ == "__main__":
    with clear_errors():
        main()
