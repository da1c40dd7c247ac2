"""A training run: prepare, train, evaluate, each stage skipped when it is done. Days 02, 12, 17, 18, 25, 26.

    from capstone.training import run     # capstone/train.py and the programs of days 26 to 28 call it

Checked with deepspeed 0.19.8. Source: each part's day, as capstone/ names it.
"""

import json
import math
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from filelock import FileLock, Timeout

from capstone import checkpoint
from capstone.config import Config, Model, as_yaml, deepspeed_section
from capstone.data import load_blocks, train_batches
from capstone.evaluate import evaluate_run, held_out_loss, print_report
from capstone.model import build, flops_per_token, parameter_groups, save_model, speed_up
from capstone.monitor import TARGETS, Monitor
from capstone.prepare import checked, make_shards
from capstone.ranks import from_rank_0
from common.cpu import start_without_compiler
from common.data import load_tokenizer, to_device
from common.errors import UserError
from common.model import get_preset
from common.ranks import print0
from common.run_log import show_path
from day17.checkpoints import StopSignals, from_all_ranks, seed_all, write_whole
from day17.saving import refuse_what_is_not_finite

OnStep = Callable[[int, deepspeed.DeepSpeedEngine, dict[str, torch.Tensor]], None]
# What may change between two starts of a run: where and how often something is written, and how the work is shared out.
MAY_CHANGE = {"zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
MAY_CHANGE |= {"tensorboard", "csv_monitor", "wandb", "comet", "steps_per_print", "wall_clock_breakdown", "timers"}
MAY_CHANGE |= {"comms_logger", "flops_profiler", "memory_breakdown", "dump_state", "activation_checkpointing"}


def facts_of(config: Config, data_fingerprint: str, ranks: int) -> dict[str, Any]:
    """What the weights depend on, as day 25 wrote it: kept in run.json from the first start on, and with the model."""
    facts = {"data": data_fingerprint, "model": config.model.model_dump(), "train": config.train.model_dump()}
    return facts | {"deepspeed": config.deepspeed, "ranks": ranks}


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of what would make another run of it: all the rest of its weights would be of two kinds."""

    def essence(facts: dict[str, Any]) -> dict[str, Any]:
        section, train = facts["deepspeed"], facts["train"]
        micro, accumulation = (
            section.get("train_micro_batch_size_per_gpu", 1),
            section.get("gradient_accumulation_steps", 1),
        )
        batch = train.get("global_batch") or section.get("train_batch_size") or micro * accumulation * facts["ranks"]
        found = {"data": facts["data"], "global batch": batch}
        found |= {f"model.{key}": value for key, value in Model(**facts["model"]).model_dump().items()}
        found |= {f"train.{key}": train[key] for key in ("steps", "seed")}
        return found | {f"deepspeed.{key}": value for key, value in section.items() if key not in MAY_CHANGE}

    one, other = essence(before), essence(now)
    return [key for key in one | other if one.get(key) != other.get(key)]


def check_same_run(config: Config, facts: dict[str, Any]) -> None:
    """Compare with the run that this folder holds, if it holds one; write down what it is. Rank 0's part."""
    path = config.run_path / "run.json"
    before = next((p for p in (path, config.run_path / "model/training.json") if p.exists()), None)
    if before and (names := changed(json.loads(before.read_text()), facts)):
        raise UserError(f"{show_path(config.run_path)} holds a run with other {', '.join(names)}: name another run_dir")
    if not path.exists():
        write_whole(path, json.dumps(facts, indent=2))
    write_whole(config.run_path / "config.yaml", as_yaml(config))


def clips_here(section: dict[str, Any]) -> float:
    """At ZeRO-0 gradients are ordinary `.grad`s: PyTorch clips them faster than DeepSpeed (day 12) and tells the norm.

    Takes the clipping out of `section`; returns the norm to clip to, 0 where DeepSpeed does it.
    """
    half = any(section.get(name, {}).get("enabled") for name in ("fp16", "bf16"))
    if half or section.get("zero_optimization", {}).get("stage", 0):
        return 0.0
    norm, section["gradient_clipping"] = section.get("gradient_clipping", 1.0), 0.0
    return norm


@dataclass
class Start:
    """What a start makes or finds."""

    stop: StopSignals
    engine: deepspeed.DeepSpeedEngine
    step: int  # that the newest checkpoint was saved after; 0 without one
    clip: float  # the norm that this loop clips to; 0 where DeepSpeed does it
    evaluating: Callable[[], AbstractContextManager]  # to measure the held-out loss in
    log: Monitor


def start(config: Config, tokenizer) -> Start:
    """The engine with the newest checkpoint's state, or with fresh weights, and the log that goes on. Collective."""
    stop = StopSignals()
    checkpoint.load_safely()  # before torch.load: weights and numbers only
    section = deepspeed_section(config, torch.distributed.get_world_size())
    if config.monitor.tensorboard:
        section["tensorboard"] = {"enabled": True, "output_path": str(config.run_path), "job_name": "tensorboard"}
    found = checkpoint.choose(config.run_path / "checkpoints", section)
    torch.manual_seed(config.train.seed)  # the same on every rank, so every rank builds the same weights
    model = build(config, len(tokenizer), tokenizer.eos_token_id)
    clip = clips_here(section)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=section)
    evaluating = speed_up(engine)
    seed_all(config.train.seed * 1000 + engine.global_rank)  # from here on, each rank its own random numbers
    step = checkpoint.load(engine, found) if found else 0
    batch = engine.train_batch_size()
    shares = f"{engine.train_micro_batch_size_per_gpu()} micro x {engine.gradient_accumulation_steps()} accumulation"
    print0(
        f"zero stage {engine.zero_optimization_stage()} | batch {batch} = {shares} x {engine.dp_world_size} ranks"
        f" | step {step} of {config.train.steps} | {engine.device.type}"
    )
    tokens_a_step = batch * get_preset(config.model.preset).block_size
    log = Monitor(config, engine, step, tokens_a_step, flops_per_token(config, model))
    return Start(stop, engine, step, clip, evaluating, log)


