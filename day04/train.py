"""Day 04: advanced configuration - check a config, change single values, train with any template of config/.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day04/train.py
    deepspeed --num_accelerators 2 day04/train.py --deepspeed_config config/cpu_fp32.json --steps 50
    deepspeed --num_accelerators 2 day04/train.py --set zero_optimization.stage=2 gradient_accumulation_steps=2

Expect the checker's findings, then what DeepSpeed made of the config, read from the engine, then training.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/docs/config-json/
"""

import argparse
import os
import sys
from pathlib import Path

import deepspeed
import hjson
import torch
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from bench.held import live_tensor_bytes
from common.cpu import start_without_compiler
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir
from config.check import check
from config.read import read_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=50, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day04"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change values of the config")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing, switched on in the model")
    return parser.parse_args()


def set_values(config: dict, changes: list[str]) -> None:
    """Change `config` by `zero_optimization.stage=2` and the like."""
    for change in changes:
        dotted, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"--set {change!r} is not of the form section.key=value")
        *sections, key = dotted.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise UserError(f"--set {change!r}: {name} is {section!r} in the config, not a section with keys")
        section[key] = hjson.loads(value)


def what_deepspeed_made_of_it(engine: deepspeed.DeepSpeedEngine) -> dict[str, object]:
    """The effective settings, group by group, read from the engine and not from the JSON."""
    zero = engine._config.zero_config
    return {
        "batch": f"{engine.train_batch_size()} = {engine.train_micro_batch_size_per_gpu()} micro"
        f" x {engine.gradient_accumulation_steps()} accumulation x {engine.dp_world_size} ranks",
        "gradient clipping": engine.gradient_clipping(),
        "optimizer": f"{type(engine.basic_optimizer).__name__} in {type(engine.optimizer).__name__}",
        "schedule": type(engine.lr_scheduler).__name__,
        "weights": next(engine.parameters()).dtype,
        "zero stage": engine.zero_optimization_stage(),
        "buckets": f"reduce {zero.reduce_bucket_size:,} | allgather {zero.allgather_bucket_size:,} elements",
        "overlap_comm": zero.overlap_comm,
        "offload": f"optimizer {zero.offload_optimizer and zero.offload_optimizer.device}"
        f" | parameters {zero.offload_param and zero.offload_param.device}",
        "recompute": engine.module.is_gradient_checkpointing,
    }


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    config = read_config(args.deepspeed_config)  # as DeepSpeed reads it
    set_values(config, args.set)
    findings = check(config, world_size=int(os.environ["WORLD_SIZE"]))
    for finding in findings:
        print0(str(finding))
    if any(finding.level == "error" for finding in findings):
        raise UserError(f"{args.deepspeed_config} would not train what it says: see the findings above")

    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)

    if args.recompute:  # the JSON's activation_checkpointing section does not do this by itself
        model.gradient_checkpointing_enable()

    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    for name, value in what_deepspeed_made_of_it(engine).items():
        print0(f"{name:24} {value}")
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
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel())
    log.held_out(args.steps, held_out_loss(engine, held_out_blocks, engine.device))
    held_gib = live_tensor_bytes(engine.device) / 2**30
    print0(f"tensors held between steps: {held_gib:.4f} GiB a rank")
    log.record(held_gib=held_gib)
    log.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
