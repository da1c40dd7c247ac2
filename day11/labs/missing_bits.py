"""Day 11: bf16's missing bits - updates that are lost when the optimizer has no fp32 master weights.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day11/labs/missing_bits.py
    deepspeed --num_accelerators 1 day11/labs/missing_bits.py --model gpt2

Expect three tables: bf16's steps around a weight; how many weights a few updates have moved, with fp32 master weights
and without, by learning rate; and a second moment that decays, or cannot. missing_bits.json has the same.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/precision_config.py (bf16_optimizer_states), base_optimizer.py.
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0
from common.run_log import default_run_dir, show_path
from config.read import read_config

MASTERS = {"fp32": "ds_config.json", "bf16": "ds_config_bf16_states.json"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 1e-4, 1e-5], help="learning rates to compare")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day11"), help="folder for missing_bits.json")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    return parser.parse_args()


def steps_around(weight: float) -> dict:
    """The bf16 number below `weight`, and the smallest update that gets there: half the way, or it is rounded back."""
    at = torch.tensor(weight, dtype=torch.bfloat16)
    below = torch.nextafter(at, torch.zeros_like(at))
    return {"weight": at.item(), "below": below.item(), "half_step": (at.item() - below.item()) / 2}


def train(masters: str, rate: float, blocks, vocab_size: int, args: argparse.Namespace, device) -> dict:
    """Shares of the bf16 weights that differ from their first value after --steps updates: all, and ln_f's (1.0)."""
    torch.manual_seed(args.seed)
    with device:
        model = build_model(args.model, vocab_size)
    config = read_config(HERE / MASTERS[masters]) | {"train_micro_batch_size_per_gpu": 1}
    config["optimizer"]["params"]["lr"] = rate
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    batches = endless_batches(DataLoader(blocks, 1, sampler=DistributedSampler(blocks, seed=args.seed)))
    first = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(args.steps):
        engine.backward(engine(**to_device(next(batches), engine.device)).loss)
        engine.step()
    moved = torch.cat([(old != new).flatten() for old, new in zip(first, model.parameters(), strict=True)])
    norm_moved = model.transformer.ln_f.weight != 1
    master = next(iter(engine.basic_optimizer.state)).dtype
    engine.destroy()
    shares = {"moved": moved.float().mean().item(), "norm_moved": norm_moved.float().mean().item()}
    return {"rate": rate, "masters": str(master).removeprefix("torch."), **shares}


def second_moment(beta2: float, dtype: torch.dtype, steps: int = 1000) -> float:
    """AdamW's exp_avg_sq after a gradient of 1 and `steps` gradients of 0, over what it was after the first."""
    weight, after_one = torch.nn.Parameter(torch.zeros(1, dtype=dtype)), None
    adamw = torch.optim.AdamW([weight], betas=(0.9, beta2), weight_decay=0.0)
    for step in range(1 + steps):
        weight.grad = torch.full_like(weight, float(step == 0))
        adamw.step()
        after_one = after_one or adamw.state[weight]["exp_avg_sq"].item()
    return adamw.state[weight]["exp_avg_sq"].item() / after_one


def main() -> None:
    args = parse_args()
    if min(args.rates) <= 0:
        raise UserError(f"--rates {min(args.rates)}: a learning rate is larger than 0")
    device = join_world()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus("all", tokenizer, preset.block_size)
    steps = [steps_around(weight) for weight in (1.0, 0.1, 0.02)]
    for row in steps:
        print0("bf16: below {weight:.6f} comes {below:.6f}: an update under {half_step:.1e} is lost".format(**row))
    print0(f"\n{'lr':>7} {'masters':>9} {'moved in':>9} {args.steps} steps {'of ln_f.weight':>15}")
    moved, decay = [], []
    for rate in args.rates:
        for masters in MASTERS:
            row = train(masters, rate, blocks, len(tokenizer), args, device)
            moved.append(row)
            print0(f"{rate:7.0e} {row['masters']:>9} {row['moved']:17.2%} {row['norm_moved']:15.2%}")
    print0("\nAdam's second moment after 1000 gradients of 0, as a share of what it was:")
    for beta2 in (0.95, 0.999):
        shares = {"fp32": second_moment(beta2, torch.float32), "bf16": second_moment(beta2, torch.bfloat16)}
        decay.append({"beta2": beta2, **shares})
        print0(f"beta2 {beta2}: {shares['fp32']:.4f} in fp32, {shares['bf16']:.4f} in bf16")
    if torch.distributed.get_rank() == 0:
        values = {"steps": steps, "moved": moved, "decay": decay}
        write_results(Path(args.run_dir) / "missing_bits.json", this_command(), model=args.model, **values)
        print0(f"tables: {show_path(args.run_dir)}/missing_bits.json")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
