"""Day 12: GPT-2-scale training - pretraining with all that a long run needs, and how well it uses the hardware.

From the repository root, on two CPU processes or any number of GPUs:

    deepspeed --num_accelerators 2 day12/train.py
    deepspeed --num_accelerators 2 day12/train.py --resume runs/day12/20261125-120000
    deepspeed --num_accelerators 1 day12/train.py --model gpt2 --deepspeed_config day12/ds_config_gpt2.json --steps 400

Expect the held-out loss to fall, text samples to become readable, checkpoints in the run folder, and a last line on
resource use. `--resume RUN_DIR` continues an interrupted run as if nothing had happened.
Checked with deepspeed 0.19.8. Source: Radford et al. 2019 (GPT-2); https://github.com/karpathy/nanoGPT, train.py
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import deepspeed
import hjson
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from common.cpu import start_without_compiler
from common.data import held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir, show_path
from day12.gpt import GPT, build_gpt, parameter_groups, to_transformers
from day12.resources import peak_flops, summary, utilisation_meter


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (not micro-batches)")
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
    parser.add_argument(
        "--fast", choices=["auto", "yes", "no"], default="auto", help="compile, fuse the loss; auto: on accelerators"
    )
    return parser.parse_args()


def read_config(path: str, num_steps: int) -> dict:
    """The config, with its schedule stretched over `num_steps`: the warm-up keeps its share of the run."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path!r}: look at the path after --deepspeed_config")
    config = hjson.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=dict)
    schedule = config.get("scheduler", {}).get("params", {})
    if "total_num_steps" in schedule:
        share = schedule.get("warmup_num_steps", 0) / schedule["total_num_steps"]
        schedule |= {"total_num_steps": num_steps, "warmup_num_steps": max(1, round(share * num_steps))}
    return config


