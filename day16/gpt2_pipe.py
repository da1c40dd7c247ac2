"""Day 16: gpt2_pipe - GPT-2 as a list of layers for PipelineModule, with Hugging Face's weights, and where to cut it.

A module, nothing to start: `day16/train.py` and the labs import it, and `day16/convert.py` goes back to transformers.
To copy a pipeline of GPT-2, take day16/gpt2_pipe.py along.
Checked with deepspeed 0.19.8 and transformers 5.20. Source: deepspeed/runtime/pipe/module.py; issue DeepSpeed 2974.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass
from torch.nn.functional import cross_entropy, linear, pad
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from common.errors import UserError
from common.model import build_model

# --- the model as a list of layers ---


class Position(torch.nn.Embedding):
    """Adds to each token where it stands. A layer of its own: the tied layer should hold the tied weight alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight[: x.shape[1]]


def head(embedding: torch.nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    """The output layer: the embedding's matrix once more, the other way round."""
    return linear(x, embedding.weight)


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As `transformers` computes it: in fp32, each position against the next token, the last against nothing (-100)."""
    following = pad(labels, (0, 1), value=-100)[:, 1:]
    return cross_entropy(logits.float().flatten(0, 1), following.flatten())


def layer_specs(config: GPT2Config, tied: bool = True) -> list[LayerSpec]:
    """GPT-2 for PipelineModule. `tied=False` gives the head a weight of its own: how it goes wrong, for verify.py."""
    vocabulary = (config.vocab_size, config.n_embd)
    blocks = [LayerSpec(GPT2Block, config, layer_idx=index) for index in range(config.n_layer)]
    return [
        TiedLayerSpec("wte", torch.nn.Embedding, *vocabulary) if tied else LayerSpec(torch.nn.Embedding, *vocabulary),
        LayerSpec(Position, config.n_positions, config.n_embd),
        *blocks,
        LayerSpec(torch.nn.LayerNorm, config.n_embd, eps=config.layer_norm_epsilon),
        TiedLayerSpec("wte", torch.nn.Embedding, *vocabulary, forward_fn=head)
        if tied
        else LayerSpec(torch.nn.Linear, *reversed(vocabulary), bias=False),
    ]


def layer_names(config: GPT2Config) -> list[str]:
    """What `transformers` calls these layers."""
    blocks = [f"h.{index}" for index in range(config.n_layer)]
    return [f"transformer.{name}" for name in ("wte", "wpe", *blocks, "ln_f")] + ["lm_head"]


def shape_of(name: str, vocab_size: int, num_layers: int | None = None) -> GPT2Config:
    """The config of the preset `name`, without its weights; `num_layers` overrides its depth."""
    with torch.device("meta"):
        config = build_model(name, vocab_size).config
    config.n_layer = num_layers or config.n_layer
    return config


def whole_model(config: GPT2Config, seed: int) -> GPT2LMHeadModel:
    """The model of `transformers` with fresh weights, on the default device."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


# --- weights in and out ---


def own_layers(module: PipelineModule) -> Iterator[tuple[int, torch.nn.Module]]:
    """(number, layer) of this stage. A tied layer with a forward_fn is kept as partial(forward_fn, layer)."""
    for index, layer in enumerate(module.forward_funcs, start=module.parts[module.stage_id]):
        yield index, layer.args[0] if isinstance(layer, partial) else layer


def load_hf(module: PipelineModule, config: GPT2Config, state: dict[str, torch.Tensor]) -> None:
    """Copy this stage's part of a `transformers` state_dict. Before deepspeed.initialize, which copies the weights."""
    for index, layer in own_layers(module):
        prefix = layer_names(config)[index]
        layer.load_state_dict({name: state[f"{prefix}.{name}"] for name in layer.state_dict()})


def hf_state(folder: Path, config: GPT2Config) -> dict[str, torch.Tensor]:
    """The `transformers` state_dict in the layer_XX files of a pipeline's checkpoint."""
    state = {}
    for index, prefix in enumerate(layer_names(config)):
        path = folder / f"layer_{index:02d}-model_states.pt"
        if path.exists():
            layer = torch.load(path, map_location="cpu", weights_only=True)
            state |= {f"{prefix}.{name}": tensor for name, tensor in layer.items()}
        elif prefix != "lm_head":  # the tied head has no file of its own: it is the embedding
            raise UserError(f"{folder} has no {path.name}: is it a pipeline of {config.n_layer} blocks?")
    return {"lm_head.weight": state["transformer.wte.weight"]} | state


# --- where to cut ---


class CutPipeline(PipelineModule):
    """PipelineModule that also takes partition_method="parts:0,3,6": stage 0 has layers 0 to 2, stage 1 layers 3 to 5.

    0.19.8 has no such option (issue DeepSpeed 2974); `_partition_layers` is where it decides, and it needs these two
    things set. Do not call such a class GPT2ModelPipe: that name switches attention masks and checkpointing rules on.
    """

    def _partition_layers(self, method: str = "uniform") -> None:
        if not re.fullmatch(r"parts:\d+(,\d+)*", method):
            return super()._partition_layers(method)
        self.parts, layers = [int(number) for number in re.findall(r"\d+", method)], len(self._layer_specs)
        rising = sorted({0, *self.parts, layers})
        if self.parts != rising or rising[-1] > layers or len(rising) != self.num_stages + 1:
            want = f"{self.num_stages + 1} rising numbers, 0 to {layers}"
            raise UserError(f"{method}: {self.num_stages} stages take {want}")
        self._set_bounds(*self.parts[self.stage_id : self.stage_id + 2])


def best_parts(costs: list[float], num_stages: int) -> list[int]:
    """Cut `costs` into `num_stages` runs of layers so that the largest sum is as small as it can be.

    The slowest stage sets the pace of a pipeline: that is what to minimise. (DeepSpeed's own partition_balanced looks
    for the smallest *difference* between largest and smallest sum.) Of the cuts with that pace it takes the one whose
    smallest sum is largest.
    """
    if num_stages > len(costs):
        raise UserError(f"{len(costs)} layers do not fill {num_stages} stages")

    def divide(choose: Callable, join: Callable, start: float, limit: float) -> tuple[float, list[int]]:
        """Dynamic programming: best[n] is the best cut of the first n layers, first into one stage, then into two."""
        best = {0: (start, [0])}
        for _ in range(num_stages):
            ways = {}
            for value, parts in best.values():
                for n in range(parts[-1] + 1, len(costs) + 1):
                    if (cost := sum(costs[parts[-1] : n])) <= limit:
                        ways.setdefault(n, []).append((join(value, cost), [*parts, n]))
            best = {n: choose(found) for n, found in ways.items()}
        return best[len(costs)]

    pace, _ = divide(min, max, start=0.0, limit=math.inf)
    return divide(max, min, start=math.inf, limit=pace)[1]


def time_layers(
    config: GPT2Config, layers: range, micro_batch: int, dtype: torch.dtype, repeats: int = 7, in_a_row: int = 1
) -> float:
    """Seconds of one micro-batch forward and backward through these layers, one after the other; with the loss if the
    head is among them. Median of `repeats`, after two that warm up.

    `in_a_row` passes are timed together: a GPU is still busy with one while the host starts the next, as in a stage.
    """
    accelerator, specs, seconds = get_accelerator(), layer_specs(config), []
    device = torch.device(accelerator.current_device_name())
    labels = torch.randint(config.vocab_size, (micro_batch, config.n_positions), device=device)
    hidden = torch.randn(*labels.shape, config.n_embd, device=device, dtype=dtype)
    ones, functions = torch.ones_like(hidden), []
    for spec in (specs[index] for index in layers):
        with device:  # weights are drawn there, which takes a GPU seconds and a CPU minutes
            layer, forward_fn = spec.build().to(dtype), getattr(spec, "forward_fn", None)
        functions.append(partial(forward_fn, layer) if forward_fn else layer)
    for _ in range(repeats + 2):
        accelerator.synchronize()
        start = time.perf_counter()
        for _ in range(in_a_row):
            x = hidden.detach().requires_grad_() if layers.start else labels
            for function in functions:
                x = function(x)
            if layers.stop == len(specs):
                next_token_loss(x, labels).backward()
            else:
                x.backward(ones)
        accelerator.synchronize()
        seconds.append((time.perf_counter() - start) / in_a_row)
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


def best_balanced(costs: list[float], num_stages: int) -> str:
    return "parts:" + ",".join(map(str, best_parts(costs, num_stages)))


# --- measuring it ---


def in_ms(seconds: Iterable[float]) -> str:
    """The times of the stages, in milliseconds, for a table."""
    return " ".join(f"{1000 * value:.1f}" for value in seconds)


def config_to_measure(path: str, micro_batch: int | None) -> dict:
    """The JSON without its schedule, on GPUs with FusedAdam, with `micro_batch` sequences in place of its number."""
    if micro_batch is not None and micro_batch < 1:
        raise UserError(f"--micro_batch {micro_batch}: a micro-batch has 1 sequence at least")
    config = json.loads(Path(path).read_text())
    config.pop("scheduler", None)
    if get_accelerator().device_name() != "cpu":
        config["optimizer"]["params"].pop("torch_adam", None)  # FusedAdam, compiled on first use
    if micro_batch:
        config["train_micro_batch_size_per_gpu"] = micro_batch
    return config


class StageClock:
    """Time that this rank spends in its forward and backward passes, by standing between engine and instructions.

    It waits for the device before and after each of them, so take it off (`stop()`) when you have seen enough.
    """

    def __init__(self, engine) -> None:
        self.engine, self.passes, self.ended = engine, [], 0.0
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
        total, self.passes = sum(self.passes), []
        return total

    def stop(self) -> None:
        del self.engine._INSTRUCTION_MAP  # the class's own map is seen again


def from_all_ranks(value: object) -> list:
    """`value` of each rank, in order. Collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def pairs(batches: Iterable[dict]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What train_batch wants: (inputs for the first stage, labels for the last), a micro-batch at a time."""
    for batch in batches:
        yield batch["input_ids"], batch["labels"]
