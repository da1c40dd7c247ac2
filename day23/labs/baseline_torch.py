"""Day 23: the baseline - the same LoRA in plain PyTorch and peft, one process: same batches, same schedule, same log.

From the repository root, on one GPU or CPU:

    python day23/labs/baseline_torch.py
    python day23/labs/baseline_torch.py --pretrained tiny-llama --steps 6

Expect the losses of day23/train.py with the same global batch (8 on each of 2 ranks are 16 here). speed.py measures
this loop beside DeepSpeed's in one run.
Checked with torch 2.13.0 and peft 0.21.2. Source: https://huggingface.co/docs/peft/task_guides/lora_based_methods
"""

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.data import to_device
from common.errors import clear_errors
from common.run_log import RunLog, default_run_dir
from config.read import read_config
from day22.chat_data import answers, collate, endless_order, held_out_loss, load_chat
from day22.pretrained import load_model, load_tokenizer
from day23.lora import add_lora
from day23.torch_loop import READS, build_torch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--global_batch", type=int, default=16, help="samples an optimizer step")
    parser.add_argument("--bf16", action="store_true", help="the base in bf16, the adapter in fp32, autocast")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=4, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day23"), help="folder for metrics.jsonl and the adapter")
    parser.add_argument("--pretrained", default="smollm2", help="smollm2, a preset of day 22, a folder, a hub name")
    parser.add_argument(
        "--dataset", default="chat", help="chat, a file of dialogues, a hub data set, or a corpus of plain text"
    )
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sample")
    parser.add_argument("--lora_rank", type=int, default=8, help="r: rows of A, columns of B")
    parser.add_argument("--lora_alpha", type=float, default=16, help="the bypass counts alpha / r times")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="share of the bypass' inputs that is dropped")
    parser.add_argument("--targets", nargs="+", default=["all-linear"], help="names of the matrices that get a bypass")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer = load_tokenizer(args.pretrained)
    train_items, held_out_items = load_chat(args.dataset, tokenizer, args.max_length)
    config = read_config(args.deepspeed_config, needs=READS)
    base = load_model(args.pretrained, torch.bfloat16 if args.bf16 else torch.float32)
    torch.manual_seed(args.seed)
    model = add_lora(base, args.lora_rank, args.lora_alpha, args.lora_dropout, args.targets).to(device)
    train_step, pad = build_torch(model, config, args.steps, args.bf16), tokenizer.pad_token_id

    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    log.held_out(0, held_out_loss(model, held_out_items, pad, device))
    order = endless_order(train_items, args.global_batch, args.seed)
    for step in range(1, args.steps + 1):
        batch = collate([train_items[i] for i in next(order)], pad)
        loss = train_step(to_device(batch, device), answers(batch))
        log.step(step, loss, tokens=int(batch["attention_mask"].sum()))
    log.held_out(args.steps, held_out_loss(model, held_out_items, pad, device))
    log.close()
    model.peft_config["default"].base_model_name_or_path = args.pretrained
    model.save_pretrained(Path(args.run_dir) / "adapter", save_embedding_layers=False)


if __name__ == "__main__":
    with clear_errors():
        main()
