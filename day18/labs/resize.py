"""Day 18: resize - save at each ZeRO stage, convert, load on these ranks at each stage, and compare the losses.

From the repository root, into one folder; each launch loads what all launches before it have saved:

    deepspeed --num_accelerators 1 day18/labs/resize.py --run_dir runs/day18/resize
    deepspeed --num_accelerators 2 day18/labs/resize.py --run_dir runs/day18/resize

Expect a row for each pair of source and target: the largest difference to the loss of the source that just went on.
Checked with deepspeed 0.19.8. Source: deepspeed/checkpoint/universal_checkpoint.py, runtime/zero/stage3.py.
"""

import argparse
import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import losses_apart
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.model import build_model
from common.ranks import over_ranks
from common.run_log import default_run_dir
from config.read import read_config
from day17.saving import save
from day18.convert import convert
from day18.loading import load_safely

GLOBAL_BATCH, LENGTH = 8, 64


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day18"), help="folder for checkpoints and resize_N.json")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3], help="ZeRO stages to save and to load at")
    parser.add_argument("--bf16", action="store_true", help="train in bf16 instead of fp32")
    parser.add_argument("--only_load", action="store_true", help="save nothing, load what is there")
    return parser.parse_args()


def start(stage: int, universal: bool, args: argparse.Namespace) -> deepspeed.DeepSpeedEngine:
    config = read_config(args.deepspeed_config)
    config["train_micro_batch_size_per_gpu"] = GLOBAL_BATCH // dist.get_world_size()
    config["zero_optimization"]["stage"] = stage
    config |= {"bf16": {"enabled": args.bf16}, "checkpoint": {"load_universal": universal}}
    torch.manual_seed(args.seed)
    model = build_model("tiny", 4096)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train(engine: deepspeed.DeepSpeedEngine, steps: int) -> list[float]:
    """Train on two batches in turn, the same whatever the ranks; return the losses over all ranks."""
    losses, mine = [], GLOBAL_BATCH // engine.dp_world_size
    for _ in range(steps):
        seed = torch.Generator().manual_seed(engine.global_steps % 2)
        batch = torch.randint(0, 4096, (GLOBAL_BATCH, LENGTH), generator=seed).split(mine)[engine.global_rank]
        loss = engine(input_ids=batch.to(engine.device), labels=batch.to(engine.device)).loss
        engine.backward(loss)
        engine.step()
        losses.append(over_ranks(loss.item(), engine.device))
    return losses


def save_at(stage: int, folder: Path, args: argparse.Namespace) -> None:
    """Train, save, convert; note down the losses of the run that just goes on. Collective."""
    engine = start(stage, False, args)
    train(engine, args.steps)
    save(engine, folder / "checkpoints", args.steps, keep_last=1, held_out=None)
    went_on = train(engine, args.steps)
    engine.destroy()
    convert(folder / "checkpoints" / f"step{args.steps:06d}", workers=1)
    if dist.get_rank() == 0:
        (folder / "went_on.json").write_text(json.dumps(went_on))


def load_at(stage: int, source: Path, args: argparse.Namespace) -> float:
    """Load `source` at `stage` on these ranks; return the largest difference of a loss to the run that went on."""
    engine = start(stage, True, args)
    path, client_state = engine.load_checkpoint(str(source / "checkpoints"))  # by its own latest_universal
    if path is None or client_state["step"] != engine.global_steps:
        raise UserError(f"DeepSpeed loaded nothing from {source}")
    losses, went_on = train(engine, args.steps), json.loads((source / "went_on.json").read_text())
    engine.destroy()
    return losses_apart(losses, went_on)


def main() -> None:
    args = parse_args()
    join_world()
    load_safely()
    root, world = Path(args.run_dir), dist.get_world_size()
    if GLOBAL_BATCH % world:
        raise UserError(f"{GLOBAL_BATCH} sequences do not divide by {world} ranks: take 1, 2, 4 or 8")
    for stage in () if args.only_load else args.stages:
        save_at(stage, root / f"{world}_ranks_zero{stage}", args)
    dist.barrier()

    table = Table(root / f"resize_{world}.json", {f"stage {stage}": f"stage_{stage}:.1e" for stage in args.stages})
    for source in sorted(path.parent for path in root.glob("*/went_on.json")):
        differences = {f"stage_{stage}": load_at(stage, source, args) for stage in args.stages}
        table.add({"case": source.name, **differences})
    worst = max(row[f"stage_{stage}"] for row in table.rows for stage in args.stages)
    table.save(worst=worst)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
