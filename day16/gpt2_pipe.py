"""Day 16: gpt2_pipe - GPT-2 as a list of layers for PipelineModule, with Hugging Face's weights, and where to cut it.

A module, nothing to start: `day16/train.py` and the labs import it, and `day16/convert.py` goes back to transformers.
To copy a pipeline of GPT-2, take day16/gpt2_pipe.py along.
Checked with deepspeed 0.19.8 and transformers 5.20. Source: deepspeed/runtime/pipe/module.py; issue DeepSpeed 2974.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
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
        self.parts = [int(number) for number in re.findall(r"\d+", method)]
        layers = len(self._layer_specs)
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


def best_balanced(costs: list[float], num_stages: int) -> str:
    return "parts:" + ",".join(map(str, best_parts(costs, num_stages)))


# --- what the scripts of this day share ---


def from_all_ranks(value: object) -> list:
    """`value` of each rank, in order. Collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def pairs(batches: Iterable[dict]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What train_batch wants: (inputs for the first stage, labels for the last), a micro-batch at a time."""
    for batch in batches:
        yield batch["input_ids"], batch["labels"]
