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
import json
import sys
import time
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.cpu import start_without_compiler
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.plots import plot_bars
from common.ranks import over_ranks, print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path


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
    parser.add_argument("--run_dir", default=default_run_dir("day10"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def read_config(stage: int, accumulation: int, args: argparse.Namespace) -> dict:
    """The JSON with a constant rate, this stage, and the global batch cut into `accumulation` micro-batches a rank."""
    config = json.loads(Path(args.deepspeed_config).read_text())
    config.pop("scheduler", None)
    ranks = dist.get_world_size()
    if accumulation < 1 or args.global_batch % (accumulation * ranks):
        raise UserError(
            f"--global_batch {args.global_batch} cannot be cut into {accumulation} micro-batches x {ranks} ranks"
        )
    micro_batch = args.global_batch // (accumulation * ranks)
    config |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation}
    config["zero_optimization"]["stage"] = stage
    if get_accelerator().device_name() != "cpu":
        config["optimizer"]["params"].pop("torch_adam", None)  # FusedAdam, compiled on first use
        config["zero_optimization"]["reduce_bucket_size"] = 50_000_000  # models are larger there
    if args.bf16 and stage > 0:  # bf16 without ZeRO starts wrongly in 0.19.8: day 03
        config["bf16"] = {"enabled": True}
    return config


def whole_weights(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    """All weights as one vector on the host. Collective at stage 3."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return torch.cat([parameter.detach().flatten().float().cpu() for parameter in engine.module.parameters()])


def measure(config: dict, blocks, vocab_size: int, args: argparse.Namespace) -> tuple[dict, torch.Tensor]:
    """Train with `config`; return the row of the table and the weights after the last step."""
    get_accelerator().reset_peak_memory_stats()
    torch.manual_seed(args.seed)
    model = build_model(args.model, vocab_size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    equation = f"{engine.train_batch_size()} = {micro_batch} x {accumulation} x {engine.dp_world_size}"
    # Each rank takes its share of the same global batch, in the same order, however it is cut into micro-batches.
    batches = endless_batches(DataLoader(blocks, micro_batch, sampler=DistributedSampler(blocks, seed=args.seed)))
    losses, times, saved = [], [], {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for step in range(args.steps):
        get_accelerator().synchronize()
        start, local_loss = time.perf_counter(), 0.0
        for micro_step in range(accumulation):
            batch = to_device(next(batches), engine.device)
            if step == micro_step == 0:  # once: what autograd keeps of this micro-batch until its backward pass
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    loss = engine(**batch).loss
            else:
                loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        get_accelerator().synchronize()
        times.append(time.perf_counter() - start)
        losses.append(over_ranks(float(local_loss), engine.device))
    weights, stage = whole_weights(engine), engine.zero_optimization_stage()
    weight_storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    activations = sum(size for address, size in saved.items() if address not in weight_storages)
    peak = None if engine.device.type == "cpu" else get_accelerator().max_memory_allocated()
    step_s, norm = over_ranks(median(times[2:]), engine.device, "max"), engine.get_global_grad_norm()
    engine.destroy()
    return {
        "stage": stage, "micro_batch": micro_batch, "accumulation": accumulation, "equation": equation,
        "activation_bytes": activations, "peak_bytes": peak, "norm": norm and float(norm),
        "tokens_per_s": args.global_batch * blocks.block_size / step_s, "losses": losses,
    }, weights  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.steps < 3:
        raise UserError(f"--steps {args.steps}: at least 3, as the first two warm up and are not timed")
    require_launcher()
    start_without_compiler()
    deepspeed.init_distributed()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    table, first = [], None
    print0("batch = micro x accumulation x ranks; activations: MB that autograd keeps of one micro-batch on a rank")
    heads = ["activations", "peak MB", "tok/s", "norm", "loss", "difference"]
    print0(f"{'zero':4} {'batch':>16}" + "".join(f"{head:>12}" for head in heads))
    for stage in args.stages:
        for accumulation in args.accumulations:
            config = read_config(stage, accumulation, args)
            try:
                row, weights = measure(config, blocks, len(tokenizer), args)
            except torch.OutOfMemoryError:
                table.append({"stage": stage, "accumulation": accumulation, "error": "out of memory"})
                print0(f"{stage:4} accumulation {accumulation}: out of memory")
                continue
            finally:
                gc.collect()
                get_accelerator().empty_cache()
            first = weights if first is None else first
            row["difference"] = (weights - first).abs().max().item()
            table.append(row)
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
            norm = "None" if row["norm"] is None else f"{row['norm']:.4f}"
            cells = [f"{row['activation_bytes'] / 1e6:.2f}", peak, f"{row['tokens_per_s']:.0f}", norm]
            cells += [f"{row['losses'][-1]:.6f}", f"{row['difference']:.1e}"]
            print0(f"{stage:4} {row['equation']:>16}" + "".join(f"{cell:>12}" for cell in cells))

    if dist.get_rank() == 0:
        write_results(Path(args.run_dir) / "compare.json", this_command(), table=table)
        done = {f"zero {row['stage']}, {row['equation']}": row for row in table if "error" not in row}
        title, activations = f"{args.model}, {dist.get_world_size()} ranks", "MB of activations, a rank and micro-batch"
        for kind, scale, unit in (("activation_bytes", 1e6, activations), ("tokens_per_s", 1, "tokens/s")):
            path = Path(args.run_dir) / f"{kind}.png"
            plot_bars({name: row[kind] / scale for name, row in done.items()}, path, title, unit)
        print0(f"table: {show_path(args.run_dir)}/compare.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
