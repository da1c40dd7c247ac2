"""Day 15, your turn: the arithmetic of a pipeline, and a model as a list of layers.

Fill in the four TODOs, then check yourself (one, two or three ranks; each is a stage):

    deepspeed --num_accelerators 2 day15/exercise.py

It compares your arithmetic with DeepSpeed's schedule and your layers, run as a pipeline, with the model, and says what
is wrong, or "solved". The answers are in solution.py. Source: day15/notes.md.
"""

import argparse
import os
import sys
from fractions import Fraction
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.cpu import start_without_compiler
from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher
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
    raise NotImplementedError


def kept(stages: int, micro_batches: int, stage: int) -> int:
    """Return how many micro-batches' activations `stage` keeps at most, under 1F1B."""
    # TODO 2: how many does it send forward before the first gradient comes back? There may be fewer than that.
    raise NotImplementedError


def micro_batches_for(stages: int, limit: Fraction) -> int:
    """Return the smallest number of micro-batches whose bubble is not above `limit`."""
    # TODO 3: turn the formula round, and round up.
    raise NotImplementedError


def layers() -> list[LayerSpec]:
    """Return Model as a list of LayerSpecs; what one layer returns, the next one takes."""
    # TODO 4: a LayerSpec takes a class and its arguments, and builds nothing. A relu is a layer as well.
    raise NotImplementedError


def check_pipeline(specs: list[LayerSpec]) -> None:
    """Compare the specs with Model, in one piece and as a pipeline."""
    if built := [spec for spec in specs if not isinstance(spec, LayerSpec)]:
        raise UserError(f"not yet: {built[0]} in layers() is not a LayerSpec: a module that is built is on every rank.")
    torch.manual_seed(0)
    model, whole = Model(), torch.nn.Sequential(*[spec.build() for spec in specs])
    want, got = ([tuple(p.shape) for p in m.parameters()] for m in (model, whole))
    if want != got:
        raise UserError(f"not yet: the parameters of layers() are {got}, want {want}.")
    for mine, theirs in zip(whole.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    ids, labels = torch.randint(TOKENS, (8, 6)), torch.randint(CLASSES, (8,))
    if not torch.allclose(whole(ids), model(ids), atol=1e-6):
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
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    try:
        for p in (1, 2, 3, 4, 8):
            for m in (1, 2, 4, 8, 32):
                stages = read_schedule("1f1b", p, m)
                idle = 1 - 3 * m / Fraction(play(stages, 1, 2))
                if (got := bubble(p, m)) != idle:
                    raise UserError(f"not yet: bubble({p}, {m}) is {got}, in the schedule {idle}.")
                for stage, events in enumerate(stages):
                    if (got := kept(p, m, stage)) != (want := in_flight(events)):
                        raise UserError(f"not yet: kept({p}, {m}, {stage}) is {got}, in the schedule {want}.")
            for limit in (Fraction(1, 10), Fraction(1, 3), Fraction(1, 20)):
                want = next(m for m in range(1, 1000) if Fraction(p - 1, m + p - 1) <= limit)
                if (got := micro_batches_for(p, limit)) != want:
                    raise UserError(f"not yet: micro_batches_for({p}, {limit}) is {got}, want {want}.")
        check_pipeline(layers())
    except NotImplementedError:
        raise UserError("not yet: a TODO still raises NotImplementedError. Fill it in and run this again.") from None
    print0(f"solved: bubble, memory, micro-batches, and {len(layers())} layers on {dist.get_world_size()} stages")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(bubble, kept, micro_batches_for, layers)
