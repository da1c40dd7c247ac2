"""Day 12: GPT-2-scale training - pretraining with all that a long run needs, and how well it uses the hardware.

From the repository root, on two CPU processes or any number of GPUs:

    deepspeed --num_accelerators 2 day12/train.py
    deepspeed --num_accelerators 2 day12/train.py --resume runs/day12/20261125-120000
    deepspeed --num_accelerators 1 day12/train.py --model gpt2 --deepspeed_config day12/ds_config_gpt2.json

Expect the held-out loss to fall, text samples to become readable, checkpoints in the run folder, and a last line on
resource use. `--resume RUN_DIR` continues an interrupted run as if nothing had happened.
Checked with deepspeed 0.19.8. Source: Radford et al. 2019 (GPT-2); https://github.com/karpathy/nanoGPT, train.py
"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from common.cpu import start_without_compiler
from common.data import TokenBlocks, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir
from config.read import read_config
from day12.checkpoint import batch_of, batches_from, resume, save
from day12.fast import speed_up
from day12.gpt import GPT, build_gpt, parameter_groups, to_transformers
from day12.resources import UsageMeter


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (not micro-batches)")
    parser.add_argument("--tokens", type=int, help="token budget of the run, in place of --steps")
    parser.add_argument("--global_batch", type=int, help="sequences per optimizer step (default: the config's)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day12"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--eval_every", type=int, default=100, help="optimizer steps between two held-out losses")
    parser.add_argument("--sample_every", type=int, default=100, help="optimizer steps between two text samples")
    parser.add_argument("--save_every", type=int, default=100, help="optimizer steps between two checkpoints")
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue this run from its last checkpoint")
    parser.add_argument("--fast", choices=["auto", "yes", "no"], default="auto", help="fast.py; auto: on accelerators")
    return parser.parse_args()


def stretch_schedule(config: dict, num_steps: int) -> None:
    """Let the config's schedule end with the run, after `num_steps`: the warm-up keeps its share of it."""
    schedule = config.get("scheduler", {}).get("params", {})
    if "total_num_steps" in schedule:
        if not isinstance(total := schedule["total_num_steps"], int) or total < 1:
            raise UserError(f"total_num_steps {total!r} in the scheduler's params: an integer, 1 or more")
        share = schedule.get("warmup_num_steps", 0) / total
        schedule |= {"total_num_steps": num_steps, "warmup_num_steps": max(1, round(share * num_steps))}


def plan_run(config: dict, args: argparse.Namespace, block_size: int, ranks: int) -> None:
    """Put --global_batch into the config, turn --tokens into args.steps, and let the schedule end with the run."""
    a_pass = config["train_micro_batch_size_per_gpu"] * ranks  # sequences of one micro-batch on all ranks
    if args.global_batch is not None:
        if args.global_batch < 1 or args.global_batch % a_pass:
            raise UserError(f"--global_batch {args.global_batch}: a multiple of {a_pass}, micro-batch x ranks")
        config |= {"train_batch_size": args.global_batch, "gradient_accumulation_steps": args.global_batch // a_pass}
    if args.tokens is not None:
        batch = config.get("train_batch_size", a_pass * config.get("gradient_accumulation_steps", 1))
        if args.tokens < batch * block_size:
            raise UserError(f"--tokens {args.tokens}: one optimizer step takes {batch * block_size:,}")
        args.steps = args.tokens // (batch * block_size)
    for name in ("steps", "log_every", "eval_every", "sample_every", "save_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: take 1 or more; a large number means at the end alone")
    stretch_schedule(config, args.steps)


def loader_for(engine: deepspeed.DeepSpeedEngine, blocks: TokenBlocks, seed: int) -> DataLoader:
    """Each rank its own blocks, in an order that depends on seed and epoch alone."""
    return DataLoader(
        blocks, engine.train_micro_batch_size_per_gpu(), sampler=DistributedSampler(blocks, seed=seed), drop_last=True,
        pin_memory=engine.device.type != "cpu",
        generator=torch.Generator(),  # or each epoch draws from the global one, and a resumed run draws once more
    )  # fmt: skip


def print_proof(engine: deepspeed.DeepSpeedEngine, schedule: object, num_steps: int) -> None:
    """What is on, read from the engine."""
    forward = engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else "off"
    print0(f"zero stage {engine.zero_optimization_stage()} | autocast {forward} | compiled {engine.is_compiled}")
    for group in engine.optimizer.param_groups:
        numbers = f"{sum(parameter.numel() for parameter in group['params']):,} parameters on rank 0"
        print0(f"{type(engine.basic_optimizer).__name__}: weight decay {group['weight_decay']} for {numbers}")
    run = f"schedule {type(schedule).__name__}, {num_steps} steps | {engine.device.type}"
    print0(f"batch {engine.train_batch_size()} = {batch_of(engine)} | {run}")


def evaluate(engine: deepspeed.DeepSpeedEngine, blocks: TokenBlocks) -> float:
    """The held-out loss, never compiled: for its other shapes the compiler would give up training's fixed ones."""
    with torch.compiler.set_stance("force_eager") if engine.is_compiled else nullcontext():
        return held_out_loss(engine, blocks, engine.device)


def text_sample(model: GPT, tokenizer, device: torch.device) -> str:
    """What the model makes of "The" by now. One rank is enough, with weights that are whole (stages 0 to 2)."""
    writer = to_transformers(model, tokenizer.eos_token_id).to(device)
    prompt = tokenizer("The", return_tensors="pt").to(device)
    ids = writer.generate(**prompt, max_new_tokens=40, do_sample=True, top_k=50, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0])


