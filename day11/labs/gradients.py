"""Day 11: gradients - in which precision they are averaged and added up, how far off the sum is, and what it costs.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day11/labs/gradients.py
    deepspeed --num_accelerators 2 day11/labs/gradients.py --accumulation 64 --stages 2

Expect a row a stage and setting, from the same bf16 micro-batches: the distance to their exact sum, taken in fp64; the
bytes sent for gradients, and those held. Then a buffer of fp32 in a bf16 model, with and without
data_types.keep_in_fp32_modules. gradients.json has both.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py (get_data_types), runtime/keep_in_fp32.py.
"""

import argparse
import gc
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import bytes_by_kind, live_tensors, settled_tensors
from bench.memory import free
from bench.table import Table
from bench.traffic import count_traffic
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.read import read_config

FP32_SUM = {"data_types": {"grad_accum_dtype": "fp32"}}
FP32_SENT = {"communication_data_type": "fp32"}
SETTINGS = {"bf16": {}, "sent in fp32": FP32_SENT, "added in fp32": FP32_SUM, "both in fp32": FP32_SENT | FP32_SUM}
COLUMNS = {"off": "off:.2e", "sent MB": "sent_bytes:MB", "held MB": "held_bytes:MB"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3], help="ZeRO stages")
    parser.add_argument("--accumulation", type=int, default=16, help="micro-batches a step, of one sequence each")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day11"), help="folder for gradients.json")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def fresh_model(vocab_size: int, args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(args.seed)
    with device:
        return build_model(args.model, vocab_size)


def exact_sum(model: torch.nn.Module, batches: list[dict]) -> torch.Tensor:
    """The mean gradient over micro-batches and ranks: computed in bf16 as DeepSpeed does, added up in fp64."""
    model = model.bfloat16()
    total = sum(p.numel() for p in model.parameters())
    mean = torch.zeros(total, dtype=torch.float64, device=next(model.parameters()).device)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
        mean += torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()
        model.zero_grad()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def gradient_bytes(engine: deepspeed.DeepSpeedEngine, device: torch.device) -> int:
    """Bytes of all there is on this rank but weights and masters: gradients, their sums, buckets. Before the update."""
    weights = [part for p in engine.module.parameters() for part in (p, getattr(p, "ds_tensor", p))]
    masters = [weight for group in engine.basic_optimizer.param_groups for weight in group["params"]]
    return bytes_by_kind(settled_tensors(device).values(), weights=weights, masters=masters)["other"]


def measure(stage: int, setting: dict, batches: list[dict], exact: torch.Tensor, vocab_size: int, args, device) -> dict:
    """All micro-batches of a step but not the update: the gradient beside the exact one, bytes sent, bytes held."""
    config = read_config(HERE / "ds_config.json") | setting
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": len(batches)}
    config["zero_optimization"] = {"stage": stage, "reduce_bucket_size": 500_000}
    model = fresh_model(vocab_size, args, device)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    with count_traffic() as traffic:
        for batch in batches:
            engine.backward(engine(**batch).loss)
            if batch is not batches[-1]:
                engine.step()
    held = over_ranks(gradient_bytes(engine, device), device, "max")
    found = torch.cat([safe_get_full_grad(parameter).flatten() for parameter in model.parameters()]).double()
    gathered = {"all_gather_into_tensor"}  # weights, not gradients
    traffic.calls = {name: sizes for name, sizes in traffic.calls.items() if name not in gathered}
    row = {"stage": stage, "optimizer": type(engine.optimizer).__name__, "held_bytes": held}
    row |= {"sent_bytes": traffic.sent_bytes(), "off": ((found - exact).norm() / exact.norm()).item()}
    engine.destroy()
    return row


class Router(torch.nn.Linear):
    """A router of 256 experts as mixtures of experts have it: its bias is a buffer."""

    def __init__(self) -> None:
        super().__init__(8, 256, bias=False)
        self.register_buffer("score_bias", torch.zeros(256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.score_bias


def keep_in_fp32(patterns: list[str]) -> str:
    """What becomes of a buffer and of a weight in a model that zero.Init builds in bf16, as ZeRO-3 does."""
    config = read_config(HERE / "ds_config.json") | {"data_types": {"keep_in_fp32_modules": patterns}}
    config["zero_optimization"] = {"stage": 3}
    with deepspeed.zero.Init(config_dict_or_path=config):
        router = Router()
    values = 8 + torch.arange(256) / 1000  # as close together as in some released models
    router.score_bias.copy_(values)  # what loading a checkpoint does
    deepspeed.initialize(model=router, model_parameters=router.parameters(), config=config)[0].destroy()
    kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (router.score_bias, router.weight)]
    return f"score_bias {kinds[0]}, {router.score_bias.unique().numel()} of {len(values)} values | weight {kinds[1]}"


def main() -> None:
    args = parse_args()
    if args.accumulation < 2:
        raise UserError(f"--accumulation {args.accumulation}: at least 2, or there is nothing to add up")
    if not set(args.stages) <= {1, 2, 3}:
        raise UserError(f"--stages {' '.join(map(str, args.stages))}: 1 to 3, stage 0 has no key for its sums")
    device = join_world()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    loader = endless_batches(DataLoader(blocks, 1, sampler=DistributedSampler(blocks, seed=args.seed)))
    batches = [to_device(next(loader), device) for _ in range(args.accumulation)]
    exact = exact_sum(fresh_model(len(tokenizer), args, device), batches)
    gc.freeze()  # what is here now is no case's: walks over the live tensors no longer see it, and are fast
    print0("off: distance to the exact gradient, over its length; sent and held: for gradients, MB a rank")
    table = Table(Path(args.run_dir) / "gradients.json", COLUMNS, width=24, accumulation=args.accumulation)
    for stage in args.stages:
        for name, setting in SETTINGS.items():
            kept = live_tensors(device)
            with table.row(f"zero {stage}, {name}", setting=name) as row:
                row |= measure(stage, setting, batches, exact, len(tokenizer), args, device)
            free(device, kept)
    kept = {str(patterns): keep_in_fp32(patterns) for patterns in ([], ["score_bias"])}
    for patterns, said in kept.items():
        print0(f"keep_in_fp32_modules {patterns}: {said}")
    table.save(keep_in_fp32=list(kept.values()))
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
