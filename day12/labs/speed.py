"""Day 12: from 137k to 534k tokens/s - GPT-2 124M under DeepSpeed, change by change, beside plain PyTorch.

From the repository root, on one GPU (on one CPU process it runs with what a CPU can do; its figures mean nothing):

    deepspeed --num_accelerators 1 day12/labs/speed.py --model gpt2 --batch_size 32
    deepspeed --num_accelerators 1 day12/labs/speed.py --steps 6 --window 2 --cases hf lean torch
    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    deepspeed --num_accelerators 1 day12/labs/speed.py --model gpt2 --batch_size 32 --turns 21 --nanogpt ../nanoGPT

Expect a table: tokens/s, MFU, peak memory and the loss, a rung a line; then the last rung and PyTorch's loop take turns
for a fair ratio, with the largest difference of their losses. Each rung keeps the changes of those before it. nanoGPT,
where you have a clone of it, is measured in the same run.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py (_take_model_step, allreduce_gradients).
"""

import argparse
import gc
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.nn.functional import pad
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, DistributedSampler
from transformers.modeling_outputs import CausalLMOutput

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.cpu import start_without_compiler
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import Preset, build_model, get_preset
from common.plots import plot_bars
from common.ranks import print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path
from day12.gpt import GPT, build_gpt, parameter_groups
from day12.resources import peak_flops
from day12.torch_loop import ADAMW, build_torch

# What each rung changes.
RUNGS = {
    "hf": {},  # transformers' GPT-2
    "hf_compiled": {"compiled": True},  # engine.compile()
    "lean": {"lean": True},  # gpt.py: no biases, padded vocabulary
    "cudnn": {"cudnn": True},  # cuDNN's attention instead of FlashAttention 2
    "fused_loss": {"fused_loss": True},  # loss.py
    "narrow_stream": {"narrow_stream": True},  # the stream between blocks in 16 bits
    "no_timer": {"no_timer": True},  # DeepSpeed's throughput timer waits for the GPU in each step
    "foreach_clip": {"foreach_clip": True},  # PyTorch's clipping; DeepSpeed's is a kernel a parameter, and waits
    "no_average": {"no_average": True},  # one rank has nobody to average gradients with
}
# PyTorch's loop, and the rung whose model it trains (of nanoGPT's own model, the rung whose attention it takes).
BASELINES = {"torch_hf": "hf_compiled", "torch": "narrow_stream", "nanogpt": "cudnn"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [*RUNGS, "torch_hf", "torch"]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, help="what to train, in this order")
    parser.add_argument("--profile", nargs="*", choices=cases, default=[], help="cases to look into for one more step")
    parser.add_argument(
        "--turns", type=int, default=0, help="windows that the last rung and PyTorch's loop take by turns"
    )
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a clone of nanoGPT, to measure its model as well")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences a rank and optimizer step")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (not micro-batches)")
    parser.add_argument("--window", type=int, default=10, help="steps between two looks at the clock")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day12"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def changes_of(case: str) -> dict:
    """All changes up to the rung `case`."""
    changes = {}
    for name, change in RUNGS.items():
        changes |= change
        if name == case:
            return changes


class NanoGPT(torch.nn.Module):
    """The model.py of a clone of nanoGPT, called like the others. PyTorch's loop is what its train.py does."""

    def __init__(self, folder: str, preset: Preset, vocab_size: int) -> None:
        super().__init__()
        sys.path.append(folder)
        from model import GPT as Model
        from model import GPTConfig

        shape = {"n_layer": preset.num_layers, "n_head": preset.num_heads, "n_embd": preset.hidden}
        padded = math.ceil(vocab_size / 64) * 64  # as its config has it
        self.model = Model(GPTConfig(block_size=preset.block_size, vocab_size=padded, dropout=0.0, bias=False, **shape))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        _, loss = self.model(input_ids, pad(labels[:, 1:], (0, 1), value=-1))  # it wants them shifted; -1: no target
        return CausalLMOutput(loss=loss)


