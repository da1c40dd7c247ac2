"""Day 10: compare - the same global batch in 1, 2, 4, 8 micro-batches: memory, tokens/s, and the weights it ends at.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day10/labs/compare.py
    deepspeed --num_accelerators 2 day10/labs/compare.py --deepspeed_config day10/ds_config_sgd.json --stages 0 1 2 3
    deepspeed --num_accelerators 1 day10/labs/compare.py --model gpt2 --global_batch 64 --accumulations 1 4 16 --bf16

Expect a table whose last column, the largest difference of any weight, stays near zero; compare.json and two plots.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/docs/config-json/ (batch size related parameters).
"""

import argparse
import gc
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free, peak_bytes, saved_for_backward
from bench.table import Table
from bench.timing import slowest_median, time_step
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.read import read_config

COLUMNS = {
    "activations": "activation_bytes:MB", "peak MB": "peak_bytes:MB", "tok/s": "tokens_per_s:.0f", "norm": "norm:.4f",
    "loss": "losses.-1:.6f", "difference": "difference:.1e",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2], help="ZeRO stages")
    parser.add_argument("--accumulations", nargs="+", type=int, default=[1, 2, 4, 8], help="micro-batches a step")
    parser.add_argument("--global_batch", type=int, default=16, help="sequences an optimizer step, all ranks together")
    parser.add_argument("--bf16", action="store_true", help="bf16 (from ZeRO-1 on) instead of fp32")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day10"), help="folder for compare.json and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def case_config(stage: int, accumulation: int, args: argparse.Namespace) -> dict:
    """The JSON with a constant rate, this stage, and the global batch cut into `accumulation` micro-batches a rank."""
    config = read_config(args.deepspeed_config)
    config.pop("scheduler", None)
    ranks = dist.get_world_size()
    if accumulation < 1 or args.global_batch % (accumulation * ranks):
        raise UserError(
            f"--global_batch {args.global_batch} cannot be cut into {accumulation} micro-batches x {ranks} ranks"
        )
    micro_batch = args.global_batch // (accumulation * ranks)
    config |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation}
    config.setdefault("zero_optimization", {})["stage"] = stage
    if get_accelerator().device_name() != "cpu":
        config["optimizer"]["params"].pop("torch_adam", None)  # FusedAdam, compiled on first use
        config["zero_optimization"]["reduce_bucket_size"] = 50_000_000  # models are larger there
    if args.bf16 and stage > 0:  # bf16 without ZeRO makes its first ten steps too short (0.19.8): day 11
        config["bf16"] = {"enabled": True}
    return config


def whole_weights(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    """All weights as one vector on the host. Collective at stage 3."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return torch.cat([parameter.detach().flatten().float().cpu() for parameter in engine.module.parameters()])


def train_step(engine: deepspeed.DeepSpeedEngine, batches: Iterator[dict]) -> torch.Tensor:
    """One optimizer step of this rank's micro-batches; return their mean loss."""
    accumulation = engine.gradient_accumulation_steps()
    local_loss = 0.0
    for _ in range(accumulation):
        loss = engine(**to_device(next(batches), engine.device)).loss
        engine.backward(loss)
        engine.step()
        local_loss += loss.detach() / accumulation
    return local_loss


def activation_bytes(engine: deepspeed.DeepSpeedEngine, batch: dict) -> int:
    """What autograd keeps of one micro-batch until its backward pass. Looks at a forward pass, and trains nothing."""
    with saved_for_backward(engine.module.parameters()) as saved:
        engine(**to_device(batch, engine.device))
    return sum(saved.values())


def measure(config: dict, blocks, vocab_size: int, args: argparse.Namespace) -> tuple[dict, torch.Tensor]:
    """Train with `config`; return the row of the table and the weights after the last step."""
    get_accelerator().reset_peak_memory_stats()
    torch.manual_seed(args.seed)
    model = build_model(args.model, vocab_size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    micro_batch = engine.train_micro_batch_size_per_gpu()
    # Each rank takes its share of the same global batch, in the same order, however it is cut into micro-batches.
    batches = endless_batches(DataLoader(blocks, micro_batch, sampler=DistributedSampler(blocks, seed=args.seed)))
    steps = [time_step(partial(train_step, engine, batches)) for _ in range(args.steps)]
    row = {
        "micro_batch": micro_batch,
        "equation": f"{engine.train_batch_size()} = {micro_batch} x {engine.gradient_accumulation_steps()}"
        f" x {engine.dp_world_size}",
        "peak_bytes": None if engine.device.type == "cpu" else peak_bytes(engine.device),
        "losses": [over_ranks(float(loss), engine.device) for _, loss in steps],
    }
    norm = engine.get_global_grad_norm()
    row["norm"] = norm and float(norm)
    step_s = slowest_median([seconds for seconds, _ in steps], engine.device, warm_up=2)
    row["tokens_per_s"] = args.global_batch * blocks.block_size / step_s
    weights = whole_weights(engine)
    row["activation_bytes"] = activation_bytes(engine, next(batches))
    engine.destroy()
    return row, weights


def main() -> None:
    args = parse_args()
    if args.steps < 3:
        raise UserError(f"--steps {args.steps}: at least 3, as the first two warm up and are not timed")
    device = join_world()
    ranks = dist.get_world_size()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    gc.freeze()  # what is here now is no case's: it stays when a case is emptied
    print0("batch = micro x accumulation x ranks; activations: MB that autograd keeps of one micro-batch on a rank")
    table = Table(Path(args.run_dir) / "compare.json", COLUMNS, width=24)
    first = None  # the weights at the end of the first case
    for stage in args.stages:
        for accumulation in args.accumulations:
            config = case_config(stage, accumulation, args)
            case = f"zero {stage}, {args.global_batch} = {config['train_micro_batch_size_per_gpu']} x {accumulation}"
            kept = live_tensors(device)
            with table.row(f"{case} x {ranks}", stage=stage, accumulation=accumulation) as row:
                measured, weights = measure(config, blocks, len(tokenizer), args)
                if first is None:
                    first = weights  # stays, when the rest of its case is emptied
                    kept[first.untyped_storage().data_ptr()] = first
                row |= measured | {"difference": (weights - first).abs().max().item()}
            free(device, kept)
    title = f"{args.model}, {ranks} ranks"
    table.bars("activation_bytes", "MB of activations, a rank and micro-batch", title, scale=1e6)
    table.bars("tokens_per_s", "tokens/s", title)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