def train(config: Config, facts: dict[str, Any], on_step: OnStep | None = None) -> bool:
    """Train from the newest checkpoint, or from fresh weights, to the last step; save the model. Collective.

    Return False when a signal has ended it before.
    """
    tokenizer = load_tokenizer(config.tokenizer.name)
    started = start(config, tokenizer)
    to_the_end = train_steps(config, started, on_step)
    if to_the_end:
        for number in (signal.SIGTERM, signal.SIGUSR1):  # from here on nothing is lost: a signal ends the process
            signal.signal(number, signal.SIG_DFL)
        save_model(config, started.engine, tokenizer, facts)
    started.log.close()
    started.engine.destroy()
    return to_the_end


def train_steps(config: Config, started: Start, on_step: OnStep | None) -> bool:
    """The loop, from the step that was started at to the last; False when a signal has ended it before. Collective."""
    engine, log, settings = started.engine, started.log, config.train
    root, block_size = config.run_path / "checkpoints", get_preset(config.model.preset).block_size
    blocks = load_blocks(config, "train", block_size, verify=True)  # all shards, those of the held-out part too
    held_out = load_blocks(config, "held_out", block_size)
    sequences = started.step * engine.train_batch_size()
    batches = train_batches(blocks, engine.train_micro_batch_size_per_gpu(), settings.seed, sequences=sequences)
    accumulation = engine.gradient_accumulation_steps()
    # One rank has nobody to average with; ZeRO-0 would still flatten all gradients and copy them back: day 12.
    alone = engine.zero_optimization_stage() == 0 and engine.dp_world_size == 1
    maybe_average = engine.no_sync if alone else nullcontext
    finite = Finite(engine, config.checkpoint.stop_at_nan)
    for step in range(started.step + 1, settings.steps + 1):
        local_loss, norm = 0.0, None
        for _ in range(accumulation):
            batch = to_device(next(batches), engine.device)
            if on_step:
                on_step(step, engine, batch)
            with maybe_average():
                loss = engine(**batch).loss
                engine.backward(loss)
            if started.clip and engine.is_gradient_accumulation_boundary():
                norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), started.clip)
            engine.step()
            local_loss += loss.detach() / accumulation
        finite.note(step, local_loss, norm)
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel(), grad_norm=norm)
        stopped_by, last, measured = started.stop.agreed(), step == settings.steps, None
        saves = last or stopped_by or step % config.checkpoint.save_every == 0
        evaluates = last or step % settings.eval_every == 0
        if saves or evaluates or step == 1 or step % settings.log_every == 0:
            finite.check()  # where the host has waited for the device anyway, and before anything is saved
        if evaluates:
            with started.evaluating():
                measured = held_out_loss(engine, held_out, engine.device)
            log.held_out(step, measured)
            log.restart_clock()
        ends = last or stopped_by or config.checkpoint.stop_at_nan
        sound = is_sound(engine, step, measured, ends) if saves or measured is not None else None
        if saves and sound:
            checkpoint.save(engine, root, step, config.checkpoint.keep_last, measured)
            log.saved()
            log.restart_clock()
        if stopped_by and not last:
            print0(f"stopped by {stopped_by} after step {step}, which is saved: the same command continues")
            return False
    return True


