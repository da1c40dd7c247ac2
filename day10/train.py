"""Day 10: gradient accumulation - the whole loop, with the PyTorch lines that DeepSpeed replaces beside it as comments.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day10/train.py
    deepspeed --num_accelerators 1 day10/train.py

Expect the batch equation, training, and at the end what the engine counted: micro-batches, updates, sequences.
Checked with deepspeed 0.19.8. Source: https://github.com/deepspeedai/DeepSpeed/issues/776, which asks for this loop.
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
from common.errors import clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day10"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)

    # Read `# PyTorch:` as the line that was here before, `# DeepSpeed:` as what came in its place.
    # PyTorch: torch.distributed.init_process_group()
    # PyTorch: device = torch.device("cpu")  # a rank's own GPU: torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    # PyTorch: micro_batch, accumulation, micro_steps = 2, 4, 0
    # PyTorch: ddp = torch.nn.parallel.DistributedDataParallel(model.to(device))
    # PyTorch: optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    # PyTorch: scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, max(0, n - 1) / 10))
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=args.deepspeed_config
    )  # DeepSpeed: group, device, optimizer, schedule and batch sizes are those of the JSON
    device = engine.device  # DeepSpeed:
    micro_batch = engine.train_micro_batch_size_per_gpu()  # DeepSpeed:
    accumulation = engine.gradient_accumulation_steps()  # DeepSpeed:
    ranks = torch.distributed.get_world_size()
    print0(f"zero stage {engine.zero_optimization_stage()} | {type(optimizer).__name__} | {device.type}")  # DeepSpeed:
    batch_size = micro_batch * accumulation * ranks
    print0(f"batch {batch_size} = {micro_batch} micro x {accumulation} accumulation x {ranks} ranks")
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(train_blocks, batch_size=micro_batch, sampler=sampler, drop_last=True)

    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    log.held_out(0, held_out_loss(model, held_out_blocks, device))
    batches = endless_batches(loader)
    for step in range(1, args.steps + 1):
        local_loss = 0.0
        for _ in range(accumulation):
            batch = to_device(next(batches), device)
            # PyTorch: micro_steps += 1
            # PyTorch: ddp.require_backward_grad_sync = micro_steps % accumulation == 0  # what no_sync() does
            # PyTorch: loss = ddp(**batch).loss
            loss = engine(**batch).loss  # DeepSpeed:
            # PyTorch: (loss / accumulation).backward()
            engine.backward(loss)  # DeepSpeed: divides by the accumulation itself; it returns the divided loss
            # PyTorch: if micro_steps % accumulation == 0:
            # PyTorch:     torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            # PyTorch:     optimizer.step()
            # PyTorch:     scheduler.step()
            # PyTorch:     optimizer.zero_grad()
            engine.step()  # DeepSpeed: after every backward; it counts, and does these four at the last micro-batch
            local_loss += loss.detach() / accumulation  # the loss itself: it was not divided
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel())
    log.held_out(args.steps, held_out_loss(model, held_out_blocks, device))
    log.close()
    counted = f"{engine.micro_steps} micro-batches a rank | {engine.global_steps} updates"  # DeepSpeed:
    print0(f"engine: {counted} | {engine.global_samples:,} sequences of all ranks")  # DeepSpeed:
    # PyTorch: del ddp  # before the group: as its last holder, DDP can deadlock on gloo (torch 2.13)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
