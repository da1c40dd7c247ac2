"""Day 11: mixed precision - fp32, bf16, fp16 with a loss scale, autocast: what is kept in which precision.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day11/train.py
    deepspeed --num_accelerators 2 day11/train.py --deepspeed_config day11/ds_config_fp32.json
    deepspeed --num_accelerators 2 day11/train.py --deepspeed_config day11/ds_config_fp16.json --emulate_fp16 --steps 20

Expect the precisions, read from the engine; training; and how many steps were skipped. look.py shows the bytes.
Checked with deepspeed 0.19.8. Source: arXiv:1710.03740; deepspeed/runtime/precision_config.py, fp16/loss_scaler.py.
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
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir, show_path
from config.check import check
from day11.precision import emulate_fp16, loss_scale


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--emulate_fp16", action="store_true", help="fp16 on a CPU that has no fp16 arithmetic: slow")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day11"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def refuse_errors(path: str) -> None:
    """Stop with the first error that config/check.py finds: some of these configs would train, and train wrongly."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path!r}: look at the path after --deepspeed_config")
    for finding in check(Path(path)):
        if finding.level == "error":
            raise UserError(f"{show_path(path)}: {str(finding).removeprefix('error: ')}")


def main() -> None:
    args = parse_args()
    require_launcher()
    refuse_errors(args.deepspeed_config)
    start_without_compiler()
    if args.emulate_fp16:
        emulate_fp16()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)

    # The JSON decides the precision: DeepSpeed casts the weights (fp16, bf16) or each matrix product (torch_autocast).
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    weights, autocast = next(engine.parameters()).dtype, engine.torch_autocast_enabled()
    print0(
        f"zero stage {engine.zero_optimization_stage()} | {type(engine.optimizer).__name__} | weights {weights}"
        f" | autocast {engine.torch_autocast_dtype() if autocast else None} | loss scale {loss_scale(engine)}"
    )
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
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
            engine.backward(loss)  # (1) fp16: of loss x scale
            local_loss += loss.detach() / accumulation
            engine.step()  # (2) fp16: skipped when a gradient is inf or nan; else of gradients / scale
        scaling = {"loss_scale": loss_scale(engine), "skipped_steps": engine.skipped_steps}
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel(), **scaling)
    log.held_out(args.steps, held_out_loss(engine, held_out_blocks, engine.device))
    print0(f"skipped steps: {engine.skipped_steps} of {engine.global_steps} | loss scale {loss_scale(engine)}")
    log.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