def look_around(engine: deepspeed.DeepSpeedEngine, tokenizer, blocks: TokenBlocks, step: int, log: RunLog, args):
    """What is no training: held-out loss, text sample, checkpoint, each when it is due. Tell whether any was."""
    every = (args.eval_every, args.sample_every, args.save_every)
    evaluates, samples, saves = (step % steps == 0 or step == args.steps for steps in every)
    if evaluates:
        log.held_out(step, evaluate(engine, blocks))
    if samples and engine.global_rank == 0:
        text = text_sample(engine.module, tokenizer, engine.device)
        log.record(step=step, sample=text)
        print0(f"step {step:4d} | sample {text!r}")
    if saves:
        save(engine, args, step)
    return evaluates or samples or saves


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    config = read_config(args.deepspeed_config, needs=["train_micro_batch_size_per_gpu"])
    preset = get_preset(args.model)
    plan_run(config, args, preset.block_size, int(os.environ["WORLD_SIZE"]))
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_gpt(args.model, len(tokenizer))

    engine, _, _, scheduler = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=config)
    if engine.zero_optimization_stage() == 3:
        raise UserError(f"zero stage 3 in {args.deepspeed_config}: samples need whole weights, take stage 0, 1 or 2")
    if args.fast == "yes" or args.fast == "auto" and engine.device.type != "cpu":
        speed_up(engine, model)
    print_proof(engine, scheduler, args.steps)
    accumulation = engine.gradient_accumulation_steps()
    done = resume(engine, args)  # steps that an interrupted run has behind it; 0 without --resume
    batches = batches_from(loader_for(engine, train_blocks, args.seed), done * accumulation)

    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    usage = UsageMeter(log, model.flops_per_token(preset.block_size), engine.device)
    log.record(
        num_params=model.num_params, flops_per_token=usage.flops, peak_flops=usage.peak, ranks=engine.dp_world_size
    )
    if not done:
        log.held_out(0, evaluate(engine, held_out_blocks))
    for step in range(done + 1, args.steps + 1):
        local_loss = 0.0
        for _ in range(accumulation):
            with usage.waiting_for_data():
                batch = to_device(next(batches), engine.device)
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        tokens = accumulation * batch["input_ids"].numel()
        used = usage.row(tokens, local_loss) if step == 1 or step % args.log_every == 0 else {}
        log.step(step, local_loss, tokens=tokens, lr=engine.get_lr()[0], **used)
        if look_around(engine, tokenizer, held_out_blocks, step, log, args) or step == done + 1:
            usage.restart()  # their time, and the compiler's in the first step, is no training
    print0(usage.summary())
    log.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
