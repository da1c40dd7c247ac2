"""Day 23: DPO with LoRA under ZeRO-2 or 3 - which of two answers is better, learned from pairs, without a reward model.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day23/train_dpo.py
    deepspeed --num_accelerators 2 day23/train_dpo.py --deepspeed_config day23/ds_config_dpo_zero3.json
    deepspeed --num_accelerators 2 day23/train_dpo.py --dataset my_pairs.jsonl --beta 0.05

Expect a loss that starts at ln 2 = 0.693147, where policy and reference are the same, and falls; a margin and an
accuracy of held-out pairs that rise; an adapter as train.py saves it, and margin.png, accuracy.png and dpo.json.
Checked with deepspeed 0.19.8, peft 0.21.2 and trl 1.16.0. Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290
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

# Copying this script? Take dpo.py, pairs.py, lora.py and two of day 22 along; replace the imports from common.
from common.cpu import start_without_compiler
from common.data import to_device
from common.errors import UserError, clear_errors
from common.ranks import over_ranks, print0, require_launcher
from common.run_log import RunLog, default_run_dir, read_rows, show_path
from config.read import read_config
from day22.chat_data import endless_order
from day22.pretrained import load_model, load_tokenizer
from day23.dpo import describe, dpo_loss, held_out_rewards, reference_logps, report, sequence_logps
from day23.lora import add_lora, numel, save_adapter
from day23.pairs import collate_pairs, load_pairs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config_dpo.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=4, help="optimizer steps between two log lines")
    parser.add_argument("--eval_every", type=int, default=5, help="optimizer steps between two looks at held-out pairs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day23"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--pretrained", default="smollm2", help="smollm2, a preset of day 22, a folder, a hub name")
    parser.add_argument("--dataset", default="sotu", help="sotu, a file of pairs, or a hub data set of pairs")
    parser.add_argument("--held_out", type=int, default=48, help="held-out pairs to look at")
    parser.add_argument("--max_length", type=int, default=160, help="tokens of the longest prompt with its answer")
    parser.add_argument("--beta", type=float, default=0.1, help="how dear it is to move away from the reference")
    parser.add_argument("--lora_rank", type=int, default=8, help="r: rows of A, columns of B")
    parser.add_argument("--lora_alpha", type=float, default=16, help="the bypass counts alpha / r times")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing of every layer")
    parser.add_argument("--targets", nargs="+", default=["all-linear"], help="names of the matrices that get a bypass")
    return parser.parse_args()


def build_engine(args: argparse.Namespace) -> deepspeed.DeepSpeedEngine:
    """The base, frozen and cut at stage 3, with an adapter: policy and reference in one model. Collective."""
    config = read_config(args.deepspeed_config, needs=["optimizer"])
    if "total_num_steps" in config.get("scheduler", {}).get("params", {}):
        config["scheduler"]["params"]["total_num_steps"] = args.steps  # the cosine ends where the run ends
    bf16 = config.get("bf16", {}).get("enabled", False)
    alive = HfDeepSpeedConfig(config)  # noqa: F841 - as in train.py
    base = load_model(args.pretrained, torch.bfloat16 if bf16 else torch.float32)
    if args.recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(args.seed)
    model = add_lora(base, args.lora_rank, args.lora_alpha, targets=args.targets)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    counts = sum(map(numel, trained)), sum(map(numel, model.parameters()))
    share = f"{counts[0]:,} of {counts[1]:,} parameters trained = {counts[0] / counts[1]:.2%}"
    print0(f"zero stage {engine.zero_optimization_stage()} | {share} | beta {args.beta:g} | {engine.device.type}")
    return engine


def main() -> None:
    args = parse_args()
    require_launcher()
    if args.beta <= 0:
        raise UserError(f"--beta {args.beta:g}: above 0, or every pair of answers has the same reward; 0.1 is usual")
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    tokenizer = load_tokenizer(args.pretrained)
    pairs, held_out = load_pairs(args.dataset, tokenizer, args.max_length)
    engine = build_engine(args)
    model, device, pad = engine.module, engine.device, tokenizer.pad_token_id
    log, references = RunLog(args.run_dir, args.steps, args.log_every, device), []

    def look_at_held_out(step: int) -> None:
        found = held_out_rewards(model, held_out[: args.held_out], pad, args.beta, device, references)
        log.held_out(step, found["loss"])
        log.record(step=step, **{f"held_out_{name}": value for name, value in found.items()})
        rewards = f"chosen {found['chosen']:+.4f} | rejected {found['rejected']:+.4f} | margin {found['margin']:+.4f}"
        print0(f"          {rewards} | accuracy {found['accuracy']:.1%} | prefers the chosen {found['prefers']:.1%}")

    look_at_held_out(0)
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    order = endless_order([pair["chosen"] for pair in pairs], micro_batch, args.seed)
    for step in range(1, args.steps + 1):
        local_loss, seen, tokens = 0.0, [], 0
        for _ in range(accumulation):
            batch = to_device(collate_pairs([pairs[i] for i in next(order)], pad), device)
            reference = reference_logps(model, batch)  # before the policy: at stage 3 backward follows its own forward
            loss, rewards = dpo_loss(sequence_logps(engine, batch), reference, args.beta)
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
            tokens += int(batch["attention_mask"].sum())
            seen.append(rewards)
        described = {name: over_ranks(value, device) for name, value in describe(torch.cat(seen, dim=1)).items()}
        log.step(step, local_loss, tokens, **described)
        if step % args.eval_every == 0 or step == args.steps:
            look_at_held_out(step)
    log.close()
    folder = Path(args.run_dir) / "adapter"
    save_adapter(model, args.pretrained, folder)
    if engine.global_rank == 0:
        title = f"DPO, {args.pretrained}, beta {args.beta:g}, ZeRO-{engine.zero_optimization_stage()}"
        report(read_rows(args.run_dir), Path(args.run_dir), title)
        print0(f"adapter: {show_path(folder)}, {(folder / 'adapter_model.safetensors').stat().st_size:,} bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
