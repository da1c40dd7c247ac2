"""Day 17: compare ways to save - bytes, how long training stands still, and what DeepSpeed 0.19.8 refuses.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day17/labs/compare.py
    deepspeed --num_accelerators 2 day17/labs/compare.py --model mini --cases zero2 background

Expect a row for each way: stage, bytes of all files, ms that training stood still, ms until the files were whole (the
median of five saves), or the error. All run in one process group on the same model. compare.json has the same.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/checkpoint_engine/, deepspeed/runtime/model_checkpointing/.
"""

import argparse
import copy
import json
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from threading import Thread

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.cpu import start_without_compiler
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path
from day17.checkpoints import from_all_ranks, publish

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


class BackgroundWriter(TorchCheckpointEngine):
    """Copy what is to be saved, and write the copies in a thread while training goes on."""

    threads: list[Thread] = []

    def save(self, state_dict: dict, path: str) -> None:
        copies = {}  # tensors that share memory (tied weights) are copied, and saved, once

        def copied(leaf: object) -> object:
            if not torch.is_tensor(leaf):
                return copy.deepcopy(leaf)  # the loss scaler is an object that training changes
            key = (leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype)
            if key not in copies:
                copies[key] = leaf.detach().to("cpu", copy=True)
            return copies[key]

        state = torch.utils._pytree.tree_map(copied, state_dict)
        self.threads.append(Thread(target=super().save, args=(state, path)))
        self.threads[-1].start()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day17"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="ways to save")
    return parser.parse_args()


def train_step(engine: deepspeed.DeepSpeedEngine) -> None:
    ids = torch.randint(0, 4096, (1, 64), device=engine.device)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def measure(case: str, args: argparse.Namespace) -> dict:
    """Save REPEATS times after a warm-up save; return bytes, and the median of the slowest rank's times."""
    stage, changes, how = CASES[case]
    config = json.loads(Path(args.deepspeed_config).read_text()) | changes
    config["zero_optimization"] |= {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    torch.manual_seed(args.seed)
    model = build_model(args.model, 4096)
    if how.startswith("frozen"):  # fine-tuning: the last block learns, the rest is as it came
        model.requires_grad_(False).transformer.h[-1].requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    if how == "background":
        engine.checkpoint_engine = BackgroundWriter(engine._config)
    root, times = Path(args.run_dir, case), []
    for number in range(1 + REPEATS):
        tag = f"save_{number}"
        train_step(engine)
        dist.barrier()
        start = time.perf_counter()
        if how == "export":
            engine.save_16bit_model(str(root / tag), "pytorch_model.bin")
        else:
            engine.save_checkpoint(str(root), tag=tag, exclude_frozen_parameters=how == "frozen_left_out")
        if how == "publish":
            publish(root / tag, f"published_{number}", step=engine.global_steps)
        stood_s = time.perf_counter() - start
        train_step(engine)  # a decoupled writer makes this wait until its files are whole
        decoupled_s = time.perf_counter() - start
        while BackgroundWriter.threads:
            BackgroundWriter.threads.pop().join()
        whole_s = time.perf_counter() - start if how == "background" else stood_s
        whole_s = decoupled_s if engine.checkpoint_engine.is_decoupled() else whole_s
        times.append([over_ranks(1e3 * seconds, engine.device, "max") for seconds in (stood_s, whole_s)])
        folder = root / (f"published_{number}" if how == "publish" else tag)
        total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        dist.barrier()  # all ranks have counted
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    engine.checkpoint_engine.cleanup()
    engine.destroy()
    stood_ms, whole_ms = map(median, zip(*times[1:], strict=True))  # the first save also pays for what is done once
    return {"bytes": total, "stood_ms": stood_ms, "whole_ms": whole_ms}


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    if unknown := set(args.cases) - set(CASES):
        raise UserError(f"unknown cases {sorted(unknown)}; there are {', '.join(CASES)}")
    os.environ |= {"CROSS_RANK": "0", "CROSS_SIZE": "1"}  # machine and machines: DeepSpeed's writers look here
    deepspeed.init_distributed()
    get_preset(args.model)
    table = []
    for case in args.cases:
        row, error = {"bytes": None, "stood_ms": None, "whole_ms": None}, None
        try:
            row = measure(case, args)
        except Exception as caught:  # what DeepSpeed refuses is part of the comparison
            error = f"{type(caught).__name__}: {' '.join(str(caught).split())[:110]}"
        error = next((found for found in from_all_ranks(error) if found), None)
        table.append({"way": case, "stage": CASES[case][0], **row, "result": error or "saved"})
        if not error:
            numbers = f"{row['bytes']:>12,} B | stood {row['stood_ms']:6.0f} ms | whole after {row['whole_ms']:6.0f} ms"
        print0(f"{case:18} | stage {CASES[case][0]} | {error or numbers}")
        if dist.get_rank() == 0:
            shutil.rmtree(Path(args.run_dir, case), ignore_errors=True)
    if dist.get_rank() == 0:
        num_params = sum(parameter.numel() for parameter in build_model(args.model, 4096).parameters())
        write_results(Path(args.run_dir) / "compare.json", this_command(), num_params=num_params, table=table)
        print0(f"table: {show_path(args.run_dir)}/compare.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