class Finite:
    """Loss and gradient norm of the first step in which one is NaN or infinite, kept on the device.

    To look at them after each step, the host would have to wait for the device and could not run ahead of it.
    In fp16 the norm does not count: by infinite gradients the loss scaler learns that its factor is too large.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, looks: bool) -> None:
        self.engine, self.looks, self.scaled = engine, looks, engine.fp16_enabled()
        self.found = torch.zeros(3, device=engine.device)  # step (0: none), loss of this rank, norm

    def note(self, step: int, loss: torch.Tensor, norm: torch.Tensor | None) -> None:
        """After an optimizer step; `norm` is DeepSpeed's where the loop has none."""
        if not self.looks:
            return
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        norm = 0.0 if norm is None or self.scaled else norm  # at ZeRO-0 without clipping nobody works one out
        values = [torch.as_tensor(value, device=self.found.device).float() for value in (loss, norm)]
        now = torch.stack([torch.full_like(values[0], step), *values])
        self.found = torch.where((self.found[0] == 0) & ~now.isfinite().all(), now, self.found)

    def check(self) -> None:
        """Raise UserError on all ranks when a value was not finite on any. Collective."""
        rows = [(row, rank) for rank, row in enumerate(from_all_ranks(self.found.tolist())) if row[0]]
        if rows:
            (step, loss, norm), rank = min(rows, key=lambda row: (row[0][0], math.isfinite(row[0][1])))
            raise UserError(
                f"step {step:.0f}: loss {loss} on rank {rank}, gradient norm {norm}: stopped, and nothing saved since."
                " The same command goes on from the last checkpoint, into the same batch: look at the data, or lower"
                " the learning rate in another run_dir. At ZeRO-1 to 3, checkpoint.stop_at_nan=false skips such steps."
            )


def is_sound(engine: deepspeed.DeepSpeedEngine, step: int, held_out: float | None, ends: bool) -> bool:
    """Whether these weights train on; where they do not and the run `ends` for it, raise UserError. Collective.

    ZeRO-0 looks for NaN in no gradient (fp16 apart): one bad batch, and every weight is NaN from then on.
    """
    try:
        refuse_what_is_not_finite(engine, step, held_out)
    except UserError:
        if ends:
            raise
        return False
    return True


def join(config: Config, facts: dict[str, Any]) -> FileLock:
    """Take the run's folder, which nobody else may have, for what `facts` say. Collective; rank 0 holds the lock."""
    lock, where = FileLock(config.run_path / ".lock"), show_path(config.run_path)  # held while this process lives

    def take() -> None:
        try:
            lock.acquire(timeout=10)  # a process that was killed just now may still be ending
            check_same_run(config, facts)
        except Timeout:
            raise UserError(f"{where} is being trained already") from None
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}: name a run_dir that can be written") from error
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"{where}/run.json: {error}") from error

    from_rank_0(take)
    return lock


def run(config: Config, on_step: OnStep | None = None) -> bool:
    """All stages of a run, those that are done skipped; `on_step(step, engine, batch)` before each forward pass.

    Call it in a process that a launcher started. Return False when a signal has ended it before the end.
    """
    start_without_compiler()
    made = make_shards(config)  # before the ranks connect: no collective waits while one process works
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    manifest = checked(config, made)
    facts = facts_of(config, manifest["fingerprint"], torch.distributed.get_world_size())
    lock, model_dir = join(config, facts), config.run_path / "model"
    if not from_rank_0(model_dir.exists):
        if not train(config, facts, on_step):
            torch.distributed.destroy_process_group()
            return False
    else:
        print0(f"train: done already | {show_path(model_dir)}")
        if torch.distributed.get_rank() == 0:
            (config.run_path / TARGETS).unlink(missing_ok=True)
    torch.distributed.barrier()
    print_report(evaluate_run(config))
    print0(f"done: {show_path(config.run_path)}")
    torch.distributed.destroy_process_group()
    lock.release()
    return True
