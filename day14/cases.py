"""Day 14: cases - a DeepSpeed config on a model of yours, as steps that can be timed; and what has to be equal.

    from day14.cases import Case, load_workload, refuse_unequal_batches

    workload = load_workload("mine.py:build", "all", None, seed=0, device=device)
    case = Case("zero2", config, workload, device)
    losses = case.window(5)                 # five optimizer steps

The model is a preset of common/model.py, a folder or hub name of a causal language model (`from_pretrained`), or
FILE.py:function. That function takes nothing and returns a module, which is called with `input_ids` and `labels` of the
shipped corpus; or (module, data set) with a data set of its own: dicts or tuples of tensors, with which the module is
called. What the module returns is the loss, or has it as `.loss`.
Checked with deepspeed 0.19.8. Source: day14/notes.md; Chowdhery et al. 2022, appendix B (MFU).
"""

import copy
import importlib.util
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from bench.held import live_tensor_bytes
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError
from common.model import PRESETS, build_model, get_preset
from common.ranks import over_ranks


@dataclass(frozen=True)
class Workload:
    """What is trained: `build()` makes the model anew with the same weights; `data` is what it reads."""

    build: Callable[[], torch.nn.Module]
    data: Dataset
    tokens: int  # of one sample; 1 where a sample has no input_ids
    held_out: Dataset | None = None


def load_workload(model: str, corpus: str, seq_len: int | None, seed: int, device: torch.device) -> Workload:
    """The workload of `--model`; UserError says what a hook lacks."""
    if ".py:" in model:
        return _from_hook(model, corpus, seq_len, seed)
    if model in PRESETS:
        preset = get_preset(model)
        tokenizer, longest = load_tokenizer(preset.tokenizer), preset.block_size
    else:
        tokenizer, longest = load_tokenizer(model), 128

    def build() -> torch.nn.Module:
        torch.manual_seed(seed)
        if model not in PRESETS:
            return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
        with device:
            return build_model(model, len(tokenizer), tokenizer.eos_token_id)

    blocks, held_out = load_corpus(corpus, tokenizer, seq_len or longest)
    return Workload(build, blocks, blocks.block_size, held_out)


def _from_hook(hook: str, corpus: str, seq_len: int | None, seed: int) -> Workload:
    file, _, name = hook.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"--model {hook}: no file {file!r}")
    spec = importlib.util.spec_from_file_location("models_of_the_reader", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--model {hook}: {file} has no function {name!r}")

    def call() -> tuple[torch.nn.Module, Dataset | None]:
        torch.manual_seed(seed)
        made = function()
        model, data = made if isinstance(made, tuple) else (made, None)
        if not isinstance(model, torch.nn.Module):
            raise UserError(f"--model {hook} returned {type(model).__name__}, not a module or (module, data set)")
        return model, data

    _, data = call()
    if data is None:
        data, _ = load_corpus(corpus, load_tokenizer("bpe4096"), seq_len or 128)
    sample = data[0]
    tokens = sample["input_ids"].numel() if isinstance(sample, dict) and "input_ids" in sample else 1
    return Workload(lambda: call()[0], data, tokens)


def refuse_unequal_batches(configs: dict[str, dict]) -> int:
    """Return the samples that every config trains on in a step, as DeepSpeed computes them for these ranks.

    UserError when they differ: a step is then not the same training, and seconds per step compare nothing.
    """
    sizes = {name: DeepSpeedConfig(copy.deepcopy(config)).train_batch_size for name, config in configs.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"global batches differ ({found}): such steps are not the same training. Give all the same"
            " `train_batch_size`, or compare the time to a target loss: day14/labs/target.py"
        )
    return next(iter(sizes.values()))


class Case:
    """One config's engine on the workload, and its batches, in the same order for every case. Collective."""

    def __init__(self, name: str, config: dict, workload: Workload, device: torch.device, seed: int = 0) -> None:
        self.name, self.device = name, device
        model = workload.build()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=copy.deepcopy(config))
        sampler = DistributedSampler(workload.data, seed=seed)  # each rank its own samples
        micro_batch = self.engine.train_micro_batch_size_per_gpu()
        self.batches = endless_batches(DataLoader(workload.data, micro_batch, sampler=sampler, drop_last=True))
        self.tokens_per_step = self.engine.train_batch_size() * workload.tokens

    def step(self, watch: AbstractContextManager | None = None) -> torch.Tensor:
        """One optimizer step; return this rank's mean loss. `watch` is entered around each forward pass."""
        accumulation, total = self.engine.gradient_accumulation_steps(), 0.0
        for _ in range(accumulation):
            batch = next(self.batches)
            with watch or nullcontext():
                if isinstance(batch, dict):
                    output = self.engine(**to_device(batch, self.device))
                else:
                    output = self.engine(*(tensor.to(self.device) for tensor in batch))
            loss = output if isinstance(output, torch.Tensor) else output.loss
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach().float() / accumulation
        return total

    def window(self, num_steps: int) -> list[torch.Tensor]:
        """Losses of `num_steps` optimizer steps, between which nobody looks: the host need not wait for the device."""
        return [self.step() for _ in range(num_steps)]

    def counted_step(self) -> tuple[torch.Tensor, float]:
        """One optimizer step; return loss and the FLOPs that the model needs for a step on one rank.

        Counted in the forward pass, operation by operation; backward takes twice as many. What is computed again
        (activation checkpointing) or spent on optimizer and messages is not the model's need.
        """
        counter = FlopCounterMode(display=False)
        loss = self.step(counter)  # it counts the last micro-batch
        return loss, 3.0 * counter.get_total_flops() * self.engine.gradient_accumulation_steps()

    def peak_bytes(self, held: int) -> int:
        """The most bytes that this rank's tensors take in a step; `held`: what lay there before the engine was built.

        From the allocator on GPUs; on CPUs, which keep no such count, added up from the profiler's memory events.
        """
        if self.device.type != "cpu":
            get_accelerator().reset_peak_memory_stats()
            self.step()
            return get_accelerator().max_memory_allocated() - held
        before = live_tensor_bytes(self.device) - held
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            self.step()
        with TemporaryDirectory() as folder:
            trace.export_chrome_trace(f"{folder}/step.json")
            events = json.loads(Path(folder, "step.json").read_text())["traceEvents"]
        memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
        return before + max(accumulate(size for _, size in memory))

    def close(self) -> None:
        """Let go of the engine; `bench.memory.free` empties what it leaves."""
        self.engine.destroy()


def mean_over_ranks(losses: list[torch.Tensor], device: torch.device) -> list[float]:
    """The losses of a window, each averaged over the ranks. Collective, so not for the inside of a timed window."""
    return [over_ranks(float(loss), device) for loss in losses]


def per_million_tokens(tokens_per_s: float, ranks: int, price: float | None) -> dict[str, float]:
    """Device hours that a million tokens take and, at `price` dollars per device hour, dollars."""
    hours = ranks * 1e6 / tokens_per_s / 3600
    return {"device_hours_per_mtoken": hours} | ({"dollars_per_mtoken": hours * price} if price is not None else {})
