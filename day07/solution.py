"""Day 07, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day07/solution.py. Source: notes.md."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day07.exercise import check, clear_errors


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.ds_numel for parameter in model.parameters())


def std_of(weight: torch.nn.Parameter) -> float:
    with deepspeed.zero.GatheredParameters([weight]):
        return weight.std().item()


def set_weight(weight: torch.nn.Parameter, values: torch.Tensor) -> None:
    with torch.no_grad(), deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        if dist.get_rank() == 0:  # its values go to all ranks when the gather ends
            weight.copy_(values)


def whole_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # on every rank, as gathering is collective; it does nothing for a buffer
        with deepspeed.zero.GatheredParameters([tensor]):
            if dist.get_rank() == 0:
                state[name] = tensor.detach().cpu().clone()
    return state


if __name__ == "__main__":
    with clear_errors():
        check(count_parameters, std_of, set_weight, whole_state_dict)
