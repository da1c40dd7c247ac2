"""Day 16: stage_times - how long the layers and the stages of a pipeline take, alone and within a step.

    from day16.stage_times import StageClock, profile_layers

What day16/stage_times.py measures, train.py cuts by (`--partition_method balanced`) and prints, and the labs tabulate.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/pipe/engine.py (`_INSTRUCTION_MAP`), arXiv:2104.04473.
"""

import time
from collections.abc import Iterable
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from bench.timing import time_step
from common.errors import UserError
from config.read import read_config
from day16.gpt2_pipe import layer_specs, next_token_loss


def time_layers(
    config: GPT2Config, layers: range, micro_batch: int, dtype: torch.dtype, repeats: int = 7, in_a_row: int = 1
) -> float:
    """Seconds of one micro-batch forward and backward through these layers, one after the other; with the loss if the
    head is among them. Median of `repeats`, after two that warm up.

    `in_a_row` passes are timed together: a GPU is still busy with one while the host starts the next, as in a stage.
    """
    specs = layer_specs(config)
    device = torch.device(get_accelerator().current_device_name())
    labels = torch.randint(config.vocab_size, (micro_batch, config.n_positions), device=device)
    hidden = torch.randn(*labels.shape, config.n_embd, device=device, dtype=dtype)
    ones = torch.ones_like(hidden)
    functions = []
    for spec in (specs[index] for index in layers):
        with device:  # weights are drawn there, which takes a GPU seconds and a CPU minutes
            layer, forward_fn = spec.build().to(dtype), getattr(spec, "forward_fn", None)
        functions.append(partial(forward_fn, layer) if forward_fn else layer)

    def passes() -> None:
        for _ in range(in_a_row):
            x = hidden.detach().requires_grad_() if layers.start else labels
            for function in functions:
                x = function(x)
            if layers.stop == len(specs):
                next_token_loss(x, labels).backward()
            else:
                x.backward(ones)

    seconds = [time_step(passes)[0] / in_a_row for _ in range(repeats + 2)]
    return median(seconds[2:])


def profile_layers(
    config: GPT2Config, micro_batch: int, dtype: torch.dtype = torch.float32, repeats: int = 7
) -> list[float]:
    """Seconds of one micro-batch forward and backward through each layer, the head with its loss.

    With a process group it is collective: all ranks measure at once, as they will train at once, and the mean counts,
    for every rank must come to the same cut. The blocks are alike: each counts as their median, or noise would choose
    where to cut.
    """
    specs = layer_specs(config)
    costs = [time_layers(config, range(n, n + 1), micro_batch, dtype, repeats, in_a_row=4) for n in range(len(specs))]
    if dist.is_initialized():
        total = torch.tensor(costs, device=get_accelerator().current_device_name())
        dist.all_reduce(total)
        costs = (total / dist.get_world_size()).tolist()
    blocks = [index for index, spec in enumerate(specs) if spec.typename is GPT2Block]
    typical = median(costs[index] for index in blocks)
    return [typical if index in blocks else seconds for index, seconds in enumerate(costs)]


def shortest_step(stage_s: list[float], micro_batches: int) -> float:
    """Seconds of a step whose stages take `stage_s` a micro-batch: fill and drain once, then the slowest sets the pace.

    Messages and the optimizer are not in it.
    """
    return sum(stage_s) + (micro_batches - 1) * max(stage_s)


def in_ms(seconds: Iterable[float]) -> str:
    """The times of the stages, in milliseconds, for a table."""
    return " ".join(f"{1000 * value:.1f}" for value in seconds)


def config_to_measure(path: str, micro_batch: int | None) -> dict:
    """The JSON without its schedule, on GPUs with FusedAdam, with `micro_batch` sequences in place of its number."""
    if micro_batch is not None and micro_batch < 1:
        raise UserError(f"--micro_batch {micro_batch}: a micro-batch has 1 sequence at least")
    config = read_config(path, needs=["optimizer.params", *([] if micro_batch else ["train_micro_batch_size_per_gpu"])])
    config.pop("scheduler", None)
    if get_accelerator().device_name() != "cpu":
        config["optimizer"]["params"].pop("torch_adam", None)  # FusedAdam, compiled on first use
    if micro_batch:
        config["train_micro_batch_size_per_gpu"] = micro_batch
    return config


def dtype_of(config: dict) -> torch.dtype:
    """The precision in which the layers of this config compute."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


class StageClock:
    """Time that this rank spends in its forward and backward passes, by standing between engine and instructions.

    It waits for the device before and after each of them, so take it off (`stop()`) when you have seen enough.
    """

    def __init__(self, engine) -> None:
        self.engine = engine
        self.passes: list[float] = []
        self.ended = 0.0
        timed = {kind: self._timed(engine._INSTRUCTION_MAP[kind]) for kind in (ForwardPass, BackwardPass)}
        engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | timed

    def _timed(self, instruction):
        def run(engine, **kwargs) -> None:
            get_accelerator().synchronize()
            start = time.perf_counter()
            instruction(engine, **kwargs)
            get_accelerator().synchronize()
            self.ended = time.perf_counter()
            self.passes.append(self.ended - start)

        return run

    def take(self) -> float:
        """Seconds in forward and backward passes since the last take()."""
        total = sum(self.passes)
        self.passes = []
        return total

    def stop(self) -> None:
        del self.engine._INSTRUCTION_MAP  # the class's own map is seen again
