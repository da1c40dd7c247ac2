"""Day 16, your turn: tie an embedding across stages, find the best cut, and compute what a bad one costs.

Fill in the three TODOs, then check yourself (one, two or three ranks; each is a stage):

    deepspeed --num_accelerators 2 day16/exercise.py

It compares your cut with every possible one and your layers, trained as a pipeline, with the model, and says what is
wrong, or "solved". The answers are in solution.py. Source: day16/notes.md.
"""

import argparse
import sys
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import print0

TOKENS, HIDDEN = 30, 8
CONFIG = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0}
CONFIG |= {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}}


class Model(torch.nn.Module):
    """Guesses a token from a token; the output layer is the embedding once more."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = torch.nn.Embedding(TOKENS, HIDDEN), torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self.embed(ids)) @ self.embed.weight.T


def layers() -> list[LayerSpec]:
    """Return Model as three LayerSpecs: embedding, body, head. First and last hold the same weight."""
    # TODO 1: TiedLayerSpec(key, class, *arguments, forward_fn=...): forward_fn(layer, x) is called in place of layer(x)
    # 把 Model 写成三个 LayerSpec 返回：嵌入、主体、输出头；首尾用同一个权重。TiedLayerSpec(key, 类, *参数,
    # forward_fn=...)：会调用 forward_fn(layer, x) 来代替 layer(x)。
    raise NotImplementedError


def best_parts(costs: list[float], stages: int) -> list[int]:
    """Return the cuts [0, ..., len(costs)] for which the slowest stage (the largest sum of costs) is fastest."""
    # TODO 2: stage s has the layers parts[s] to parts[s + 1] - 1, at least one. Trying all cuts is allowed.
    # 返回切点 [0, ..., len(costs)]，使最慢的 stage（costs 之和最大）尽量快。stage s 含层 parts[s] 到 parts[s + 1] - 1，
    # 至少一层。可以把所有切法都试一遍。
    raise NotImplementedError


def waiting(stage_seconds: list[int], micro_batches: int) -> Fraction:
    """Return the part of the time in which the ranks wait, averaged over them, when stages take so many seconds each.

    Seconds of one micro-batch, forward and backward together; a stage takes the micro-batches one after the other.
    """
    # TODO 3: the first micro-batch goes through all stages; each later one leaves the slowest stage behind it.
    # 返回各 rank 平均的等待时间占比；stage_seconds 是各 stage 处理一个 micro-batch（前向加反向）的秒数，一个 stage 依
    # 次处理各个 micro-batch。第一个 micro-batch 走过所有 stage；之后每一个都比前一个晚最慢 stage 的时间。
    raise NotImplementedError


def check_cuts(best_parts) -> None:
    for costs, stages in (([1, 4, 2, 1, 1], 3), ([0, 0, 6, 7, 0, 15], 2), ([3, 5, 2, 3, 4, 1, 2, 2, 1, 1], 4)):
        ways = [[0, *cut, len(costs)] for cut in combinations(range(1, len(costs)), stages - 1)]
        slowest = {tuple(way): max(sum(costs[a:b]) for a, b in zip(way, way[1:], strict=False)) for way in ways}
        if tuple(parts := best_parts(costs, stages) or ()) not in slowest:
            raise UserError(f"not yet: best_parts({costs}, {stages}) is {parts}, not the cuts of {stages} stages.")
        if (got := slowest[tuple(parts)]) != (want := min(slowest.values())):
            raise UserError(f"not yet: {parts} cuts {costs} so that the slowest stage takes {got}; {want} is possible.")


def check_waiting(waiting) -> None:
    for seconds, count in (([1, 1], 1), ([1, 1], 9), ([2, 4, 4], 5), ([9, 23], 8), ([15, 15], 8)):
        ends = [0] * len(seconds)  # when each stage is done with the micro-batch before
        for _ in range(count):
            before = 0
            for stage, long in enumerate(seconds):
                ends[stage] = before = max(before, ends[stage]) + long
        want = 1 - Fraction(count * sum(seconds), len(seconds) * ends[-1])
        got = waiting(seconds, count)
        if not isinstance(got, Fraction | int):
            raise UserError(f"not yet: TODO 3, waiting({seconds}, {count}) is {got!r}: return it as a Fraction.")
        if got != want:
            raise UserError(f"not yet: waiting({seconds}, {count}) is {got}, played through {want}.")


def check_layers(specs: list[LayerSpec]) -> None:
    """Train the specs as a pipeline and Model in one piece; compare the losses and the two copies."""
    kinds = [type(spec) for spec in specs or []]
    if kinds != [TiedLayerSpec, LayerSpec, TiedLayerSpec] or specs[0].key != specs[2].key:
        raise UserError(
            "not yet: layers() should be a TiedLayerSpec, a LayerSpec, and a TiedLayerSpec of the same key."
        )
    torch.manual_seed(0)
    model, data = Model(), torch.randint(TOKENS, (2, 8, 6))
    x = data[0]
    for number, spec in enumerate(specs, start=1):
        layer, forward_fn = spec.build(), getattr(spec, "forward_fn", None)
        try:
            x = forward_fn(layer, x) if forward_fn else layer(x)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            how = "forward_fn(layer, x)" if forward_fn else "called as layer(x), for it has no forward_fn,"
            raise UserError(f"not yet: TODO 1, layer {number}, {how} raises {str(error).splitlines()[0]}") from error
    loss_fn = lambda logits, labels: torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())  # noqa: E731
    pipeline = PipelineModule(specs, num_stages=dist.get_world_size(), loss_fn=loss_fn, partition_method="uniform")
    weights = [model.embed, model.body, model.embed]
    for number, layer in enumerate(pipeline.forward_funcs, start=pipeline.parts[pipeline.stage_id]):
        getattr(layer, "args", [layer])[0].load_state_dict(weights[number].state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=pipeline, model_parameters=pipeline.parameters(), config=CONFIG)
    for step, ids in enumerate(data, start=1):
        want = loss_fn(model(ids), ids)
        want.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = engine.train_batch(iter([(part, part) for part in ids.chunk(2)])).item()
        if abs(loss - want.item()) > 1e-5:
            raise UserError(
                f"not yet: the loss of step {step} is {loss:.6f} as a pipeline, {want.item():.6f} in one piece."
            )


def check(layers, best_parts, waiting) -> None:
    """Compare with every cut, with a pipeline played through, and with the model; UserError says what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    join_world()
    check_cuts(best_parts)
    check_waiting(waiting)
    check_layers(layers())
    print0(f"solved: the best cuts, what others cost, and a tied embedding on {dist.get_world_size()} stages")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(layers, best_parts, waiting)
