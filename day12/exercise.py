"""Day 12, your turn: count a model's FLOPs from its shapes, turn a log into MFU, and split parameters into groups.

Fill in the three TODOs, then check yourself, on two ranks (any number works):

    deepspeed --num_accelerators 2 day12/exercise.py

It counts the operations of a real forward and backward pass and compares, and says what is wrong, or "solved".
The answers are in solution.py. Source: day12/notes.md; PaLM, arXiv:2204.02311, appendix B.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from common.model import PRESETS, Preset
from common.ranks import print0, require_launcher
from day12.gpt import build_gpt

# A run on two devices of 1e12 FLOP/s each: rows of metrics.jsonl, as day12/train.py writes them. Tokens/s: all ranks.
LOG = [
    {"num_params": 934528, "flops_per_token": 6000000, "peak_flops": 1e12, "ranks": 2},
    {"step": 0, "held_out_loss": 8.34},
    {"step": 1, "loss": 8.34, "tokens_per_s": 1000.0},
    {"step": 10, "loss": 7.52, "tokens_per_s": 140000.0},
    {"step": 10, "held_out_loss": 7.41},
    {"step": 20, "loss": 6.81, "tokens_per_s": 150000.0},
    {"step": 30, "loss": 6.55, "tokens_per_s": 60000.0},
]


def flops_per_token(preset: Preset, padded_vocabulary: int) -> int:
    """Operations a token of one training step (forward and backward) on sequences of preset.block_size tokens."""
    # TODO 1: 6 for each weight that multiplies a token's vector: in a layer 3 H^2 (queries, keys, values), H^2, 4 H^2
    # and 4 H^2; the embedding once, as the last layer (looking up a row multiplies nothing). Attention: 12 H T a layer.
    # 训练一步（前向和反向）中每个 token 的运算数，序列长 preset.block_size。每个与 token 的向量相乘的权重算 6：一层里
    # 是 3 H^2（query、key、value）、H^2、4 H^2 和 4 H^2；嵌入算一次，作为最后一层（取出一行并不做乘法）。注意力：每层
    # 12 H T。
    raise NotImplementedError


def mfu(rows: list[dict]) -> float:
    """Model FLOP utilisation of a run: the median over its training lines, without the first."""
    # TODO 2: FLOP/s that the model needed over FLOP/s that all devices could do. Held-out rows have no tokens_per_s.
    # 一次训练的 MFU：各训练行的中位数，不含第一行。即模型所需的 FLOP/s 除以所有设备能达到的 FLOP/s。留出集的行没有
    # tokens_per_s。
    raise NotImplementedError


def parameter_groups(model: torch.nn.Module) -> list[dict]:
    """AdamW's groups: matrices first, with weight decay 0.1; then the LayerNorms' vectors, with none."""
    # TODO 3: a list of two {"params": [...], "weight_decay": ...}; each parameter in one of them.
    # AdamW 的参数组：先是矩阵，权重衰减 0.1；再是 LayerNorm 的向量，不衰减。返回两个 {"params": [...],
    # "weight_decay": ...} 的列表，每个参数只在其中一个里。
    raise NotImplementedError


def counted_flops(name: str, vocab_size: int) -> float:
    """Operations a token of a forward and a backward pass, counted by PyTorch operation by operation."""
    model = build_gpt(name, vocab_size)
    ids = torch.zeros(1, model.preset.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # as products of whole matrices
        model(ids, labels=ids).loss.backward()
    return counter.get_total_flops() / ids.numel()


def check_flops(flops_per_token: Callable) -> None:
    for name in ("tiny", "mini"):
        got, want = flops_per_token(PRESETS[name], 4096), counted_flops(name, 4096)
        if not isinstance(got, int | float):
            raise UserError(f"not yet: TODO 1, flops_per_token({name}) is {got!r}, not a number.")
        if abs(got / want - 1) > 1e-3:
            hint = {1 / 3: "the backward pass costs twice the forward", 2: "a product is counted once"}
            factor = next((text for ratio, text in hint.items() if abs(got / want / ratio - 1) < 1e-3), "")
            factor = factor or "count 12 H^2 a layer, V H once, 12 H T for attention; T is preset.block_size"
            raise UserError(f"not yet: flops_per_token({name}) is {got:,.0f}, PyTorch counts {want:,.0f}: {factor}.")


def check_mfu(mfu: Callable) -> None:
    got, want = mfu(LOG), 0.42
    if not isinstance(got, int | float):
        raise UserError(f"not yet: TODO 2, mfu of the log is {got!r}, not a number.")
    if abs(got - want) > 1e-9:
        wrong = {0.84: "the peak is that of one device", 0.3: "the first line pays for starting up"}
        wrong[0.35] = "the median, not the mean"
        hint = next((text for value, text in wrong.items() if abs(got - value) < 1e-9), "")
        hint = hint or "the median of tokens_per_s x flops_per_token / (peak_flops x ranks)"
        raise UserError(f"not yet: mfu of the log is {got:.4f}, want {want}: {hint}.")


def check_groups(parameter_groups: Callable) -> None:
    model = build_gpt("tiny", 4096)
    groups, names = parameter_groups(model), {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups or [None]:
        if not isinstance(group, dict) or not {"params", "weight_decay"} <= set(group):
            keys = list(group) if isinstance(group, dict) else repr(group)
            raise UserError(f'not yet: TODO 3, a group has the keys "params" and "weight_decay", not {keys}.')
        group["params"] = list(group["params"])  # a generator can be read once
        if strange := [thing for thing in group["params"] if id(thing) not in names]:
            raise UserError(f"not yet: TODO 3, a {type(strange[0]).__name__} in a group is no parameter of the model.")
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    if sum(len(group["params"]) for group in groups) != len(names) or len(decay) != len(names):
        raise UserError(f"not yet: the groups have {len(decay)} of {len(names)} parameters, each once is right.")
    for name, parameter in model.named_parameters():
        want = 0.1 if parameter.dim() > 1 else 0.0
        if decay[name] != want:
            raise UserError(f"not yet: {name} {tuple(parameter.shape)} decays with {decay[name]}, want {want}.")


def check(flops_per_token: Callable, mfu: Callable, parameter_groups: Callable) -> None:
    """Try the three answers; UserError says which one is not right yet, and why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    check_flops(flops_per_token)
    check_mfu(mfu)
    check_groups(parameter_groups)
    billions = flops_per_token(PRESETS["gpt2"], 50304) / 1e9
    print0(
        f"solved: GPT-2 124M takes {billions:.3f} GFLOP a token; 45 % of an H100 is {445.05e3 / billions:,.0f} tok/s"
    )


if __name__ == "__main__":
    with clear_errors():
        check(flops_per_token, mfu, parameter_groups)
