"""Day 22: train_hf - the same fine-tuning with Hugging Face's Trainer and a DeepSpeed JSON full of "auto".

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day22/train_hf.py
    deepspeed --num_accelerators 2 day22/train_hf.py --pretrained tiny-llama --lr 0.001 --fp32

Expect what each "auto" became, then the losses of day22/train.py, which sees the same batches in the same order.
Checked with deepspeed 0.19.8. Source: https://huggingface.co/docs/transformers/deepspeed, transformers 5.20.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import PrinterCallback, TrainingArguments

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.cpu import start_without_compiler
from common.errors import clear_errors
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir, show_path
from config.read import read_config
from day22.bridge import Log, OurTrainer, SameBatches, show_filled
from day22.chat_data import held_out_loss, load_chat
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
    config = read_config(args.deepspeed_config)  # a dict: the Trainer's own reader of files knows no comments
    # Before the model: from then on from_pretrained sees the config, as with HfDeepSpeedConfig in train.py.
    arguments = TrainingArguments(
        args.run_dir, deepspeed=config, max_steps=args.steps, seed=args.seed, bf16=not args.fp32,
        per_device_train_batch_size=args.micro_batch, gradient_accumulation_steps=args.accumulation,
        learning_rate=args.lr, weight_decay=0.01, adam_beta2=0.999, max_grad_norm=1.0, warmup_steps=3,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=get_accelerator().device_name() == "cpu",
    )  # fmt: skip
    model = load_model(args.pretrained, torch.float32 if args.fp32 else torch.bfloat16)
    batches = SameBatches(train_items, args.micro_batch, args.seed, tokenizer.pad_token_id)
    log = RunLog(args.run_dir, args.steps, 1, arguments.device)
    pad, device = tokenizer.pad_token_id, arguments.device
    evaluate = partial(held_out_loss, items=held_out_items, pad_token_id=pad, device=device)
    callbacks = [Log(log, batches.tokens_since, evaluate)]
    trainer = OurTrainer(model, arguments, processing_class=tokenizer, train_dataset=batches, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    show_filled(config, trainer.accelerator.deepspeed_plugin.deepspeed_config)
    engine = trainer.model_wrapped
    print0(f"zero stage {engine.zero_optimization_stage()} | {type(engine).__name__} | {engine.global_steps} updates")
    log.held_out(args.steps, evaluate(engine))
    log.close()
    trainer.save_model(f"{args.run_dir}/model")  # gathers, as stage3_gather_16bit_weights_on_model_save allows
    print0(f"saved: {show_path(args.run_dir)}/model")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
