"""Day 19: profiling - a training run under its tools, the cheapest first: tokens/s, MFU, FLOPs, and a trace read.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day19/train.py
    deepspeed --num_accelerators 2 day19/train.py --deepspeed_config day19/ds_config_flops.json --steps 10

Expect training, then what the tools say: the profiler's FLOPs beside the count on paper, MFU against what this machine
does in a large product, and from a trace of three steps where the time went. The trace and the flops profiler's tree
lie in the run folder. The second config has DeepSpeed's own keys: its timers in each step, and its profiler in one.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/tutorials/flops-profiler/
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.profiling.flops_profiler import FlopsProfiler
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from common.cpu import start_without_compiler
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir, median_speed, read_rows, show_path
from day19.flops import forward_flops, product_flops, utilisation
from day19.traces import read_trace, shared_folder, summarize, suspects

FLOPS_STEP = 3  # the one in which FLOPs are counted
WAIT, WARM_UP, RECORDED = 5, 2, 3  # steps: not looked at, profiler on but nothing kept, kept


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=10, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day19"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def report(args: argparse.Namespace, trace_path: Path, on_paper: int, peak: float, tokens: int, ranks: int) -> None:
    """What speed and trace say, on rank 0; `on_paper`: FLOPs of a rank's forward pass of `tokens` tokens."""
    step_s = tokens * ranks / median_speed(read_rows(args.run_dir))
    mfu = utilisation(on_paper, step_s, peak)
    print0(f"MFU {mfu:.1%} of {peak / 1e9:,.0f} GFLOP/s, what one rank reaches in a large product")
    trace = read_trace(trace_path)
    page = summarize(trace)
    hidden = "no messages" if page["hidden"] is None else f"{page['hidden']:.0%} hidden"
    spent = f"compute {page['compute_ms']:.1f}, communication {page['comm_ms']:.1f} ({hidden})"
    print0(f"trace of {page['steps']} steps: {page['step_ms']:.1f} ms per step | {spent}, idle {page['idle_ms']:.1f}")
    print0("longest: " + " | ".join(f"{name} {ms:.1f}" for name, ms in list(page["longest_ms"].items())[:4]))
    print0(page["verdict"])
    for name, said in suspects(trace).items():
        print0(f"suspect: {name}: {said}")
    print0(f"trace: {show_path(trace_path)}")


def main() -> None:
    args = parse_args()
    if args.steps < WAIT + WARM_UP + RECORDED:
        raise UserError(f"--steps {args.steps}: the profiler records steps 8 to 10, so at least 10")
    require_launcher()
    start_without_compiler()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=args.deepspeed_config
    )
    if engine.gradient_accumulation_steps() != 1:
        raise UserError(f"{args.deepspeed_config} accumulates: this day reads steps of one micro-batch each")
    by_json, breakdown = engine.flops_profiler_enabled(), engine.wall_clock_breakdown()
    print0(f"zero stage {engine.zero_optimization_stage()} | flops profiler by JSON {by_json} | breakdown {breakdown}")
    micro_batch, rank = engine.train_micro_batch_size_per_gpu(), engine.global_rank
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(train_blocks, batch_size=micro_batch, sampler=sampler, drop_last=True)
    on_paper = sum(forward_flops(preset, len(tokenizer), micro_batch).values())
    on_cpu = engine.device.type == "cpu"
    peak = product_flops(engine.device, next(model.parameters()).dtype, 1024 if on_cpu else 8192)

    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    log.held_out(0, held_out_loss(engine, held_out_blocks, engine.device, max_blocks=64))
    batches = endless_batches(loader)
    trace_path = shared_folder(args.run_dir) / f"trace_rank{rank}.json.gz"  # every rank its own
    with profile(
        activities=[ProfilerActivity.CPU] if on_cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA],
        schedule=schedule(wait=WAIT, warmup=WARM_UP, active=RECORDED, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(trace_path)),
        record_shapes=on_cpu,  # gloo's messages have their size from it; NCCL's have it anyway
    ) as profiler:
        for step in range(1, args.steps + 1):
            with record_function("fetch the batch"):  # a label of your own, in the trace like any operation
                batch = to_device(next(batches), engine.device)
            if counts := step == FLOPS_STEP and rank == 0 and not by_json:
                flops_profiler = FlopsProfiler(engine.module, engine)
                flops_profiler.start_profile()  # every module and function is wrapped until end_profile()
            loss = engine(**batch).loss
            if counts:
                counted = flops_profiler.get_total_flops()
                flops_profiler.stop_profile()  # before backward: recomputation is not the model's work
                flops_profiler.print_model_profile(step, output_file=str(Path(args.run_dir) / "flops_profile.txt"))
                flops_profiler.end_profile()
                share = f"{on_paper / 1e6:,.1f} on paper ({counted / on_paper:.4f})"
                print0(f"forward pass of step {step}: {counted / 1e6:,.1f} MFLOP counted, {share}")
            engine.backward(loss)
            engine.step()
            profiler.step()  # tells the schedule that a step is over
            log.step(step, loss.detach(), tokens=micro_batch * preset.block_size)
    log.held_out(args.steps, held_out_loss(engine, held_out_blocks, engine.device, max_blocks=64))
    if rank == 0:
        report(args, trace_path, on_paper, peak, micro_batch * preset.block_size, engine.dp_world_size)
    log.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
