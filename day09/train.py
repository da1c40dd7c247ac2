"""Day 09: model parallelism - AutoTP cuts the matrices of a Llama or a Qwen, AutoEP the experts of a Mixtral.

From the repository root, on two CPU processes or two GPUs; on four ranks it is TP 2 x DP 2:

    deepspeed --num_accelerators 2 day09/train.py
    deepspeed --num_accelerators 2 day09/train.py --family mixtral --deepspeed_config day09/ds_config_ep.json

Expect a line for each rank with its place and the matrices that it has a part of, and a falling loss.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/tutorials/autotp-training/;
deepspeed/module_inject/auto_tp.py, auto_ep.py.
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from common.cpu import start_without_compiler
from common.data import TokenBlocks, endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.ranks import over_ranks, print0, require_launcher
from common.run_log import RunLog, default_run_dir
from day09.models import build_model, tokenizer_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day09"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--family", default="llama", help="llama, qwen2 or mixtral: what the layers are made of")
    return parser.parse_args()


def what_is_cut(engine: deepspeed.DeepSpeedEngine, whole: dict[str, tuple]) -> str:
    """This rank's place and, from the engine's own parameters, what it has of the first layer and of the output."""
    tp = max(1, engine.autotp_size())
    held = {name: tuple(parameter.shape) for name, parameter in engine.module.named_parameters()}
    shown = {}
    for name, shape in held.items():
        is_cut = ".experts." in name if name not in whole else shape != whole[name]  # AutoEP renames what it cuts
        if is_cut and (".layers.0." in name or ".layers." not in name):
            shown[name.removesuffix(".weight").rpartition(".")[2]] = f"{shape} of {whole.get(name, 'all experts')}"
    matrices = ", ".join(f"{name} {shape}" for name, shape in list(shown.items())[:3])
    total, everything = (sum(torch.Size(shape).numel() for shape in shapes.values()) for shapes in (held, whole))
    place = f"tp {dist.get_rank() % tp} of {tp}, dp {dist.get_rank() // tp} of {engine.dp_world_size}"
    return f"{place} | {total:,} of {everything:,} parameters | {len(shown)} matrices of a layer cut: {matrices}"


def loader_for(engine: deepspeed.DeepSpeedEngine, blocks: TokenBlocks, seed: int) -> DataLoader:
    """Ranks that share one model's matrices read the same blocks; AutoTP compares them in the first forward pass."""
    tp = max(1, engine.autotp_size())
    sampler = DistributedSampler(blocks, engine.dp_world_size, dist.get_rank() // tp, seed=seed)  # not the world's
    return DataLoader(blocks, engine.train_micro_batch_size_per_gpu(), sampler=sampler, drop_last=True)


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, blocks: TokenBlocks, seed: int, most: int = 64) -> float:
    """Mean loss over up to `most` blocks. Collective: every rank of a TP group takes part in each forward pass."""
    loader = loader_for(engine, torch.utils.data.Subset(blocks, range(min(most, len(blocks)))), seed)
    if not len(loader):
        raise UserError(f"{len(blocks)} held-out blocks do not fill one micro-batch on each of {engine.dp_world_size}")
    engine.eval()
    total = sum(engine(**to_device(batch, engine.device)).loss for batch in loader) / len(loader)
    engine.train()
    return over_ranks(total.item(), engine.device)


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    tokenizer, block_size = load_tokenizer(tokenizer_of(args.model)), 128
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, block_size)
    torch.manual_seed(args.seed)  # the same on every rank: each builds the whole model, and keeps its part of it
    model = build_model(args.family, args.model, len(tokenizer))
    whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # What is cut, and over how many ranks, the JSON says: tensor_parallel.autotp_size, expert_parallel.autoep_size.
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    lines = [None] * dist.get_world_size()
    dist.all_gather_object(lines, what_is_cut(engine, whole))
    print0("\n".join(f"rank {rank}: {line}" for rank, line in enumerate(lines)))
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    sequences = micro_batch * accumulation * engine.dp_world_size  # engine.train_batch_size() counts TP ranks as well
    batch = f"{micro_batch} micro x {accumulation} accumulation x {engine.dp_world_size} data parallel"
    print0(f"batch {sequences} = {batch} | zero {engine.zero_optimization_stage()} | {engine.device.type}")

    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    log.held_out(0, evaluate(engine, held_out_blocks, args.seed))
    batches = endless_batches(loader_for(engine, train_blocks, args.seed))
    tokens = sequences * block_size // dist.get_world_size()  # this rank's share
    for step in range(1, args.steps + 1):
        local_loss = 0.0
        for _ in range(accumulation):
            loss = engine(**to_device(next(batches), engine.device)).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=tokens)
    log.held_out(args.steps, evaluate(engine, held_out_blocks, args.seed))
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
