"""Day 01: plain PyTorch - the single-process training loop that day 02 converts to DeepSpeed.

From the repository root, on the CPU or on one GPU:

    python day01/train.py
    python day01/train.py --steps 100 --corpus moby_dick

Expect the held-out loss to fall from about ln(4096) = 8.3 to below 5.3; then a plot and a text sample.
Checked with torch 2.13.0. Source: Radford et al. 2019 (GPT-2); Loshchilov and Hutter 2019 (AdamW).
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import clear_errors
from common.model import build_model, get_preset
from common.plots import plot_loss
from common.ranks import print0
from common.run_log import RunLog, default_run_dir, read_rows, show_path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--global_batch", type=int, default=16, help="sequences per optimizer step")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=50, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day01"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--prompt", default="The whale", help="how the text sample begins")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id).to(device)
    print0(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device} | batch {args.global_batch}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    sampler = DistributedSampler(train_blocks, num_replicas=1, rank=0, seed=args.seed)
    loader = DataLoader(train_blocks, batch_size=args.global_batch, sampler=sampler, drop_last=True)

    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    log.held_out(0, held_out_loss(model, held_out_blocks, device))
    batches = endless_batches(loader)
    for step in range(1, args.steps + 1):
        batch = to_device(next(batches), device)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.step(step, loss.detach(), tokens=batch["input_ids"].numel())
    log.held_out(args.steps, held_out_loss(model, held_out_blocks, device))
    log.close()

    plot = Path(args.run_dir) / "loss.png"
    plot_loss({"day 01": read_rows(args.run_dir)}, plot, f"{args.model} on {args.corpus}, plain PyTorch")
    prompt = tokenizer(args.prompt, return_tensors="pt").to(device)
    sample = model.generate(**prompt, max_new_tokens=60, do_sample=True, top_k=50)
    print0(f"loss curve: {show_path(plot)}")
    print0(f"sample: {tokenizer.decode(sample[0])!r}")


if __name__ == "__main__":
    with clear_errors():
        main()