def batches_from(loader: DataLoader, position: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches for ever, as common/data.py's `endless_batches`, but from micro-batch number `position` on."""
    if not len(loader):
        raise UserError(f"{len(loader.sampler)} blocks a rank do not fill one micro-batch of {loader.batch_size}")
    epoch, skip = divmod(position, len(loader))
    while True:
        loader.sampler.set_epoch(epoch)
        yield from islice(loader, skip, None)
        epoch, skip = epoch + 1, 0


def save(engine: deepspeed.DeepSpeedEngine, run_dir: str, step: int) -> None:
    """Save weights, optimizer, schedule, and each rank's random state: client_state is rank 0's alone. Collective."""
    states = [None] * engine.dp_world_size
    torch.distributed.all_gather_object(states, (torch.get_rng_state(), get_accelerator().get_rng_state()))
    engine.save_checkpoint(f"{run_dir}/checkpoints", tag=f"step{step}", client_state={"step": step, "random": states})
    print0(f"step {step:4d} | checkpoint {show_path(run_dir)}/checkpoints/step{step}")


def load(engine: deepspeed.DeepSpeedEngine, run_dir: str) -> int:
    """Load what `save` saved and return its step. Collective."""
    path, client_state = engine.load_checkpoint(f"{run_dir}/checkpoints")
    if path is None:  # DeepSpeed only warns
        raise UserError(f"--resume {run_dir}: no checkpoint in {run_dir}/checkpoints")
    cpu_state, device_state = client_state["random"][engine.global_rank]
    torch.set_rng_state(cpu_state)
    get_accelerator().set_rng_state(device_state)
    return client_state["step"]


def check_resume(args: argparse.Namespace, settings: dict) -> None:
    """Stop when the run to continue was made with other settings, or would lose its log."""
    old_run = Path(args.resume)
    if not (old_run / "settings.json").exists():
        raise UserError(f"--resume {args.resume}: no settings.json there; name the run folder of a day12/train.py")
    if old_run.resolve() == Path(args.run_dir).resolve():
        raise UserError(f"--resume and --run_dir are both {args.resume}: its log would be overwritten; name another")
    for name, value in json.loads((old_run / "settings.json").read_text()).items():
        if settings[name] != value:
            raise UserError(f"--resume {args.resume}: that run had {name} {value}, this one has {settings[name]}")


def text_sample(model: GPT, tokenizer, device: torch.device) -> str:
    """What the model makes of "The" by now. One rank is enough, with weights that are whole (stages 0 to 2)."""
    writer = to_transformers(model, tokenizer.eos_token_id).to(device)
    prompt = tokenizer("The", return_tensors="pt").to(device)
    ids = writer.generate(**prompt, max_new_tokens=40, do_sample=True, top_k=50, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0])


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    for name in ("steps", "log_every", "eval_every", "sample_every", "save_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: take 1 or more; a large number means at the end alone")
    config = read_config(args.deepspeed_config, args.steps)
    clips_here = config.get("zero_optimization", {}).get("stage", 0) == 0  # at ZeRO-0 gradients are ordinary `.grad`s:
    max_norm = config.get("gradient_clipping", 1.0)  # PyTorch clips them in few kernels, DeepSpeed in one a parameter
    if clips_here:
        config["gradient_clipping"] = 0.0
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_gpt(args.model, len(tokenizer))

    engine, _, _, scheduler = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=config)
    if engine.zero_optimization_stage() == 3:
        raise UserError(f"zero stage 3 in {args.deepspeed_config}: samples need whole weights, take stage 0, 1 or 2")
    device, accumulation = engine.device, engine.gradient_accumulation_steps()
    fast = device.type != "cpu" if args.fast == "auto" else args.fast == "yes"
    model.fused_loss, model.narrow_stream = fast and device.type == "cuda", fast  # loss.py's kernel; gpt.py
    if model.fused_loss:  # a CUDA device: cuDNN's attention beats FlashAttention 2 on Hopper (speed.py)
        torch.backends.cuda.enable_flash_sdp(False)
    # One rank has nobody to average with; ZeRO-0 would still flatten all gradients and copy them back.
    maybe_average = engine.no_sync if clips_here and engine.dp_world_size == 1 else nullcontext
    if fast:
        engine.compile()  # torch.compile on the module; the engine's own hooks stay outside
    forward = engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else "off"
    print0(f"zero stage {engine.zero_optimization_stage()} | autocast {forward} | compiled {engine.is_compiled}")
    for group in engine.optimizer.param_groups:
        numbers = f"{sum(parameter.numel() for parameter in group['params']):,} parameters on rank 0"
        print0(f"{type(engine.basic_optimizer).__name__}: weight decay {group['weight_decay']} for {numbers}")
    micro_batch = engine.train_micro_batch_size_per_gpu()
    batch_size = f"{micro_batch} micro x {accumulation} accumulation x {engine.dp_world_size} ranks"
    schedule = f"schedule {type(scheduler).__name__}, {args.steps} steps"
    print0(f"batch {engine.train_batch_size()} = {batch_size} | {schedule} | {device.type}")

    first_step, settings = 1, {"model": args.model, "corpus": args.corpus, "seed": args.seed, "batch": batch_size}
    if args.resume:
        check_resume(args, settings)
        first_step = load(engine, args.resume) + 1
        print0(f"resumed {show_path(args.resume)} after step {first_step - 1}")
        if first_step > args.steps:
            raise UserError(f"--resume {args.resume}: that run has {first_step - 1} steps; --steps must be more")
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(
        train_blocks, batch_size=micro_batch, sampler=sampler, drop_last=True, pin_memory=device.type != "cpu",
        generator=torch.Generator(),  # or each epoch draws from the global one, and a resumed run draws once more
    )  # fmt: skip
    batches = batches_from(loader, (first_step - 1) * accumulation)

    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    if engine.global_rank == 0:
        (Path(args.run_dir) / "settings.json").write_text(json.dumps(settings))
    flops, peak = model.flops_per_token(preset.block_size), peak_flops(device)
    log.record(num_params=model.num_params, flops_per_token=flops, peak_flops=peak, ranks=engine.dp_world_size)
    gpu_utilisation, why_not = utilisation_meter(device)
    # Evaluation has other shapes: compiled as well, it would make the compiler give up fixed ones for training.
    eager = (lambda: torch.compiler.set_stance("force_eager")) if fast else nullcontext
    if not args.resume:
        with eager():
            log.held_out(0, held_out_loss(engine, held_out_blocks, device))
    data_s, usage = 0.0, []
    for step in range(first_step, args.steps + 1):
        local_loss = 0.0
        for _ in range(accumulation):
            waiting = time.perf_counter()
            batch = to_device(next(batches), device)
            data_s += time.perf_counter() - waiting
            with maybe_average():
                loss = engine(**batch).loss
                engine.backward(loss)
            if clips_here and max_norm and engine.is_gradient_accumulation_boundary():
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            engine.step()
            local_loss += loss.detach() / accumulation
        tokens, more = accumulation * batch["input_ids"].numel(), {}
        if step == 1 or step % args.log_every == 0:
            local_loss = float(local_loss)  # waits for the device
            seconds = time.perf_counter() - log.since
            mfu = peak and (log.tokens + tokens) / seconds * flops / peak  # this rank's tokens, this rank's device
            busy = gpu_utilisation and gpu_utilisation()
            more = {"mfu": mfu, "data_share": data_s / seconds, "gpu_utilisation": busy}
            usage.append(more)
            data_s = 0.0
        log.step(step, local_loss, tokens=tokens, lr=engine.get_lr()[0], **more)

        every = (args.eval_every, args.sample_every, args.save_every)
        evaluates, samples, saves = (step % steps == 0 or step == args.steps for steps in every)
        if evaluates:
            with eager():
                log.held_out(step, held_out_loss(engine, held_out_blocks, device))
        if samples and engine.global_rank == 0:
            text = text_sample(model, tokenizer, device)
            log.record(step=step, sample=text)
            print0(f"step {step:4d} | sample {text!r}")
        if saves:
            save(engine, args.run_dir, step)
        if evaluates or samples or saves or step == first_step:  # their time, and the compiler's, is no training
            get_accelerator().synchronize()
            log.tokens, log.since, data_s = 0, time.perf_counter(), 0.0
    if usage:  # a resumed run may be too short for a log line
        print0(summary(usage, why_not))
    log.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
