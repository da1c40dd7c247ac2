"""Day 15: bubble - the real engine with layers that sleep: is a step as long, and a stage as full, as schedule.py says?

From the repository root; each rank is a stage:

    deepspeed --num_accelerators 4 day15/labs/bubble.py
    deepspeed --num_accelerators 2 day15/labs/bubble.py --micro_batches 1 4 16

Expect a row for each schedule and number of micro-batches: measured time and bubble beside the computed ones, the
micro-batches that each stage kept, and the bytes that the first stage sent. Then bubble.json.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/pipe/engine.py; arXiv:2104.04473, section 2.2.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import time_step
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import print0
from common.run_log import default_run_dir
from config.read import read_config
from day15.schedule import SCHEDULES, play, read_schedule

SHAPE = (2, 64, 128)  # a micro-batch between two stages: sequences, tokens, hidden


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--micro_batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="to go through")
    parser.add_argument("--forward", type=float, default=0.02, help="seconds of a forward pass through one stage")
    parser.add_argument("--backward", type=float, default=0.04, help="seconds of a backward pass through one stage")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (not micro-batches)")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day15"), help="folder for bubble.json")
    return parser.parse_args()


class Sleep(torch.autograd.Function):
    """Hands its input on and sleeps, on the way forward and on the way back: work of a known length, without a core."""

    @staticmethod
    def forward(context, x: torch.Tensor, layer: "SleepingLayer") -> torch.Tensor:
        context.layer = layer
        layer.kept += 1
        layer.most_kept = max(layer.most_kept, layer.kept)
        sleep(layer.forward_s)
        return x.clone()

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        context.layer.kept -= 1
        sleep(context.layer.backward_s)
        return gradient, None


def sleep(seconds: float) -> None:
    get_accelerator().synchronize()  # on a GPU the host runs ahead: first let the message arrive that this work needs
    time.sleep(seconds)


class SleepingLayer(torch.nn.Linear):
    """A stage: a small matrix, so that there is something to train, and sleep."""

    def __init__(self, width: int, forward_s: float, backward_s: float) -> None:
        super().__init__(width, width)
        self.forward_s, self.backward_s = forward_s, backward_s
        self.kept = self.most_kept = 0  # micro-batches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sleep.apply(super().forward(x), self)


def keep_every_loss(engine: deepspeed.PipelineEngine) -> None:
    """Let the last stage hold more than one loss: DeepSpeed's has one place for it, enough for 1F1B, not for GPipe."""
    losses, forward, backward = {}, engine._exec_forward_pass, engine._exec_backward_pass

    def forward_pass(engine: deepspeed.PipelineEngine, buffer_id: int) -> None:
        forward(buffer_id)
        losses[buffer_id] = engine.loss

    def backward_pass(engine: deepspeed.PipelineEngine, buffer_id: int) -> None:
        engine.loss = losses.pop(buffer_id)
        backward(buffer_id)

    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {ForwardPass: forward_pass, BackwardPass: backward_pass}


def count_sent(sent: list[int]) -> None:
    """Let `sent` have the bytes of each message of this rank to another stage (they go past DeepSpeed's own log)."""
    send = p2p.send

    def counting_send(tensor: torch.Tensor, stage: int) -> None:
        sent.append(tensor.numel() * tensor.element_size())
        send(tensor, stage)

    p2p.send = counting_send


COLUMNS = {
    "seconds": "seconds:.3f", "computed": "computed_s:.3f", "bubble": "bubble:.3f", "formula": "formula:.3f",
    "kept, by stage": "kept:", "bytes sent": "sent_bytes:,",
}  # fmt: skip


def main() -> None:
    args = parse_args()
    if min(args.steps, *args.micro_batches) < 1:
        raise UserError(f"--steps {args.steps} --micro_batches {min(args.micro_batches)}: both start at 1")
    config = read_config(args.deepspeed_config) | {"train_micro_batch_size_per_gpu": SHAPE[0]}
    join_world()
    stages = dist.get_world_size()
    layers = [LayerSpec(SleepingLayer, SHAPE[-1], args.forward, args.backward) for _ in range(stages)]
    model = PipelineModule(layers, num_stages=stages, loss_fn=torch.nn.functional.mse_loss)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    keep_every_loss(engine)
    (layer,) = model.forward_funcs
    print0(f"{stages} stages | forward {args.forward} s, backward {args.backward} s | {engine.device.type}")
    batch = torch.ones(SHAPE), torch.zeros(SHAPE)
    sent: list[int] = []
    count_sent(sent)
    table = Table(Path(args.run_dir) / "bubble.json", COLUMNS, stages=stages)
    for name in ("1f1b", "gpipe"):
        engine._train_schedule = lambda name=name: SCHEDULES[name](engine.micro_batches, stages, engine.stage_id)
        for micro_batches in args.micro_batches:
            engine.set_train_batch_size(SHAPE[0] * micro_batches)
            seconds = []
            for _ in range(args.steps + 1):
                layer.most_kept = 0
                sent.clear()
                dist.barrier()
                seconds.append(time_step(lambda: engine.train_batch(iter([batch] * engine.micro_batches)))[0])
            kept = [None] * stages
            dist.all_gather_object(kept, layer.most_kept)
            computed = play(read_schedule(name, stages, micro_batches), args.forward, args.backward)
            measured = median(seconds[1:])
            work = micro_batches * (args.forward + args.backward)
            row = {"case": f"{name}, m {micro_batches}", "schedule": name, "micro_batches": micro_batches}
            row |= {"seconds": measured, "computed_s": computed}
            row |= {"bubble": 1 - work / measured, "formula": (stages - 1) / (micro_batches + stages - 1)}
            row |= {"kept": " ".join(map(str, kept)), "sent_bytes": sum(sent)}
            table.add(row)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
