"""Day 25: the whole way once - prepare, train, evaluate - from one config file, each stage skipped when it is done.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day25/train.py
    deepspeed --num_accelerators 2 day25/train.py --run_dir runs/day25/mine --config capstone/configs/tiny.yaml

Expect what was prepared, training, a model that `transformers` loads, its perplexity, bits a byte and a multiple
choice. Day 26 puts an engine with checkpoints and monitoring in place of train().
Checked with deepspeed 0.19.8. Source: capstone/ (each module says which day it comes from).
"""

import argparse
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from capstone.config import Config, add_base_flags, as_yaml, deepspeed_section, resolve
from capstone.data import load_blocks, train_batches
from capstone.evaluate import evaluate_run, held_out_loss, print_report
from capstone.model import save_model
from capstone.prepare import checked, make_shards
from capstone.ranks import from_rank_0
from common.cpu import start_without_compiler
from common.data import load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, show_path
from day17.checkpoints import write_whole


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    add_base_flags(parser)
    return parser.parse_intermixed_args()  # flags and overrides in any order


def train(config: Config, tokenizer, facts: dict) -> None:
    """Train from fresh weights and save the model with `facts` beside it. Collective."""
    block_size, settings = get_preset(config.model.preset).block_size, config.train
    blocks = load_blocks(config, "train", block_size, verify=True)  # all shards, those of the held-out part too
    held_out = load_blocks(config, "held_out", block_size)
    torch.manual_seed(settings.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(config.model.preset, len(tokenizer), tokenizer.eos_token_id)
    section = deepspeed_section(config, torch.distributed.get_world_size())  # the same batch on any number of ranks
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=section)
    print0(f"zero stage {engine.zero_optimization_stage()} | batch {engine.train_batch_size()} | {engine.device.type}")
    log = RunLog(config.run_path, settings.steps, settings.log_every, engine.device)
    batches = train_batches(blocks, engine.train_micro_batch_size_per_gpu(), settings.seed)
    for step in range(1, settings.steps + 1):
        local_loss, accumulation = 0.0, engine.gradient_accumulation_steps()
        for _ in range(accumulation):
            batch = to_device(next(batches), engine.device)
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel())
        if step % settings.eval_every == 0 or step == settings.steps:
            log.held_out(step, held_out_loss(engine, held_out, engine.device))
    log.close()
    save_model(config, engine, tokenizer, facts)
    engine.destroy()


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    config = resolve(args)
    if config.model.code != "transformers" or config.train.recompute:
        raise UserError("this program trains transformers' GPT-2 as it is: model.code and train.recompute are day 26's")
    made = make_shards(config)  # before the ranks connect: no collective waits while one process works
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    manifest = checked(config, made)
    model_dir, tokenizer = config.run_path / "model", load_tokenizer(config.tokenizer.name)
    if torch.distributed.get_rank() == 0:
        write_whole(config.run_path / "config.yaml", as_yaml(config))

    # What the weights depend on, the number of ranks too: gradients are added up in another order.
    facts = {"data": manifest["fingerprint"], "model": config.model.model_dump(), "train": config.train.model_dump()}
    facts |= {"deepspeed": config.deepspeed, "ranks": torch.distributed.get_world_size()}
    if not from_rank_0(model_dir.exists):
        train(config, tokenizer, facts)
    else:
        before = from_rank_0(lambda: json.loads((model_dir / "training.json").read_text()))
        if changed := [key for key in facts if before.get(key) != facts[key]]:
            parts = ", ".join(changed)
            raise UserError(f"{show_path(model_dir)} was trained with other settings ({parts}): name another run_dir")
        print0(f"train: done already | {show_path(model_dir)}")
    torch.distributed.barrier()
    print_report(evaluate_run(config))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
