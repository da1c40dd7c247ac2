"""Day 15, your turn: the arithmetic of a pipeline, and a model as a list of layers.

Fill in the four TODOs, then check yourself (one, two or three ranks; each is a stage):

    deepspeed --num_accelerators 2 day15/exercise.py

It compares your arithmetic with DeepSpeed's schedule and your layers, run as a pipeline, with the model, and says what
is wrong, or "solved". The answers are in solution.py. Source: day15/notes.md.
"""

import argparse
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import print0
from day15.schedule import in_flight, play, read_schedule

TOKENS, HIDDEN, CLASSES, DEPTH = 50, 16, 3, 3
CONFIG = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0}
CONFIG |= {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


class Model(torch.nn.Module):
    """Classifies texts: (B, T) token ids -> (B, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.EmbeddingBag(TOKENS, HIDDEN, mode="mean")
        self.body = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(DEPTH))
        self.head = torch.nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.body:
            x = torch.relu(layer(x))
        return self.head(x)


def bubble(stages: int, micro_batches: int) -> Fraction:
    """Return the share of its time that a stage is idle, as Fraction(a, b)."""
    # TODO 1: how long is a stage busy, how long does the whole step take? Count in units of forward + backward.
    # 以 Fraction(a, b) 返回一个 stage 空闲的时间占比。一个 stage 忙多久，整步要多久？以“前向 + 反向”为单位来数。
    raise NotImplementedError


def kept(stages: int, micro_batches: int, stage: int) -> int:
    """Return how many micro-batches' activations `stage` keeps at most, under 1F1B."""
    # TODO 2: how many does it send forward before the first gradient comes back? There may be fewer than that.
    # 返回 1F1B 下 stage 最多同时保留多少个 micro-batch 的激活。第一个梯度回来之前，它送出了几个前向？micro-batch 也可
    # 能没有那么多。
    raise NotImplementedError


def micro_batches_for(stages: int, limit: Fraction) -> int:
    """Return the smallest number of micro-batches whose bubble is not above `limit`."""
    # TODO 3: turn the formula round, and round up.
    # 返回气泡不超过 limit 的最小 micro-batch 数。把公式反过来，再向上取整。
    raise NotImplementedError


def layers() -> list[LayerSpec]:
    """Return Model as a list of LayerSpecs; what one layer returns, the next one takes."""
    # TODO 4: a LayerSpec takes a class and its arguments, and builds nothing. A relu is a layer as well.
    # 把 Model 写成 LayerSpec 的列表返回；一层返回什么，下一层就接什么。LayerSpec 接受一个类和它的参数，并不构建。relu
    # 也是一层。
    raise NotImplementedError


def check_arithmetic(bubble: Callable, kept: Callable, micro_batches_for: Callable) -> None:
    """Compare the three formulas with DeepSpeed's schedules, played through."""
    for p in (1, 2, 3, 4, 8):
        for m in (1, 2, 4, 8, 32):
            stages = read_schedule("1f1b", p, m)
            idle, got = 1 - 3 * m / Fraction(play(stages, 1, 2)), bubble(p, m)
            if not isinstance(got, Fraction | int):
                raise UserError(f"not yet: TODO 1, bubble({p}, {m}) is {got!r}: return it as Fraction(a, b).")
            if got != idle:
                raise UserError(f"not yet: bubble({p}, {m}) is {got}, in the schedule {idle}.")
            for stage, events in enumerate(stages):
                if (got := kept(p, m, stage)) != (want := in_flight(events)):
                    raise UserError(f"not yet: kept({p}, {m}, {stage}) is {got}, in the schedule {want}.")
        for limit in (Fraction(1, 10), Fraction(1, 3), Fraction(1, 20)):
            want = next(m for m in range(1, 1000) if Fraction(p - 1, m + p - 1) <= limit)
            if (got := micro_batches_for(p, limit)) != want:
                raise UserError(f"not yet: micro_batches_for({p}, {limit}) is {got}, want {want}.")


def specs_of(layers: Callable) -> list[LayerSpec]:
    """Call layers(), and look at what it returns before anything is built."""
    try:
        specs = layers()
    except TypeError as error:  # from LayerSpec itself
        if "issubclass" not in str(error):
            raise
        raise UserError(
            "not yet: TODO 4, a LayerSpec wants a class, torch.nn.ReLU say, no function, no object."
        ) from error
    if not isinstance(specs, list | tuple) or not specs:
        raise UserError(f"not yet: TODO 4, layers() returns {specs!r}, not a list of LayerSpecs.")
    if built := [spec for spec in specs if not isinstance(spec, LayerSpec)]:
        raise UserError(f"not yet: {built[0]} in layers() is not a LayerSpec: a module that is built is on every rank.")
    return list(specs)


def check_pipeline(specs: list[LayerSpec]) -> None:
    """Compare the specs with Model, in one piece and as a pipeline."""
    torch.manual_seed(0)
    model, whole = Model(), torch.nn.Sequential(*[spec.build() for spec in specs])
    want, got = ([tuple(p.shape) for p in m.parameters()] for m in (model, whole))
    if want != got:
        raise UserError(f"not yet: the parameters of layers() are {got}, want {want}.")
    for mine, theirs in zip(whole.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    ids, labels = torch.randint(TOKENS, (8, 6)), torch.randint(CLASSES, (8,))
    x = ids
    for number, layer in enumerate(whole):
        try:
            x = layer(x)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            said = str(error).splitlines()[0]
            raise UserError(
                f"not yet: layer {number}, {layer}, cannot take what the one before gives: {said}"
            ) from error
    if not torch.allclose(x, model(ids), atol=1e-6):
        raise UserError("not yet: layers() has the right parameters and another result: what happens between them?")
    pipeline = PipelineModule(specs, num_stages=dist.get_world_size(), loss_fn=torch.nn.functional.cross_entropy)
    for number, layer in enumerate(pipeline.forward_funcs):
        layer.load_state_dict(whole[pipeline.parts[pipeline.stage_id] + number].state_dict())
    engine, *_ = deepspeed.initialize(model=pipeline, model_parameters=pipeline.parameters(), config=CONFIG)
    loss = engine.train_batch(iter([(ids[:4], labels[:4]), (ids[4:], labels[4:])])).item()
    expected = torch.nn.functional.cross_entropy(model(ids), labels).item()
    if abs(loss - expected) > 1e-5:
        raise UserError(f"not yet: as a pipeline the loss is {loss:.6f}, want {expected:.6f}.")


def check(bubble, kept, micro_batches_for, layers) -> None:
    """Compare with the schedules and with the model; UserError says what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    join_world()
    check_arithmetic(bubble, kept, micro_batches_for)
    check_pipeline(specs_of(layers))
    print0(f"solved: bubble, memory, micro-batches, and {len(layers())} layers on {dist.get_world_size()} stages")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(bubble, kept, micro_batches_for, layers)