def build(case: str, vocab_size: int, args: argparse.Namespace, device: torch.device):
    """Return (train_step(batch) -> loss, the model) of a case."""
    on_cuda = device.type == "cuda"
    on = changes_of(BASELINES.get(case, case))
    torch.manual_seed(args.seed)
    with device:
        if case == "nanogpt":
            model = NanoGPT(args.nanogpt, get_preset(args.model), vocab_size)
        else:
            model = build_gpt(args.model, vocab_size) if "lean" in on else build_model(args.model, vocab_size)
    model.fused_loss, model.narrow_stream = "fused_loss" in on and on_cuda, "narrow_stream" in on
    if on_cuda:  # which attention kernel the compiler, or eager mode, may choose
        torch.backends.cuda.enable_flash_sdp("cudnn" not in on)
        torch.backends.cuda.enable_cudnn_sdp("cudnn" in on)
    torch.compiler.reset()
    compiled = "compiled" in on and on_cuda  # on CPU no compiler is promised
    if case in BASELINES:
        return build_torch(model, compiled), model
    config = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_clipping": 0.0 if "foreach_clip" in on else 1.0,
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True, "fused": True}},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "timers": {"throughput": {"enabled": "no_timer" not in on}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=config)
    if compiled:
        engine.compile()
    alone = "no_average" in on and engine.dp_world_size == 1

    def train_step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with engine.no_sync() if alone else nullcontext():
            loss = engine(**batch).loss
            engine.backward(loss)
        if "foreach_clip" in on:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        engine.step()
        return loss.detach()

    return train_step, model


