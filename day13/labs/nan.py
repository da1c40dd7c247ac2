"""Day 13: NaN - what each tool says of a nan that is made forwards, and of one that is made backwards, at each stage.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day13/labs/nan.py
    deepspeed --num_accelerators 2 day13/labs/nan.py --stages 0 3

Expect a line for each stage and kind: what the hooks name, how many parameters' full gradients are not finite, whether
the step was skipped, and what is left of the weights; then what the tools cost, in plain steps.
Checked with deepspeed 0.19.8. Source: deepspeed/utils/tensor_fragment.py; torch.autograd.set_detect_anomaly
"""

import argparse
import io
import re
import sys
import warnings
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.debug import debug_extract_module_and_param_names, debug_param2name_id_shape_status

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import ratio, take_turns
from bench.world import join_world
from common.errors import clear_errors
from common.model import build_model, get_preset
from common.ranks import print0
from common.run_log import default_run_dir
from config.read import read_config
from day13.nonfinite import watch_modules

COLUMNS = {"hooks": "hooks", "gradients": "gradients", "skipped": "skipped", "weights": "weights"}
WHERE = "transformer.h.1.mlp.act"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages")
    parser.add_argument("--turns", type=int, default=9, help="steps of each tool that are timed")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day13"), help="folder for nan.json")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    return parser.parse_args()


class Plant:
    """Makes one nan in the output of a module, or in the gradient that flows back through it, on the last rank."""

    def __init__(self, engine, kind: str) -> None:
        self.module = engine.module.get_submodule(WHERE)
        self.forward, self.kind = self.module.forward, kind
        self.module.forward = self.sick if dist.get_rank() == dist.get_world_size() - 1 else self.forward

    def sick(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "forward":
            return self.forward(x) + torch.log(torch.zeros_like(x) - 1)  # log of a negative number
        return self.forward(x) + torch.sqrt((x - x.detach()).square())  # 0, but its derivative is 0 / 0


def make_engine(stage: int, args: argparse.Namespace):
    torch.manual_seed(0)
    model = build_model(args.model, 4096)
    config = read_config(HERE / "ds_config.json") | {"train_micro_batch_size_per_gpu": 2, "csv_monitor": {}}
    config["zero_optimization"] = {"stage": stage, "reduce_bucket_size": 500_000}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def batch_of(engine, args: argparse.Namespace) -> dict:
    ids = torch.randint(4096, (2, get_preset(args.model).block_size), device=engine.device)
    return {"input_ids": ids, "labels": ids}


def look(stage: int, kind: str, args: argparse.Namespace) -> dict:
    """One step with a nan in it: what the hooks say on any rank, and what is not finite afterwards. Collective."""
    engine = make_engine(stage, args)
    Plant(engine, kind)
    with watch_modules(engine.module) as found:
        engine.backward(engine(**batch_of(engine, args)).loss)
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, found[:1])
    rank, first = next((rank, lines[0]) for rank, lines in enumerate(said) if lines)
    gradients = {name: safe_get_full_grad(weight) for name, weight in engine.module.named_parameters()}  # all ranks
    sick = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        bad = sum(not weight.isfinite().all() for weight in engine.module.parameters())
    row = {"hooks": f"rank {rank}: {first}", "gradients": f"{len(sick)} of {len(gradients)} not finite"}
    if stage == 3:  # DeepSpeed's own names: parameter, id, full shape, and whether it is gathered now
        debug_extract_module_and_param_names(engine.module)
        row["status"] = debug_param2name_id_shape_status(engine.module.get_parameter(sick[0]))
    row |= {"skipped": engine.skipped_steps, "weights": f"{bad} of {len(gradients)} nan", "sick": sick}
    engine.destroy()
    return row


def anomaly(args: argparse.Namespace) -> str:
    """What PyTorch's anomaly mode says of the backward nan: the line of the forward pass whose gradient it is."""
    torch.manual_seed(0)
    plain = SimpleNamespace(module=build_model(args.model, 4096), device=torch.device("cpu"))
    Plant(plain, "backward")
    with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            plain.module(**batch_of(plain, args)).loss.backward()
        except RuntimeError as error:
            trace = [line.strip() for w in caught for line in str(w.message).splitlines() if "day13" in line]
            return f"{error} | {re.sub('.*day13', 'day13', trace[-1].replace(chr(34), ''))}"
    return "nothing"  # a healthy rank


def cost(args: argparse.Namespace) -> dict[str, float]:
    """Time of a step under each tool, in plain steps (median over turns). Collective."""
    engine = make_engine(1, args)
    batch = batch_of(engine, args)

    def step(tool) -> None:
        with tool() as _:
            engine.backward(engine(**batch).loss)
        engine.step()

    tools = {"plain": nullcontext, "hooks": lambda: watch_modules(engine.module)}
    tools["anomaly"] = torch.autograd.detect_anomaly
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = take_turns({name: lambda tool=tool: step(tool) for name, tool in tools.items()}, args.turns)
    return {name: 1 / ratio(runs["plain"], runs[name]) for name in tools}


def main() -> None:
    args = parse_args()
    join_world()
    table = Table(Path(args.run_dir) / "nan.json", COLUMNS, width=12)
    for kind in ("forward", "backward"):
        for stage in args.stages:
            with redirect_stdout(io.StringIO()):
                row = look(stage, kind, args)
            table.add({"case": f"{kind} {stage}", "kind": kind, "stage": stage} | row)
    words = [None] * dist.get_world_size()
    dist.all_gather_object(words, anomaly(args))
    print0(f"anomaly mode: {words[-1]}")
    times = cost(args)
    print0("a step takes " + ", ".join(f"{name} {times[name]:.2f}" for name in times))
    table.save(anomaly=words[-1], cost=times)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
