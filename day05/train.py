"""Day 05: ZeRO-1 - optimizer states partitioned: each rank keeps, and updates, its slice of them.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day05/train.py
    deepspeed --num_accelerators 2 day05/train.py --deepspeed_config day05/ds_config_bf16.json
    deepspeed --num_accelerators 2 day05/train.py --deepspeed_config day05/ds_config_zero0.json

Expect each rank's slice, read from the engine; training as on day 02; then the bytes held, measured and computed.
Checked with deepspeed 0.19.8. Source: Rajbhandari et al. 2019 (ZeRO), arXiv:1910.02054.
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
from bench.held import bytes_by_kind, settled_tensors
from common.cpu import start_without_compiler
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir
from config.plan import model_state_bytes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day05"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def slice_of_this_rank(engine: deepspeed.DeepSpeedEngine, total: int) -> str:
    """Which of the flat vector's `total` elements this rank updates, and in which parameters they lie."""
    optimizer, rank = engine.optimizer, engine.global_rank
    if engine.zero_optimization_stage() == 0:
        return f"rank {rank} owns elements 0 to {total:,}: all, as every other rank does"
    size = optimizer.single_partition_of_fp32_groups[0].numel()  # fp32 weights of this rank, padding included
    names = list(optimizer._param_slice_mappings[0])  # the parameters that this slice touches
    first, last = rank * size, min((rank + 1) * size, total)
    return f"rank {rank} owns elements {first:,} to {last:,} of {total:,}: {names[0]} to {names[-1]}"


def held_between_steps(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    """Bytes of this rank's tensors by kind. Adam keeps its state by weight, and the weight is its own fp32 slice."""
    states = [t for weights, state in engine.basic_optimizer.state.items() for t in (weights, *state.values())]
    tensors = settled_tensors(engine.device).values()
    return bytes_by_kind(tensors, parameters=engine.module.parameters(), optimizer=states)


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)

    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=args.deepspeed_config
    )
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    num_params = sum(parameter.numel() for parameter in model.parameters())
    stage, weight = engine.zero_optimization_stage(), next(model.parameters())
    if stage == 3:
        raise UserError(f"zero stage 3 in {args.deepspeed_config}: this day takes 0 to 2, stage 3 is day 07")
    print0(f"zero stage {stage} | {type(optimizer).__name__} | weights {weight.dtype} | {engine.device.type}")
    if stage > 0 and optimizer.reduce_bucket_size > num_params:
        print0(f"note: a bucket of {optimizer.reduce_bucket_size:,} elements, larger than the model, is held in full")
    slices = [None] * engine.dp_world_size
    torch.distributed.all_gather_object(slices, slice_of_this_rank(engine, num_params))
    print0("\n".join(slices))
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

    held = held_between_steps(engine)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[weight.dtype]
    want = model_state_bytes(num_params, engine.dp_world_size, stage, precision)
    for kind in ("parameters", "optimizer"):
        print0(f"{kind:10} {held[kind]:>12,} bytes held | {want[kind]:>14,.0f} computed")
    log.record(held_bytes=held, computed_bytes={kind: want[kind] for kind in held if kind in want})
    log.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
