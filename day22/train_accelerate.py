"""Day 22: train_accelerate - the same fine-tuning with Accelerate: our loop, its engine, a DeepSpeed JSON with "auto".

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day22/train_accelerate.py
    deepspeed --num_accelerators 2 day22/train_accelerate.py --pretrained tiny-llama --lr 0.001 --fp32

Expect what each "auto" became, then the losses of day22/train.py, which sees the same batches in the same order.
Checked with deepspeed 0.19.8. Source: https://huggingface.co/docs/accelerate/usage_guides/deepspeed, accelerate 1.15.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.cpu import start_without_compiler
from common.data import to_device
from common.errors import clear_errors
from common.ranks import over_ranks, print0, require_launcher
from common.run_log import RunLog, default_run_dir, show_path
from config.read import read_config
from day22.bridge import SameBatches, show_filled
from day22.chat_data import answers, held_out_loss, load_chat
from day22.pretrained import load_model, load_tokenizer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config_hf.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day22"), help="folder for metrics.jsonl and plots")
    parser.add_argument(
        "--pretrained", default="smollm2", help="smollm2, a preset of pretrained.py, a folder, a hub name"
    )
    parser.add_argument(
        "--dataset", default="chat", help="chat, a file of dialogues, a hub data set, or a corpus of plain text"
    )
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sample")
    parser.add_argument("--lr", type=float, default=5e-5, help="peak learning rate")
    parser.add_argument("--micro_batch", type=int, default=8, help="samples a rank and micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--fp32", action="store_true", help="fp32 instead of bf16")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    tokenizer = load_tokenizer(args.pretrained)
    train_items, held_out_items = load_chat(args.dataset, tokenizer, args.max_length)
    config = read_config(args.deepspeed_config)
    given = copy.deepcopy(config)
    # (1) What Accelerate does not fill in: the micro-batch, unless a DataLoader says it, and AdamW's betas.
    given["train_micro_batch_size_per_gpu"], given["optimizer"]["params"]["betas"] = args.micro_batch, [0.9, 0.999]
    plugin = DeepSpeedPlugin(hf_ds_config=given)  # before the model, and kept: from_pretrained looks for it
    accelerator = Accelerator(
        deepspeed_plugin=plugin,
        gradient_accumulation_steps=args.accumulation,
        mixed_precision="no" if args.fp32 else "bf16",
    )
    model = load_model(args.pretrained, torch.float32 if args.fp32 else torch.bfloat16)
    optimizer = DummyOptim(model.parameters(), lr=args.lr, weight_decay=0.01)  # the JSON's; these fill in its "auto"
    # (2) Accelerate divides total_num_steps by the processes, and DeepSpeed steps the scheduler once an update.
    total = args.steps * accelerator.num_processes
    scheduler = DummyScheduler(optimizer, total_num_steps=total, warmup_num_steps=3)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    show_filled(config, plugin.deepspeed_config)
    print0(f"zero stage {model.zero_optimization_stage()} | {type(model).__name__} by way of Accelerate")
    pad, device = tokenizer.pad_token_id, accelerator.device
    log = RunLog(args.run_dir, args.steps, 1, device)
    log.held_out(0, held_out_loss(model, held_out_items, pad, device))
    batches = SameBatches(train_items, args.micro_batch, args.seed, pad)
    stream = iter(batches)
    for step in range(1, args.steps + 1):
        chosen, local_loss = [next(stream) for _ in range(args.accumulation)], 0.0
        count = over_ranks(sum(map(answers, chosen)), device, "mean") / args.accumulation  # (3) nobody else counts them
        for batch in chosen:
            with accelerator.accumulate(model):
                loss = model(**to_device(batch, device), num_items_in_batch=count).loss
                accelerator.backward(loss)  # (4) clips and steps as well: what follows does nothing under DeepSpeed
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            local_loss += loss.detach() / args.accumulation
        log.step(step, local_loss, batches.tokens_since())
    log.held_out(args.steps, held_out_loss(model, held_out_items, pad, device))
    log.close()
    # (5) Gathers, as the JSON's stage3_gather_16bit_weights_on_model_save allows. Every rank calls it.
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(f"{args.run_dir}/model", state_dict=weights)
        tokenizer.save_pretrained(f"{args.run_dir}/model")
    accelerator.wait_for_everyone()
    print0(f"saved: {show_path(args.run_dir)}/model")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
