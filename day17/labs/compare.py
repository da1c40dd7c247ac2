"""Day 17: compare ways to save - bytes, how long training stands still, and what DeepSpeed 0.19.8 refuses.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day17/labs/compare.py
    deepspeed --num_accelerators 2 day17/labs/compare.py --model mini --cases zero2 background

Expect a row for each way: stage, bytes of all files, ms that training stood still, ms until the files were whole (the
median of five saves), or the error. All run in one process group on the same model. compare.json has the same.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/checkpoint_engine/, deepspeed/runtime/model_checkpointing/.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.timing import slowest_median, time_step
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.run_log import default_run_dir
from config.read import read_config
from day17.checkpoints import from_all_ranks, publish
from day17.saving import BackgroundWriter

PYTHON, FAST = ({"writer": {"type": kind, "data_parallel": "replica"}} for kind in ("python", "fast"))
DECOUPLED = {"writer": {**PYTHON["writer"], "decoupled": True}}
CASES = {  # name: (ZeRO stage, parts of the config that differ, what to call)
    "zero1": (1, {}, "save"),
    "zero2": (2, {}, "save"),
    "zero3": (3, {}, "save"),
    "zero2_bf16": (2, {"bf16": {"enabled": True}}, "save"),
    "published": (2, {}, "publish"),
    "background": (2, {}, "background"),
    "export_16bit": (3, {"bf16": {"enabled": True}}, "export"),
    "frozen_saved": (3, {}, "frozen_saved"),
    "frozen_left_out": (3, {}, "frozen_left_out"),
    "writer_python": (2, {"checkpoint": PYTHON}, "save"),
    "writer_no_parallel": (2, {"checkpoint": {"writer": {"type": "python"}}}, "save"),
    "writer_fast": (2, {"checkpoint": FAST}, "save"),
    "decoupled_zero2": (2, {"checkpoint": DECOUPLED}, "save"),
    "decoupled_zero3": (3, {"checkpoint": DECOUPLED}, "save"),
    "datastates": (2, {"datastates_ckpt": {"host_cache_size": 1}}, "save"),
    "nebula": (2, {"nebula": {"enabled": True}}, "save"),
}
REPEATS = 5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day17"), help="folder for compare.json")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="ways to save")
    return parser.parse_args()


def train_step(engine: deepspeed.DeepSpeedEngine) -> None:
    ids = torch.randint(0, 4096, (1, 64), device=engine.device)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def start(case: str, args: argparse.Namespace) -> deepspeed.DeepSpeedEngine:
    """Build the model and the engine of a case. Collective."""
    stage, changes, how = CASES[case]
    config = read_config(args.deepspeed_config) | changes
    config["zero_optimization"] |= {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    torch.manual_seed(args.seed)
    model = build_model(args.model, 4096)
    if how.startswith("frozen"):  # fine-tuning: the last block learns, the rest is as it came
        model.requires_grad_(False).transformer.h[-1].requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    if how == "background":
        engine.checkpoint_engine = BackgroundWriter(engine._config)
    return engine


def way_to_save(how: str, engine: deepspeed.DeepSpeedEngine, root: Path) -> Callable[[str], object]:
    """The function that saves under a tag, as the case says."""
    if how == "export":
        return lambda tag: engine.save_16bit_model(str(root / tag), "pytorch_model.bin")
    save = partial(engine.save_checkpoint, str(root), exclude_frozen_parameters=how == "frozen_left_out")
    if how == "publish":
        return lambda tag: (save(tag=f"partial_{tag}"), publish(root / f"partial_{tag}", tag, step=engine.global_steps))
    return lambda tag: save(tag=tag)


def measure(case: str, args: argparse.Namespace) -> dict:
    """Save REPEATS times after a warm-up save; return bytes, and the median times in ms of the slowest rank."""
    engine, root = start(case, args), Path(args.run_dir, case)
    save, writer = way_to_save(CASES[case][2], engine, root), engine.checkpoint_engine
    stood_s, whole_s = [], []
    for tag in (f"save_{number}" for number in range(1 + REPEATS)):
        train_step(engine)
        dist.barrier()
        stood_s.append(time_step(lambda tag=tag: save(tag))[0])
        after_s, _ = time_step(lambda: train_step(engine))  # a decoupled writer makes this wait for its files
        if isinstance(writer, BackgroundWriter):
            after_s += time_step(lambda: writer.wait(root))[0]
        elif not writer.is_decoupled():
            after_s = 0.0  # the files were whole when the call returned
        whole_s.append(stood_s[-1] + after_s)
        total = sum(path.stat().st_size for path in (root / tag).rglob("*") if path.is_file())
        dist.barrier()  # all ranks have counted
        if dist.get_rank() == 0:
            shutil.rmtree(root / tag)
    writer.cleanup()
    engine.destroy()
    # the first save also pays for what is done once
    stood_ms, whole_ms = (1e3 * slowest_median(seconds, engine.device, warm_up=1) for seconds in (stood_s, whole_s))
    return {"bytes": total, "stood_ms": stood_ms, "whole_ms": whole_ms}


def main() -> None:
    args = parse_args()
    device = join_world()
    if unknown := set(args.cases) - set(CASES):
        raise UserError(f"unknown cases {sorted(unknown)}; there are {', '.join(CASES)}")
    os.environ |= {"CROSS_RANK": "0", "CROSS_SIZE": "1"}  # machine and machines: DeepSpeed's writers look here
    get_preset(args.model)
    num_params = sum(parameter.numel() for parameter in build_model(args.model, 4096).parameters())
    columns = {"stage": "stage:d", "MB": "bytes:MB", "stood ms": "stood_ms:,.0f", "whole ms": "whole_ms:,.0f"}
    table = Table(Path(args.run_dir) / "compare.json", columns | {"result": "result:s"}, num_params=num_params)
    before = live_tensors(device)
    for case in args.cases:
        row = {"case": case, "stage": CASES[case][0], "bytes": None, "stood_ms": None, "whole_ms": None}
        error = None
        try:
            row |= measure(case, args)
        except Exception as caught:  # what DeepSpeed refuses is part of the comparison
            error = f"{type(caught).__name__}: {' '.join(str(caught).split())[:110]}"
        error = next((found for found in from_all_ranks(error) if found), None)
        table.add(row | {"result": error or "saved"})
        free(device, before)
        if dist.get_rank() == 0:
            shutil.rmtree(Path(args.run_dir, case), ignore_errors=True)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
