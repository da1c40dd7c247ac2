"""Day 16: GPT-2 in a pipeline - Hugging Face's weights, tied embedding, a cut of your choice, and each stage's time.

From the repository root, on two CPU processes or two GPUs; the third makes two pipelines of two stages each:

    deepspeed --num_accelerators 2 day16/train.py
    deepspeed --num_accelerators 2 day16/train.py --partition_method balanced
    deepspeed --num_accelerators 4 day16/train.py --stages 2 --deepspeed_config day16/ds_config_zero1.json

Expect a line for each rank (stage, layers, parameters), who shares the tied weight, and each stage's measured time.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/tutorials/pipeline/; deepspeed/runtime/pipe/engine.py.
"""

import argparse
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Take gpt2_pipe.py and stage_times.py along, and replace the others with your own data and logger.
from common.cpu import start_without_compiler
from common.data import TokenBlocks, endless_batches, load_corpus, load_tokenizer
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir, show_path
from config.read import read_config
from day16 import gpt2_pipe as gpt2
from day16.stage_times import StageClock, dtype_of, profile_layers

CLOCKED = range(2, 6)  # steps whose passes are timed: the first one warms up


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day16"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--stages", type=int, default=2, help="stages of the pipeline; must divide the ranks")
    parser.add_argument(
        "--partition_method",
        default="parameters",
        help="uniform, parameters, type:REGEX, balanced (by measured time), or parts:0,3,6",
    )
    parser.add_argument("--checkpoint_interval", type=int, default=0, help="layers per activation checkpoint, 0: none")
    parser.add_argument("--save", action="store_true", help="save a checkpoint at the end: day16/convert.py reads it")
    return parser.parse_args()


def loader_for(engine: deepspeed.PipelineEngine, blocks: TokenBlocks, seed: int) -> DataLoader:
    """Each pipeline its own blocks, the same ones on all its stages; no micro-batch smaller than the others."""
    place = {"num_replicas": engine.dp_world_size, "rank": engine.grid.get_data_parallel_rank()}  # not the world's!
    sampler = DistributedSampler(blocks, seed=seed, **place)
    return DataLoader(blocks, engine.train_micro_batch_size_per_gpu(), sampler=sampler, drop_last=True)


def build_pipeline(args: argparse.Namespace, config: dict, vocab_size: int) -> gpt2.CutPipeline:
    """This rank's stage of GPT-2, cut as --partition_method says, with the weights of the whole model."""
    shape, method = gpt2.shape_of(args.model, vocab_size), args.partition_method
    if args.stages > (num_layers := len(gpt2.layer_names(shape))):
        raise UserError(f"--stages {args.stages} is more than the {num_layers} layers of {args.model}: take fewer")
    if method == "balanced":
        costs = profile_layers(shape, config["train_micro_batch_size_per_gpu"], dtype_of(config))
        method = gpt2.best_balanced(costs, args.stages)
    model = gpt2.CutPipeline(
        gpt2.layer_specs(shape),
        num_stages=args.stages,
        loss_fn=gpt2.next_token_loss,
        partition_method=method,
        activation_checkpoint_interval=args.checkpoint_interval,
        checkpointable_layers=["GPT2Block"],  # without this list, an interval puts the embedding into a checkpoint too
    )
    # The weights of the whole model, so that every cut starts alike; or those of from_pretrained("gpt2").state_dict().
    gpt2.load_hf(model, shape, gpt2.whole_model(shape, args.seed).state_dict())
    return model


def print_proof(engine: deepspeed.PipelineEngine, model: gpt2.CutPipeline) -> None:
    """Which rank has which layers, and who shares the embedding, read from the engine. Collective."""
    first, last = model.parts[engine.stage_id : engine.stage_id + 2]
    held = sum(parameter.numel() for parameter in model.parameters())
    line = f"stage {engine.stage_id} of {engine.num_stages}, pipeline {engine.grid.get_data_parallel_rank()}"
    line += f" | layers {first} to {last - 1} of {model.parts[-1]} | {held:,} parameters"
    tied = [comm["ranks"] for comm in model.tied_comms.values()]  # empty on stages without a copy
    found = gpt2.from_all_ranks((line, tied))
    for rank, (line, _) in enumerate(found):
        print0(f"rank {rank}: {line}")
    shared = sorted({tuple(ranks) for _, tied in found for ranks in tied})
    print0(
        f"{engine.num_stages} stages x {engine.dp_world_size} pipelines | zero {engine.zero_optimization_stage()}"
        f" | tied on ranks {shared or 'none: one stage'} | {engine.micro_batches} micro-batches"
        f" | checkpoint interval {model.activation_checkpoint_interval} | {engine.device.type}"
    )
    if engine.num_stages > 1 and engine.gradient_clipping() and not engine.zero_optimization_stage():
        print0("note: without ZeRO the gradients are clipped by the first stage's norm alone (0.19.8): use ZeRO-1")


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    ranks = int(os.environ["WORLD_SIZE"])
    if args.stages < 1 or ranks % args.stages:
        fitting = ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0)
        raise UserError(f"--stages {args.stages} does not divide the {ranks} ranks; possible here: {fitting}")
    if args.checkpoint_interval < 0:  # PipelineModule would run no layer at all
        raise UserError(f"--checkpoint_interval {args.checkpoint_interval}: 1 or more layers, or 0 for none")
    config = read_config(args.deepspeed_config, needs=["train_micro_batch_size_per_gpu"])
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()  # before PipelineModule, which divides the ranks into stages
    model = build_pipeline(args, config, len(tokenizer))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    print_proof(engine, model)

    held_out = torch.utils.data.Subset(held_out_blocks, range(min(64, len(held_out_blocks))))
    held_out = loader_for(engine, held_out, args.seed)
    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    log.held_out(0, engine.eval_batch(gpt2.pairs(held_out), num_micro_batches=len(held_out)).item())
    batches = gpt2.pairs(endless_batches(loader_for(engine, train_blocks, args.seed)))  # must not end inside a step
    tokens = engine.train_batch_size() * preset.block_size // ranks  # this rank's share
    for step in range(1, args.steps + 1):
        if step == CLOCKED.start:
            clock = StageClock(engine)
        log.step(step, engine.train_batch(batches), tokens=tokens)
        if step == CLOCKED[-1]:
            clock.stop()
            for rank, seconds in enumerate(gpt2.from_all_ranks(clock.take() / len(CLOCKED) / engine.micro_batches)):
                print0(f"rank {rank}: {seconds * 1000:.1f} ms forward and backward a micro-batch")
    log.held_out(args.steps, engine.eval_batch(gpt2.pairs(held_out), num_micro_batches=len(held_out)).item())
    log.close()
    if args.save:
        engine.save_checkpoint(args.run_dir, tag="pipeline")  # a file a layer, written by the first pipeline
        print0(f"layers: {show_path(args.run_dir)}/pipeline")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
