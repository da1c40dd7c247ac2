"""Day 09, your turn: AutoTP sums five gradients a layer in the backward pass where Megatron sums two. Make it two.

Fill in the three TODOs, then check yourself (on two ranks or more):

    deepspeed --num_accelerators 2 day09/exercise.py

It counts the all-reduces of a Llama under AutoTP before and after your change, compares loss and gradients, and says
what is wrong, or "solved". Targets for L layers: 2L forward, and backward 2L + 1 in place of 5L + 1. The answers are in
solution.py. Source: day09/notes.md; deepspeed/module_inject/layers.py (LinearLayer.forward).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from bench.judge import start_judging
from bench.traffic import count_traffic
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import print0
from day09.models import build_model

LAYERS, SHAPE, VOCAB = 3, (2, 24), 256
MESSAGE = 4 * SHAPE[0] * SHAPE[1] * 128  # bytes of the hidden states (B, T, H) of the tiny Llama


def all_reduces(num_layers: int) -> tuple[int, int]:
    """Return how many all-reduces of hidden states AutoTP makes: (in the forward pass, in the backward pass)."""
    # TODO 1: a g behind each row-parallel matrix, an f in front of each column-parallel one. lm_head is one of those.
    # 返回 AutoTP 对隐藏状态做多少次 all-reduce：（前向，反向）。每个行并行矩阵之后有一个 g，每个列并行矩阵之前有一个
    # f；lm_head 属于后者。
    raise NotImplementedError


def enter(group, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook: return (args, kwargs) with the hidden states passed through one f over `group`.

    `self_attn` is called with hidden_states=..., `mlp` with the hidden states as its first argument.
    """
    # TODO 2: day09.layers has f. Return all other arguments as they are.
    # 这是前向之前的钩子：返回 (args, kwargs)，其中的隐藏状态经过 group 上的一个 f。self_attn 以 hidden_states=... 调
    # 用，mlp 的第一个参数就是隐藏状态。f 在 day09.layers 里；其他参数原样返回。
    raise NotImplementedError


def fuse(model: torch.nn.Module) -> None:
    """Give each attention and each MLP of a Llama under AutoTP one f, in place of those of its matrices."""
    # TODO 3: a LinearLayer with `mp_group` None has no f. `register_forward_pre_hook(..., with_kwargs=True)`.
    # 给 AutoTP 下 Llama 的每个注意力和每个 MLP 一个 f，取代其中各矩阵自己的 f。mp_group 为 None 的 LinearLayer 没有 f。
    # 用 register_forward_pre_hook(..., with_kwargs=True)。
    raise NotImplementedError


def one_pass(engine: deepspeed.DeepSpeedEngine, ids: torch.Tensor) -> tuple[tuple[int, int], float, list[torch.Tensor]]:
    """((all-reduces forward, backward), loss, gradients) of one micro-batch that does not end in a step."""
    engine.module.zero_grad()
    with count_traffic() as forward:
        loss = engine(input_ids=ids, labels=ids).loss
    with count_traffic() as backward:
        engine.backward(loss)
    counts = [traffic.calls.get("all_reduce", {}).get(MESSAGE, 0) for traffic in (forward, backward)]
    return tuple(counts), loss.item(), [p.grad.clone() for p in engine.module.parameters()]


def start_engine(device: torch.device) -> tuple[deepspeed.DeepSpeedEngine, torch.Tensor]:
    """A tiny Llama under AutoTP over all ranks, its inputs compared already, and token ids for it."""
    config = {"train_micro_batch_size_per_gpu": SHAPE[0], "gradient_accumulation_steps": 100}
    config |= {"zero_optimization": {"stage": 0}, "tensor_parallel": {"autotp_size": dist.get_world_size()}}
    config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    torch.manual_seed(0)
    model = build_model("llama", "tiny", VOCAB, num_hidden_layers=LAYERS).to(device)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    ids = torch.randint(VOCAB, SHAPE, device=device)
    with torch.no_grad():
        engine(input_ids=ids)  # the first forward pass also compares the ranks' inputs
    return engine, ids


def problem_after(before: tuple, after: tuple) -> str | None:
    """What is wrong with the fused model, as the end of "rank 0 ..."; None when nothing is."""
    (counts, loss, gradients), ((_, whole_loss, whole_gradients)) = after, before
    want = (2 * LAYERS, 2 * LAYERS + 1)
    if abs(loss - whole_loss) > 1e-5:
        return f"has the loss {loss:.6f} after fuse(), before it {whole_loss:.6f}."
    pairs = zip(gradients, whole_gradients, strict=True)
    apart = max(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in pairs)
    if apart > 1e-4:  # of the largest number in each; rounding is a hundredth of it
        return f"has gradients that fuse() changed, by up to {apart:.0%}: some input gradient is no longer summed."
    if counts != want:
        return f"counts {counts} all-reduces (forward, backward) after fuse(), the target is {want}."
    return None


def check(all_reduces: Callable, enter: Callable, fuse: Callable) -> None:
    """Count before and after; UserError says what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    device = join_world()
    got = all_reduces(LAYERS)
    if dist.get_world_size() < 2:
        raise UserError("not yet: one rank has nobody to sum with. Use --num_accelerators 2")
    agree = start_judging()
    engine, ids = start_engine(device)
    before = one_pass(engine, ids)
    agree(got != before[0] and f"counts {before[0]} all-reduces, all_reduces({LAYERS}) is {got}.")
    hidden = torch.ones(SHAPE[0], 1, 2, device=device, requires_grad=True)
    group = engine.module.model.layers[0].mlp.up_proj.mp_group
    args, kwargs = enter(group, engine.module, (), {"hidden_states": hidden, "other": 1})
    agree((args, kwargs.get("other")) != ((), 1) and "finds other arguments changed by enter().")
    kwargs["hidden_states"].sum().backward()
    ranks = dist.get_world_size()
    agree(hidden.grad.flatten()[0].item() != ranks and f"finds that enter() does not sum {ranks} ranks' gradients.")
    fuse(engine.module)
    after = one_pass(engine, ids)
    agree(problem_after(before, after))
    print0(
        f"solved: {before[0]} all-reduces of hidden states before, {after[0]} after, {LAYERS} layers, equal gradients"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(all_reduces, enter, fuse)
