"""Day 07, your turn: work with a model whose parameters are cut into parts.

Fill in the four TODOs, then check yourself, on two ranks (any number works):

    deepspeed --num_accelerators 2 day07/exercise.py

It compares your answers with the same model built without zero.Init, and says what is still wrong, or "solved".
The answers are in solution.py. Source: day07/notes.md.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from bench.judge import start_judging
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import print0

ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0}  # 0: parameters as small as these are cut as well
CONFIG = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": ZERO}


def count_parameters(model: torch.nn.Module) -> int:
    """How many parameters the whole model has."""
    # TODO 1: numel() is 0 outside a gather. DeepSpeed keeps the whole size in another attribute of the parameter.
    # 整个模型有多少参数。不在收集中时 numel() 为 0；DeepSpeed 把完整的大小放在参数的另一个属性里。
    raise NotImplementedError


def std_of(weight: torch.nn.Parameter) -> float:
    """The standard deviation of the whole `weight`."""
    # TODO 2: deepspeed.zero.GatheredParameters makes it whole, on all ranks, until the with-block ends.
    # 完整 weight 的标准差。deepspeed.zero.GatheredParameters 让它在所有 rank 上完整，直到 with 块结束。
    raise NotImplementedError


def set_weight(weight: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Set `weight` to `values`, so that each rank keeps its part of them."""
    # TODO 3: copy_ inside a gather, under torch.no_grad(). How does DeepSpeed learn that the weight has changed?
    # 把 weight 设为 values，每个 rank 留下自己的那一部分。在收集中、torch.no_grad() 下 copy_。DeepSpeed 怎样知道权重
    # 变了？
    raise NotImplementedError


def whole_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """On rank 0 what model.state_dict() would be without ZeRO, on the CPU; {} on the other ranks."""
    # TODO 4: model.state_dict(keep_vars=True) has the parameters themselves, to gather one at a time, and the buffers.
    # rank 0 返回没有 ZeRO 时的 model.state_dict()，放在 CPU 上；其他 rank 返回 {}。model.state_dict(keep_vars=True)
    # 给出参数本身（要逐个收集）和 buffer。
    raise NotImplementedError


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.BatchNorm1d(33), torch.nn.Linear(33, 5)).eval()


def check_std(agree: Callable, std_of: Callable, model: torch.nn.Module, reference: torch.nn.Module) -> None:
    got, want = std_of(model[0].weight), reference[0].weight.std().item()
    agree(got is None and "returned no standard deviation: every rank returns it.")
    got = float(got)
    agree(got != got and "has nan as standard deviation: the weight is empty, so read it inside the gather.")
    agree(abs(got - want) > 1e-6 and f"has {got:.4f} as standard deviation, of a part: gather the whole weight.")


def check_set_weight(agree: Callable, set_weight: Callable, model: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Afterwards `reference` has the new weight as well."""
    device = reference[0].weight.device
    torch.manual_seed(1)  # the same on every rank, whatever the answers have drawn
    inputs, values = torch.randn(4, 7, device=device), torch.randn(5, 33, device=device)
    problem = None
    try:
        set_weight(model[2].weight, values)
    except RuntimeError as error:
        if "a leaf Variable that requires grad" not in str(error):
            raise
        problem = "writes into a weight that requires grad: copy_ the values under torch.no_grad()."
    agree(problem)
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    got, old = engine(inputs), reference(inputs)
    reference[2].weight.data = values
    right = torch.allclose(got, reference(inputs), atol=1e-5)
    agree(torch.allclose(got, old) and "computes with the old weight: name a modifier_rank, or changes are lost.")
    agree(not right and "computes with other values than set_weight was given: copy_ all of them in a gather.")


def check_state_dict(agree: Callable, whole_state_dict: Callable, model: torch.nn.Module, want: dict) -> None:
    """`want`: on rank 0 the state of the whole model, {} elsewhere."""
    state = whole_state_dict(model) or {}
    agree(set(state) != set(want) and f"returned {len(state)} tensors, not {len(want)}: rank 0 all, buffers too.")
    wrong = [f"{name} {list(state[name].shape)}" for name in want if state[name].shape != want[name].shape]
    agree(wrong and f"returned {wrong}: a parameter is empty again when the gather ends, so clone inside it.")
    wrong = [name for name in want if not torch.equal(state[name].cpu(), want[name].cpu())]
    agree(wrong and f"returned other values in {wrong}: copy what is gathered.")


def check(count_parameters: Callable, std_of: Callable, set_weight: Callable, whole_state_dict: Callable) -> None:
    """Try the four answers; UserError says which one is not right yet, and why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    device = join_world()
    agree = start_judging()  # UserError on every rank when one has a problem; it ends a check that hangs
    with device:  # a GPU draws other numbers than the CPU
        reference = build()
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = build()
    got, want = count_parameters(model), sum(parameter.numel() for parameter in reference.parameters())
    agree(got == 0 and "counts 0 parameters: all are empty outside a gather, and ds_numel is the whole size.")
    agree(got != want and f"counts {got} parameters: add up ds_numel; ds_tensor is one rank's part, with padding.")
    check_std(agree, std_of, model, reference)
    check_set_weight(agree, set_weight, model, reference)
    check_state_dict(agree, whole_state_dict, model, reference.state_dict() if dist.get_rank() == 0 else {})
    print0(f"solved: counted, read, set and collected the parameters of a model cut into {dist.get_world_size()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(count_parameters, std_of, set_weight, whole_state_dict)
