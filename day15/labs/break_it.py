"""Day 15: break it - what DeepSpeed says to each mistake with a pipeline, word by word.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day15/labs/break_it.py
    deepspeed --num_accelerators 2 day15/labs/break_it.py --mistakes zero_2 forward

Expect one line for each mistake: the exception, or what happened without one. The cures are in the notes.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/pipe/engine.py, deepspeed/runtime/pipe/module.py.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from itertools import repeat
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import print0, require_launcher
from common.run_log import default_run_dir
from config.read import read_config

LINEAR = (LayerSpec(torch.nn.Linear, 4, 4), LayerSpec(torch.nn.ReLU), LayerSpec(torch.nn.Linear, 4, 4))
BATCH = (torch.ones(2, 4), torch.zeros(2, 4))  # (inputs, labels) of one micro-batch


def module(layers=LINEAR, num_stages=2, **options) -> PipelineModule:
    return PipelineModule(layers, num_stages=num_stages, loss_fn=torch.nn.functional.mse_loss, **options)


def engine(num_stages: int = 2, layers=LINEAR, **changes) -> deepspeed.PipelineEngine:
    """An engine of the shipped config with `changes`; None takes a key out."""
    config = read_config(HERE / "ds_config.json") | changes
    config = {key: value for key, value in config.items() if value is not None}
    model = module(layers, num_stages)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


class Dictionary(torch.nn.Linear):
    """Gives back a dictionary, as models of `transformers` do."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": super().forward(x)}


def without_gradients() -> None:
    with torch.no_grad():
        engine().train_batch(repeat(BATCH))


def no_optimizer() -> None:
    changes = {"optimizer": None, "scheduler": None, "zero_optimization": {"stage": 0}}
    engine(num_stages=1, **changes).train_batch(repeat(BATCH))


# name -> what a reader might write. Both ranks fail at the same place. (With two stages a rank that runs out of
# batches leaves the other waiting; with one stage, two pipelines of a rank each, the message is the same.)
MISTAKES = {
    "zero_2": lambda: engine(zero_optimization={"stage": 2}),
    "zero_3": lambda: engine(zero_optimization={"stage": 3}),
    "forward": lambda: engine()(BATCH[0]),
    "backward": lambda: engine().backward(torch.ones(1)),
    "step": lambda: engine().step(),
    "no_grad": without_gradients,
    "too_few_batches": lambda: engine(num_stages=1).train_batch(iter([BATCH] * 7)),
    "dictionary_batch": lambda: engine(num_stages=1).train_batch(repeat({"input_ids": BATCH[0], "labels": BATCH[1]})),
    "list_of_batches": lambda: engine(num_stages=1).train_batch([BATCH] * 8),
    "stages_not_dividing": lambda: module(num_stages=3),
    "no_stages": lambda: module(num_stages=None),
    "function_as_spec": lambda: LayerSpec(torch.nn.functional.relu),
    "object_as_spec": lambda: LayerSpec(torch.nn.ReLU()),
    "default_seed_fn": lambda: module(seed_layers=True),
    "not_managed": lambda: engine(managed_gradient_accumulation=False),
    "no_optimizer": no_optimizer,
}
# One rank fails, the other waits for it: each of these needs a launch of its own.
ALONE = {
    "more_stages_than_layers": lambda: engine(layers=LINEAR[:1]),
    "dictionary_layer": lambda: engine(layers=(LayerSpec(Dictionary, 4, 4), LINEAR[0])).train_batch(repeat(BATCH)),
    "shape_changes": lambda: engine().train_batch(iter([BATCH, (torch.ones(3, 4), torch.zeros(3, 4))] * 4)),
    "half_the_stages": lambda: engine().train_batch(iter([BATCH] * 7)),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mistakes", nargs="+", choices=MISTAKES | ALONE, default=list(MISTAKES), help="which to make")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day15"), help="folder for break_it.json")
    return parser.parse_args()


def attempt(mistake: Callable) -> str:
    """Make it, and return what DeepSpeed said. (PipelineModule prints its layers each time: not here.)"""
    try:
        with redirect_stdout(StringIO()):
            mistake()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return "nothing was said"


def main() -> None:
    args = parse_args()
    require_launcher()
    said = {"before_init_distributed": attempt(module)}
    print0(f"before_init_distributed: {said['before_init_distributed']}")
    join_world()
    rank = torch.distributed.get_rank()
    for name in args.mistakes:
        said[name] = attempt((MISTAKES | ALONE)[name])
        if name in ALONE:
            sys.stdout.write(f"{name}, rank {rank}: {said[name]}\n")
        else:
            print0(f"{name}: {said[name]}")
    if rank == 0:
        write_results(Path(args.run_dir) / "break_it.json", this_command(), said=said)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
