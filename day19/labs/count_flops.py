"""Day 19: count FLOPs - DeepSpeed's profiler and PyTorch's counter against the count on paper, and what deceives them.

From the repository root, one process, no launcher, on a CPU or a GPU:

    python day19/labs/count_flops.py
    python day19/labs/count_flops.py --model gpt2 --micro_batch 4

Expect a row a counter: operations, and their ratio to the forward pass on paper. 1 is a forward pass, 3 a step, 4 a
step that computes the forward pass twice. Then flops.json.
Checked with deepspeed 0.19.8. Source: deepspeed/profiling/flops_profiler/profiler.py; torch/utils/flop_counter.py
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.profiling.flops_profiler import FlopsProfiler
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.run_log import default_run_dir
from day19.flops import forward_flops

VOCABULARY = 4096


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro_batch", type=int, default=2, help="sequences a rank and micro-batch")
    parser.add_argument("--run_dir", default=default_run_dir("day19"), help="folder for flops.json")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    parser.add_argument("--no_compile", action="store_true", help="leave out the compiled forward pass")
    return parser.parse_args()


def with_deepspeed(model: GPT2LMHeadModel, run: Callable[[], torch.Tensor], backward: bool = False) -> int:
    """What DeepSpeed's profiler counts while `run` goes forward, and backward as well if it is left on."""
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    loss = run()
    if backward:
        loss.backward()
    counted = profiler.get_total_flops()
    profiler.stop_profile()
    profiler.end_profile()
    return counted


def with_torch(run: Callable[[], torch.Tensor], backward: bool = False) -> int:
    """What PyTorch's own counter sees: it stands below autograd, so backward passes are operations like others."""
    with FlopCounterMode(display=False) as counter:
        loss = run()
        if backward:
            loss.backward()
    return counter.get_total_flops()


def main() -> None:
    args = parse_args()
    if args.micro_batch < 1:
        raise UserError(f"--micro_batch {args.micro_batch}: at least one sequence")
    preset = get_preset(args.model)
    device = torch.device(get_accelerator().current_device_name())
    torch.manual_seed(0)
    model = build_model(args.model, VOCABULARY).to(device)
    ids = torch.randint(VOCABULARY, (args.micro_batch, preset.block_size), device=device)
    parts = forward_flops(preset, VOCABULARY, args.micro_batch)
    on_paper = sum(parts.values())

    def run() -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    columns = {"GFLOP": "gflop:,.3f", "of the forward pass": "ratio:.4f"}
    table = Table(Path(args.run_dir) / "flops.json", columns, width=44, parts=parts, model=args.model)

    def add(case: str, counted: int) -> None:
        table.add({"case": case, "flops": counted, "gflop": counted / 1e9, "ratio": counted / on_paper})

    add("on paper", on_paper)
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        add(f"DeepSpeed, {attention} attention", with_deepspeed(model, run))
    if not args.no_compile:
        compiled = torch.compile(model, backend="eager")  # the graph is taken, and run as it is: no compiler needed
        add("DeepSpeed, torch.compile", with_deepspeed(model, lambda: compiled(input_ids=ids, labels=ids).loss))
        torch.compiler.reset()
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        add(f"PyTorch, {attention} attention", with_torch(run))
    add("PyTorch, with backward", with_torch(run, backward=True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    add("recomputing: DeepSpeed", with_deepspeed(model, run))
    add("recomputing: DeepSpeed, left on in backward", with_deepspeed(model, run, backward=True))
    add("recomputing: PyTorch, with backward", with_torch(run, backward=True))
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
