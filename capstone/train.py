"""One command trains, the same command again resumes, and when all is done it says so. Days 02, 12, 17, 18, 25, 26.

    deepspeed --num_accelerators 2 capstone/train.py --config capstone/configs/tiny.yaml
    deepspeed --num_accelerators 2 capstone/train.py --config capstone/configs/tiny.yaml monitor.port=9400

Prepare, train, evaluate, each skipped when it is done. Expect in the run folder: config.yaml (resolved), metrics.jsonl,
tensorboard/, checkpoints/, and in the end model/ (a `transformers` folder) and evaluation.json.
Checked with deepspeed 0.19.8.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from filelock import FileLock, Timeout

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):  # started as a file: not capstone/ but the repository is
    sys.path[0] = os.path.dirname(sys.path[0])  # to be searched, or capstone/config.py would hide the folder config/

from capstone import checkpoint
from capstone.config import TINY, Config, Model, as_yaml, deepspeed_section, load_config
from capstone.data import load_blocks, train_batches
from capstone.evaluate import evaluate, load_model, print_report
from capstone.model import as_transformers, build, flops_per_token, parameter_groups, speed_up
from capstone.monitor import TARGETS, Monitor
from capstone.prepare import prepare
from common.cpu import start_without_compiler
from common.data import held_out_loss, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.ranks import print0, require_launcher
from common.run_log import show_path
from day17.checkpoints import StopSignals, all_or_none, from_all_ranks, seed_all, write_whole

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


def train(config: Config, facts: dict[str, Any], on_step: OnStep | None = None) -> bool:
    """Train from the newest checkpoint, or from fresh weights, to the last step; save the model. Collective.

    Return False when a signal has ended it before.
    """
    stop, settings, root = StopSignals(), config.train, config.run_path / "checkpoints"
    checkpoint.load_safely()  # before torch.load: weights and numbers only
    section = deepspeed_section(config, torch.distributed.get_world_size())
    if config.monitor.tensorboard:
        section["tensorboard"] = {"enabled": True, "output_path": str(config.run_path), "job_name": "tensorboard"}
    found = checkpoint.choose(root, section)
    block_size, tokenizer = get_preset(config.model.preset).block_size, load_tokenizer(config.tokenizer.name)
    blocks, held_out = (load_blocks(config, split, block_size, verify=True) for split in ("train", "held_out"))
    torch.manual_seed(settings.seed)  # the same on every rank, so every rank builds the same weights
    model = build(config, len(tokenizer), tokenizer.eos_token_id)
    clip = clips_here(section)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=section)
    eager, world = speed_up(engine), engine.dp_world_size
    # One rank has nobody to average with; ZeRO-0 would still flatten all gradients and copy them back: day 12.
    maybe_average = engine.no_sync if engine.zero_optimization_stage() == 0 and world == 1 else nullcontext
    seed_all(settings.seed * 1000 + engine.global_rank)  # from here on, each rank its own random numbers
    start = checkpoint.load(engine, found) if found else 0
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    batch_size = f"{micro} micro x {accumulation} accumulation x {world} ranks"
    print0(
        f"zero stage {engine.zero_optimization_stage()} | batch {engine.train_batch_size()} = {batch_size}"
        f" | step {engine.global_steps} of {settings.steps} | {engine.device.type}"
    )
    batches = train_batches(blocks, micro, settings.seed, sequences=start * engine.train_batch_size())
    tokens_a_step = engine.train_batch_size() * block_size
    log = Monitor(config, engine, start, tokens_a_step, flops_per_token(config, model))
    for step in range(start + 1, settings.steps + 1):
        local_loss, norm = 0.0, None
        for _ in range(accumulation):
            batch = to_device(next(batches), engine.device)
            if on_step:
                on_step(step, engine, batch)
            with maybe_average():
                loss = engine(**batch).loss
                engine.backward(loss)
            if clip and engine.is_gradient_accumulation_boundary():
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            engine.step()
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel(), grad_norm=norm)
        stopped_by, last, measured = stop.agreed(), step == settings.steps, None
        if step % settings.eval_every == 0 or last:
            with eager():
                measured = held_out_loss(engine, held_out, engine.device, max_blocks=64)
            log.held_out(step, measured)
            log.restart_clock()
        if step % config.checkpoint.save_every == 0 or last or stopped_by:
            checkpoint.save(engine, root, step, config.checkpoint.keep_last, measured)
            log.saved()
            log.restart_clock()
        if stopped_by and not last:
            print0(f"stopped by {stopped_by} after step {step}, which is saved: the same command continues")
            log.close()
            return False
    for number in (signal.SIGTERM, signal.SIGUSR1):  # from here on nothing is lost: a signal ends the process
        signal.signal(number, signal.SIG_DFL)
    save_model(engine, tokenizer, config.run_path / "model", facts)
    log.close()
    engine.destroy()
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


def run(config: Config, on_step: OnStep | None = None) -> bool:
    """All stages of a run, those that are done skipped; `on_step(step, engine, batch)` before each forward pass.

    Call it in a process that a launcher started. Return False when a signal has ended it before the end.
    """
    start_without_compiler()
    manifest = prepare(config)  # before the ranks connect: no collective waits while one process works
    deepspeed.init_distributed()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    rank, model_dir = torch.distributed.get_rank(), config.run_path / "model"
    facts, problem = facts_of(config, manifest["fingerprint"], torch.distributed.get_world_size()), None
    lock = FileLock(config.run_path / ".lock")  # held by rank 0 while this process lives
    try:
        if rank == 0:
            lock.acquire(timeout=10)  # a process that was killed just now may still be ending
            check_same_run(config, facts)
    except (Timeout, UserError) as error:
        problem = (
            str(error) if isinstance(error, UserError) else f"{show_path(config.run_path)} is being trained already"
        )
    if problem := from_all_ranks(problem)[0]:
        raise UserError(problem)

    if not model_dir.exists():
        if not train(config, facts, on_step):
            torch.distributed.destroy_process_group()
            return False
    else:
        print0(f"train: done already | {show_path(model_dir)}")
        if rank == 0:
            (config.run_path / TARGETS).unlink(missing_ok=True)
    torch.distributed.barrier()

    path = config.run_path / "evaluation.json"
    if path.exists() and json.loads(path.read_text())["settings"] == config.evaluate.model_dump():
        report = json.loads(path.read_text())
        print0(f"evaluate: done already | {show_path(path)}")
    else:
        device = torch.device(get_accelerator().current_device_name())
        report = {"settings": config.evaluate.model_dump(), **evaluate(load_model(model_dir, config), config, device)}
        if rank == 0:
            write_whole(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print_report(report)
    print0(f"done: {show_path(config.run_path)}")
    torch.distributed.destroy_process_group()
    lock.release()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--config", default=TINY, help="YAML config of the project")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that go before the file's")
    args = parser.parse_intermixed_args()
    require_launcher()
    run(load_config(args.config, args.overrides, int(os.environ["WORLD_SIZE"])))


if __name__ == "__main__":
    with clear_errors():
        main()
