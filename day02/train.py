"""Day 02: your first DeepSpeed program - day 01's training loop on the DeepSpeed engine.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day02/train.py
    deepspeed --num_accelerators 2 day02/train.py --steps 100 --corpus moby_dick

Expect the held-out loss to fall from about ln(4096) = 8.3 to below 5.3; then a plot and a text sample.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/getting-started/
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
from common.plots import plot_loss
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir, read_rows, show_path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=50, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day02"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--prompt", default="The whale", help="how the text sample begins")
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

    # (1) Wrap the model. The JSON says how to train: batch size, optimizer, clipping, precision, ZeRO stage.
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=args.deepspeed_config
    )
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    print0(f"zero stage {engine.zero_optimization_stage()} | {type(optimizer).__name__} | {engine.device.type}")
    print0(
        f"batch {engine.train_batch_size()} = {micro_batch} micro x {accumulation} accumulation"
        f" x {engine.dp_world_size} ranks"
    )
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(train_blocks, batch_size=micro_batch, sampler=sampler, drop_last=True)

    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    log.held_out(0, held_out_loss(engine, held_out_blocks, engine.device))
    batches = endless_batches(loader)
    for step in range(1, args.steps + 1):
        local_loss = 0.0
        for _ in range(accumulation):
            batch = to_device(next(batches), engine.device)
            loss = engine(**batch).loss
            engine.backward(loss)  # (2) gradients of loss / accumulation, averaged over the ranks
            engine.step()  # (3) at the last micro-batch: clip, update, clear gradients; before it: only count
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel())
    log.held_out(args.steps, held_out_loss(engine, held_out_blocks, engine.device))
    log.close()

    if engine.global_rank == 0:
        plot = Path(args.run_dir) / "loss.png"
        plot_loss({"day 02": read_rows(args.run_dir)}, plot, f"{args.model} on {args.corpus}, DeepSpeed")
        prompt = tokenizer(args.prompt, return_tensors="pt").to(engine.device)
        sample = engine.module.generate(**prompt, max_new_tokens=60, do_sample=True, top_k=50)
        print0(f"loss curve: {show_path(plot)}")
        print0(f"sample: {tokenizer.decode(sample[0])!r}")
    torch.distributed.destroy_process_group()  # or a backend thread may abort the process as it exits


if __name__ == "__main__":
    with clear_errors():
        main()