def train(train_step, batches, num_steps: int, window: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Return (losses, seconds a step of each window). Between two looks at the clock the host need not wait."""
    losses, seconds = [], []
    for _ in range(num_steps // window):
        get_accelerator().synchronize()
        start = time.perf_counter()
        losses += [train_step(to_device(next(batches), device)) for _ in range(window)]
        get_accelerator().synchronize()
        seconds.append((time.perf_counter() - start) / window)
    return [loss.item() for loss in losses], seconds


KINDS = {  # of GPU work, by words in the kernels' names
    "attention": ("flash", "cudnn", "sdpa", "fmha", "attention"), "loss": ("loss_and_gradient", "log_softmax", "nll"),
    "products": ("gemm", "cutlass", "nvjet", "sm90_xmma", "cublas"), "optimizer": ("adam", "multi_tensor", "lpnorm"),
    "averaging": ("nccl",),
}  # fmt: skip


def look_into_a_step(train_step, batch: dict, path: Path) -> dict[str, float]:
    """Milliseconds of GPU work in one step by kind, and of idling, from a trace."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(3):  # the middle of three: the host runs ahead as it does in training
            train_step(batch)
        get_accelerator().synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
    events = [
        e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    spent, longest = dict.fromkeys([*KINDS, "other"], 0.0), {}
    for event in events:
        name = event["name"].lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
        spent[kind] += event["dur"] / 3e3
        longest[event["name"][:70]] = longest.get(event["name"][:70], 0.0) + event["dur"] / 3e3
    span = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    spent["idle"] = span / 3e3 - sum(spent.values())
    return spent | {"longest": dict(sorted(longest.items(), key=lambda item: -item[1])[:16])}


def main() -> None:
    args = parse_args()
    require_launcher()
    if args.window < 1 or args.steps < 2 * args.window:
        raise UserError(
            f"--steps {args.steps} --window {args.window}: take two windows or more, the first does not count"
        )
    if args.nanogpt and not Path(args.nanogpt, "model.py").exists():
        raise UserError(f"--nanogpt {args.nanogpt}: no model.py there; git clone https://github.com/karpathy/nanoGPT")
    if args.turns == 1:
        raise UserError("--turns 1: take 2 or more, the first does not count")
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    device = torch.device(get_accelerator().current_device_name())
    if args.profile and device.type == "cpu":
        raise UserError(
            f"--profile {' '.join(args.profile)} shows what a GPU does in a step: this is a CPU, leave it out"
        )
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    with torch.device("meta"):
        flops = GPT(preset, len(tokenizer)).flops_per_token(preset.block_size)
    peak = peak_flops(device)
    tokens = args.batch_size * preset.block_size

    def new_batches():
        sampler = DistributedSampler(blocks, seed=args.seed)  # each rank its own blocks
        return endless_batches(DataLoader(blocks, args.batch_size, sampler=sampler, drop_last=True))

    def speed_of(seconds: list[float]) -> dict:
        rate = tokens / median(seconds)  # of one rank
        return {"tokens_per_s": rate, "mfu": rate * flops / peak if peak else None}

    table, nanogpt = [], ["nanogpt"] if args.nanogpt else []
    print0(f"{'case':16}{'tok/s/rank':>12}{'MFU':>8}{'peak GiB':>10}{'last loss':>11}")
    for case in [*args.cases, *nanogpt]:
        get_accelerator().reset_peak_memory_stats()
        train_step, model = build(case, len(tokenizer), args, device)
        batches = new_batches()
        losses, seconds = train(train_step, batches, args.steps, args.window, device)
        row = {"case": case, **speed_of(seconds[1:]), "losses": losses, "window_s": seconds}
        row["peak_gib"] = get_accelerator().max_memory_allocated() / 2**30
        if case in args.profile:
            row["gpu_ms"] = look_into_a_step(
                train_step, to_device(next(batches), device), Path(args.run_dir) / f"{case}.json"
            )
        table.append(row)
        mfu = f"{row['mfu']:8.1%}" if peak else f"{'-':>8}"
        print0(f"{case:16}{row['tokens_per_s']:12,.0f}{mfu}{row['peak_gib']:10.2f}{losses[-1]:11.4f}")
        if "gpu_ms" in row:
            print0(
                "    ms: " + " | ".join(f"{kind} {ms:.2f}" for kind, ms in row["gpu_ms"].items() if kind != "longest")
            )
            print0("\n".join(f"    {ms:7.2f} {name}" for name, ms in row["gpu_ms"]["longest"].items()))
        if dist.get_rank() == 0:
            write_results(Path(args.run_dir) / "speed.json", this_command(), flops_per_token=flops, table=table)
        del train_step, model, batches
        gc.collect()
        get_accelerator().empty_cache()

    if args.turns:
        steps = {case: build(case, len(tokenizer), args, device)[0] for case in ("torch", "no_average", *nanogpt)}
        data, losses, seconds = {case: new_batches() for case in steps}, {c: [] for c in steps}, {c: [] for c in steps}
        for turn in range(args.turns):
            for case, train_step in steps.items():
                new_losses, times = train(train_step, data[case], args.window, args.window, device)
                losses[case] += new_losses
                seconds[case] += times if turn else []
        pair = {case: speed_of(seconds[case]) | {"losses": losses[case], "window_s": seconds[case]} for case in steps}
        ratios = {
            other: median(a / b for a, b in zip(seconds[other], seconds["no_average"], strict=True))
            for other in ("torch", *nanogpt)
        }
        apart = max(abs(a - b) for a, b in zip(losses["torch"], losses["no_average"], strict=True))
        for case in steps:
            print0(f"{case:16}{pair[case]['tokens_per_s']:12,.0f} tok/s, last loss {losses[case][-1]:.4f}")
        print0(
            f"DeepSpeed / PyTorch, by turns: {ratios['torch']:.4f} | losses at most {apart:.4f} apart"
            f" over {len(losses['torch'])} steps"
        )
        pair |= {"ratio": ratios["torch"], "losses_apart": apart}
        if nanogpt:
            pair["ratio_nanogpt"] = ratios["nanogpt"]
            print0(f"DeepSpeed / nanoGPT, by turns: {ratios['nanogpt']:.4f}")
        if dist.get_rank() == 0:
            write_results(
                Path(args.run_dir) / "speed.json", this_command(), flops_per_token=flops, table=table, turns=pair
            )
    if dist.get_rank() == 0:
        speed = {row["case"]: row["tokens_per_s"] for row in table}
        plot_bars(
            speed, Path(args.run_dir) / "speed.png", f"{args.model}, {args.batch_size} sequences a rank", "tokens/s"
        )
        print0(f"table: {show_path(args.run_dir)}/speed.json | plot: speed.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
