"""Day 07, your turn: work with a model whose parameters are cut into parts.

Fill in the four TODOs, then check yourself, on two ranks (any number works):

    deepspeed --num_accelerators 2 day07/exercise.py

It compares your answers with the same model built without zero.Init, and says what is still wrong, or "solved".
The answers are in solution.py. Source: day07/notes.md.
"""

import argparse
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.cpu import start_without_compiler
from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher

ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0}  # 0: parameters as small as these are cut as well
CONFIG = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": ZERO}


def count_parameters(model: torch.nn.Module) -> int:
    """How many parameters the whole model has."""
    # TODO 1: numel() is 0 outside a gather. DeepSpeed keeps the whole size in another attribute of the parameter.
    raise NotImplementedError


def std_of(weight: torch.nn.Parameter) -> float:
    """The standard deviation of the whole `weight`."""
    # TODO 2: deepspeed.zero.GatheredParameters makes it whole, on all ranks, until the with-block ends.
    raise NotImplementedError


def set_weight(weight: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Set `weight` to `values`, so that each rank keeps its part of them."""
    # TODO 3: copy_ inside a gather, under torch.no_grad(). How does DeepSpeed learn that the weight has changed?
    raise NotImplementedError


def whole_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """On rank 0 what model.state_dict() would be without ZeRO, on the CPU; {} on the other ranks."""
    # TODO 4: model.state_dict(keep_vars=True) has the parameters themselves, to gather one at a time, and the buffers.
    raise NotImplementedError


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.BatchNorm1d(33), torch.nn.Linear(33, 5)).eval()


def give_up() -> None:
    if dist.get_rank() == 0:
        sys.stderr.write("error: not yet: no end after 60 s. Gathers need all ranks: is one inside `if rank == 0`?\n")
    os._exit(1)  # the thread that waits cannot be interrupted


def check(count_parameters: Callable, std_of: Callable, set_weight: Callable, whole_state_dict: Callable) -> None:
    """Try the four answers; UserError says which one is not right yet, and why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    with torch.device(get_accelerator().current_device_name()):  # a GPU draws other numbers than the CPU
        reference, inputs, values = build(), torch.randn(4, 7), torch.randn(5, 33)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = build()
    judges = dist.new_group(backend="gloo")  # not the group of the gathers: one that a rank misses must not meet these

    def agree(problem: str | bool | None) -> None:  # on all ranks: one that stops alone would leave the others waiting
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=judges)
        if wrong := [f"rank {rank} {sentence}" for rank, sentence in enumerate(problems) if sentence]:
            raise UserError(f"not yet: {wrong[0]}")

    alarm = threading.Timer(60, give_up)
    alarm.daemon = True  # ends with the script
    alarm.start()
    try:
        got, want = count_parameters(model), sum(parameter.numel() for parameter in reference.parameters())
        agree(got == 0 and "counts 0 parameters: all are empty outside a gather, and ds_numel is the whole size.")
        agree(got != want and f"counts {got} parameters: add up ds_numel; ds_tensor is one rank's part, with padding.")
        got, want = float(std_of(model[0].weight)), reference[0].weight.std().item()
        agree(got != got and "has nan as standard deviation: the weight is empty, so read it inside the gather.")
        agree(abs(got - want) > 1e-6 and f"has {got:.4f} as standard deviation, of a part: gather the whole weight.")
        set_weight(model[2].weight, values)
        engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
        got, old = engine(inputs), reference(inputs)
        reference[2].weight.data = values
        right = torch.allclose(got, reference(inputs), atol=1e-5)
        agree(torch.allclose(got, old) and "computes with the old weight: name a modifier_rank, or changes are lost.")
        agree(not right and "computes with other values than set_weight was given: copy_ all of them in a gather.")
        state, want = whole_state_dict(model) or {}, reference.state_dict() if dist.get_rank() == 0 else {}
        agree(set(state) != set(want) and f"returned {len(state)} tensors, not {len(want)}: rank 0 all, buffers too.")
        wrong = [f"{name} {list(state[name].shape)}" for name in want if state[name].shape != want[name].shape]
        agree(wrong and f"returned {wrong}: a parameter is empty again when the gather ends, so clone inside it.")
        wrong = [name for name in want if not torch.equal(state[name].cpu(), want[name].cpu())]
        agree(wrong and f"returned other values in {wrong}: copy what is gathered.")
    except NotImplementedError:
        raise UserError("not yet: a TODO still raises NotImplementedError. Fill it in and run this again.") from None
    print0(f"solved: counted, read, set and collected the parameters of a model cut into {dist.get_world_size()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(count_parameters, std_of, set_weight, whole_state_dict)
