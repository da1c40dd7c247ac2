"""Day 23: LoRA - a frozen base and a trained bypass of low rank beside its matrices, under ZeRO-1, 2 or 3.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day23/train.py
    deepspeed --num_accelerators 2 day23/train.py --deepspeed_config day23/ds_config_zero3.json
    deepspeed --num_accelerators 1 day23/train.py --quantize --pretrained meta-llama/Llama-3.1-8B

Expect what is trained and what this rank holds of it, a held-out loss that falls as on day 22, and a small folder that
merge.py and generate.py load. The third command is QLoRA, for an NVIDIA GPU with bitsandbytes.
Checked with deepspeed 0.19.8 and peft 0.21.2. Source: https://huggingface.co/docs/peft/accelerate/deepspeed
"""

import argparse
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers.integrations import HfDeepSpeedConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Take day22/pretrained.py and day22/chat_data.py along; replace the imports from common.
from common.cpu import start_without_compiler
from common.data import to_device
from common.errors import clear_errors
from common.ranks import over_ranks, print0, require_launcher
from common.run_log import RunLog, default_run_dir, show_path
from config.read import read_config
from day22.chat_data import answers, collate, endless_order, held_out_loss, load_chat
from day22.pretrained import load_model, load_tokenizer
from day23.lora import add_lora, held_bytes, load_quantized, numel, save_adapter


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=4, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day23"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--pretrained", default="smollm2", help="smollm2, a preset of day 22, a folder, a hub name")
    parser.add_argument(
        "--dataset", default="chat", help="chat, a file of dialogues, a hub data set, or a corpus of plain text"
    )
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sample")
    parser.add_argument("--lora_rank", type=int, default=8, help="r: rows of A, columns of B")
    parser.add_argument("--lora_alpha", type=float, default=16, help="the bypass counts alpha / r times")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="share of the bypass' inputs that is dropped")
    parser.add_argument("--targets", nargs="+", default=["all-linear"], help="names of the matrices that get a bypass")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing of every layer")
    parser.add_argument("--quantize", action="store_true", help="the base in 4 bits (QLoRA): NVIDIA GPU, bitsandbytes")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    tokenizer = load_tokenizer(args.pretrained)
    train_items, held_out_items = load_chat(args.dataset, tokenizer, args.max_length)
    config = read_config(args.deepspeed_config, needs=["optimizer"])
    if "total_num_steps" in config.get("scheduler", {}).get("params", {}):
        config["scheduler"]["params"]["total_num_steps"] = args.steps  # the cosine ends where the run ends
    stage = config.get("zero_optimization", {}).get("stage", 0)
    bf16 = config.get("bf16", {}).get("enabled", False)
    alive = HfDeepSpeedConfig(config)  # noqa: F841 - while it lives, stage 3 cuts the base as it is read (day 22)
    base = (
        load_quantized(args.pretrained, stage)
        if args.quantize
        else load_model(args.pretrained, torch.bfloat16 if bf16 else torch.float32)
    )
    if args.recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})  # as on day 22; the adapters are inside
    torch.manual_seed(args.seed)  # the same on every rank, so every rank draws the same A
    model = add_lora(base, args.lora_rank, args.lora_alpha, args.lora_dropout, args.targets)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)  # the trained ones alone

    device, pad = engine.device, tokenizer.pad_token_id
    counts = sum(map(numel, trained)), sum(map(numel, model.parameters()))
    modules = model.targeted_module_names
    names = " ".join(sorted({module.rpartition(".")[2] for module in modules}))
    print0(f"lora r={args.lora_rank} alpha={args.lora_alpha:g} beside {len(modules)} matrices: {names}")
    dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    share = f"{counts[0]:,} of {counts[1]:,} parameters trained = {counts[0] / counts[1]:.2%}"
    print0(f"zero stage {engine.zero_optimization_stage()} | {share} | {dtypes} | {device.type}")
    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    log.held_out(0, held_out_loss(model, held_out_items, pad, device))
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    order = endless_order(train_items, micro_batch, args.seed)
    for step in range(1, args.steps + 1):
        batches = [collate([train_items[i] for i in next(order)], pad) for _ in range(accumulation)]
        step_answers = over_ranks(sum(map(answers, batches)), device, "sum")
        shares, local_loss = dist.get_world_size() * accumulation, 0.0
        for batch in batches:  # each answer token counts the same, on whichever rank it is
            loss = engine(**to_device(batch, device), num_items_in_batch=step_answers / shares).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=sum(int(batch["attention_mask"].sum()) for batch in batches))
    log.held_out(args.steps, held_out_loss(model, held_out_items, pad, device))
    log.close()
    held = held_bytes(engine)
    print0("this rank holds: " + " | ".join(f"{kind} {size / 1e6:,.2f} MB" for kind, size in held.items()))
    folder = Path(args.run_dir) / "adapter"
    save_adapter(model, args.pretrained, folder)
    if engine.global_rank == 0:
        print0(f"adapter: {show_path(folder)}, {(folder / 'adapter_model.safetensors').stat().st_size:,} bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
