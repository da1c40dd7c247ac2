"""A training run: prepare, train, evaluate, each stage skipped when it is done. Days 02, 12, 17, 18, 25, 26.

    from capstone.training import run     # capstone/train.py and the programs of days 26 to 28 call it

Checked with deepspeed 0.19.8. Source: each part's day, as capstone/ names it.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from filelock import FileLock, Timeout

from capstone import checkpoint
from capstone.config import Config, Model, as_yaml, deepspeed_section
from capstone.data import load_blocks, train_batches
from capstone.evaluate import evaluate_run, print_report
from capstone.model import as_transformers, build, flops_per_token, parameter_groups, speed_up
from capstone.monitor import TARGETS, Monitor
from capstone.prepare import prepare
from common.cpu import start_without_compiler
from common.data import held_out_loss, load_tokenizer, to_device
from common.errors import UserError
from common.model import get_preset
from common.ranks import print0
from common.run_log import show_path
from day17.checkpoints import StopSignals, all_or_none, from_all_ranks, seed_all, write_whole
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
        save_model(started.engine, tokenizer, config.run_path / "model", facts)
    started.log.close()
    started.engine.destroy()
    return to_the_end


def train_steps(config: Config, started: Start, on_step: OnStep | None) -> bool:
    """The loop, from the step that was started at to the last; False when a signal has ended it before. Collective."""
    engine, log, settings = started.engine, started.log, config.train
    root, block_size = config.run_path / "checkpoints", get_preset(config.model.preset).block_size
    blocks, held_out = (load_blocks(config, split, block_size, verify=True) for split in ("train", "held_out"))
    sequences = started.step * engine.train_batch_size()
    batches = train_batches(blocks, engine.train_micro_batch_size_per_gpu(), settings.seed, sequences=sequences)
    accumulation = engine.gradient_accumulation_steps()
    # One rank has nobody to average with; ZeRO-0 would still flatten all gradients and copy them back: day 12.
    alone = engine.zero_optimization_stage() == 0 and engine.dp_world_size == 1
    maybe_average = engine.no_sync if alone else nullcontext
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
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel(), grad_norm=norm)
        stopped_by, last, measured = started.stop.agreed(), step == settings.steps, None
        saves = last or stopped_by or step % config.checkpoint.save_every == 0
        if last or step % settings.eval_every == 0:
            with started.evaluating():
                measured = held_out_loss(engine, held_out, engine.device, max_blocks=64)
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


def save_model(engine: deepspeed.DeepSpeedEngine, tokenizer, final: Path, facts: dict[str, Any]) -> None:
    """The weights as a `transformers` folder, whole or not there, with what they were trained with. Collective."""
    model, partial = engine.module, final.with_name("partial_model")
    whole = deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None)  # under ZeRO-3 too
    with whole, all_or_none("saving the model", final.parent):
        if engine.global_rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            as_transformers(model, tokenizer.eos_token_id).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            write_whole(partial / "training.json", json.dumps(facts, indent=2))
            partial.rename(final)


def join(config: Config, facts: dict[str, Any]) -> FileLock:
    """Take the run's folder, which nobody else may have, for what `facts` say. Collective; rank 0 holds the lock."""
    lock, problem = FileLock(config.run_path / ".lock"), None  # held while this process lives
    try:
        if torch.distributed.get_rank() == 0:
            lock.acquire(timeout=10)  # a process that was killed just now may still be ending
            check_same_run(config, facts)
    except UserError as error:
        problem = str(error)
    except Timeout:
        problem = f"{show_path(config.run_path)} is being trained already"
    except OSError as error:
        problem = f"{show_path(config.run_path)}: {error.strerror}: name a run_dir that can be written"
    except Exception as error:  # whatever it is, the other ranks wait for an answer
        problem = f"{show_path(config.run_path)}/run.json: {type(error).__name__}: {error}"
    if problem := from_all_ranks(problem)[0]:
        raise UserError(problem)
    return lock


def run(config: Config, on_step: OnStep | None = None) -> bool:
    """All stages of a run, those that are done skipped; `on_step(step, engine, batch)` before each forward pass.

    Call it in a process that a launcher started. Return False when a signal has ended it before the end.
    """
    start_without_compiler()
    manifest = prepare(config)  # before the ranks connect: no collective waits while one process works
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    facts = facts_of(config, manifest["fingerprint"], torch.distributed.get_world_size())
    lock, model_dir = join(config, facts), config.run_path / "model"
    if not model_dir.exists():
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
