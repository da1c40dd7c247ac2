"""Day 15: pipeline parallelism - a model as a list of layers, cut into stages, one on each rank.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day15/train.py
    deepspeed --num_accelerators 2 day15/train.py --stages 1

Expect DeepSpeed's list of layers, a line for each rank (its stage, layers, parameters), and a falling loss.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/tutorials/pipeline/; deepspeed/runtime/pipe/engine.py.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data and logger.
from common.cpu import start_without_compiler
from common.data import TokenBlocks, endless_batches, load_corpus, load_tokenizer
from common.errors import UserError, clear_errors
from common.model import Preset, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir
from day15.layers import Block, Embed, next_token_loss


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day15"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--stages", type=int, default=2, help="stages of the pipeline; must divide the ranks")
    return parser.parse_args()


def layer_specs(preset: Preset, vocab_size: int) -> list[LayerSpec]:
    """The model as a recipe: a LayerSpec builds nothing yet. No rank will ever hold more layers than its stage has.

    (To divide the parameters evenly, PipelineModule builds each layer once on every rank, counts, and drops it again.)
    """
    specs = [LayerSpec(Embed, vocab_size, preset.block_size, preset.hidden)]
    specs += [LayerSpec(Block, preset.hidden, preset.num_heads) for _ in range(preset.num_layers)]
    head = LayerSpec(torch.nn.Linear, preset.hidden, vocab_size, bias=False)  # day 16 ties it to the embedding
    return [*specs, LayerSpec(torch.nn.LayerNorm, preset.hidden), head]


def pairs(batches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What train_batch wants: (inputs for the first stage, labels for the last), a micro-batch at a time."""
    for batch in batches:
        yield batch["input_ids"], batch["labels"]


def loader_for(engine: deepspeed.PipelineEngine, blocks: TokenBlocks, seed: int) -> DataLoader:
    """All stages of one pipeline read the same blocks: the first takes the inputs, the last the labels."""
    place = {"num_replicas": engine.dp_world_size, "rank": engine.grid.get_data_parallel_rank()}  # not the world's!
    sampler = DistributedSampler(blocks, seed=seed, **place)
    return DataLoader(blocks, engine.micro_batch_size, sampler=sampler, drop_last=True)


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    ranks = int(os.environ["WORLD_SIZE"])
    if args.stages < 1 or ranks % args.stages:
        fitting = ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0)
        raise UserError(f"--stages {args.stages} does not divide the {ranks} ranks; possible here: {fitting}")
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()  # before PipelineModule, which divides the ranks into stages
    specs = layer_specs(preset, len(tokenizer))
    if args.stages > len(specs):
        raise UserError(f"--stages {args.stages} is more than the {len(specs)} layers of {args.model}: take fewer")
    # Each layer starts from a seed of its own, so the weights are the same for every number of stages. With the default
    # seed_fn this ends in a TypeError: it gives numpy's integers to random.seed (deepspeed 0.19.8, Python 3.11).
    seeds = {"seed_layers": True, "base_seed": args.seed, "seed_fn": torch.manual_seed}
    model = PipelineModule(specs, num_stages=args.stages, loss_fn=next_token_loss, **seeds)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    first, last = model.parts[engine.stage_id : engine.stage_id + 2]
    held = sum(parameter.numel() for parameter in model.parameters())
    line = f"stage {engine.stage_id} of {engine.num_stages} | layers {first} to {last - 1}"
    lines = [None] * ranks
    dist.all_gather_object(lines, f"{line} of {len(specs)} | {held:,} parameters | {engine.device.type}")
    print0("\n".join(f"rank {rank}: {line}" for rank, line in enumerate(lines)))
    m, p = engine.micro_batches, engine.num_stages
    batch = f"{m} micro-batches x {engine.micro_batch_size} sequences x {engine.dp_world_size} pipelines"
    how = f"bubble {(p - 1) / (m + p - 1):.1%} | zero {engine.zero_optimization_stage()}"
    print0(f"batch {engine.train_batch_size()} = {batch} | {how}")

    some = torch.utils.data.Subset(held_out_blocks, range(min(64, len(held_out_blocks))))
    held_out = loader_for(engine, some, args.seed)
    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    log.held_out(0, engine.eval_batch(pairs(held_out), num_micro_batches=len(held_out)).item())
    batches = pairs(endless_batches(loader_for(engine, train_blocks, args.seed)))
    tokens = engine.train_batch_size() * preset.block_size // ranks  # this rank's share
    for step in range(1, args.steps + 1):
        loss = engine.train_batch(batches)  # forward, backward, step of all micro-batches; the mean loss, on all ranks
        log.step(step, loss, tokens=tokens)
    log.held_out(args.steps, engine.eval_batch(pairs(held_out), num_micro_batches=len(held_out)).item())
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
