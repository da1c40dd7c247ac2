"""Day 19: compilers - torch.compile and DeepCompile under the profiler: fewer kernels, and what the first steps cost.

From the repository root. DeepCompile needs GPUs, torch.compile on a CPU a C++ compiler:

    deepspeed --num_accelerators 2 day19/labs/compilers.py --cases eager compiled
    deepspeed --num_accelerators 2 day19/labs/compilers.py --hidden 2048 --layers 4 --tokens 2048 --micro_batch 4 \
        --cases eager compiled eager_zero3 deepcompile

Expect a row a case: seconds of the first step, the steps that were compiled again, milliseconds of the others, and from
a trace the operations per step, idle time and hidden communication. Then compilers.json and a trace a row.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/docs/config-json/; arXiv:2504.09983 (DeepCompile)
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.timing import time_step
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir
from day19.traces import record_steps, shared_folder, summarize

CASES = {  # ZeRO stage, torch.compile, DeepCompile
    "eager": (1, False, False),
    "compiled": (1, True, False),
    "eager_zero3": (3, False, False),
    "deepcompile": (3, True, True),
}
VOCABULARY, HEAD = 4096, 64
COLUMNS = {
    "first s": "first_s:.1f", "again": "again:", "step ms": "ms:,.1f", "operations": "operations:,.0f",
    "idle": "idle:.0%", "comm ms": "comm_ms:.1f", "hidden": "hidden:.0%", "loss": "losses.-1:.4f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["eager", "compiled"], help="in this order")
    parser.add_argument("--hidden", type=int, default=128, help="width of the Llama")
    parser.add_argument("--layers", type=int, default=2, help="its layers")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--micro_batch", type=int, default=2, help="sequences a rank and micro-batch")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day19"), help="folder for compilers.json and the traces")
    return parser.parse_args()


def build(case: str, args: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """Return train_step() -> loss of a Llama with random weights, always on the same batch."""
    stage, compiled, deep = CASES[case]
    torch.manual_seed(args.seed)
    heads = args.hidden // HEAD
    shape = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_hidden_layers": args.layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": args.tokens}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **shape))
    config = {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "torch_adam": True, "fused": True}},
        "bf16": {"enabled": get_accelerator().device_name() != "cpu"},
        "zero_optimization": {"stage": stage},
        "compile": {"deepcompile": deep},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    if compiled:
        sys.setrecursionlimit(20_000)  # a deep model's graph ends in RecursionError at Python's 1,000
        engine.compile()
    ids = torch.randint(VOCABULARY, (args.micro_batch, args.tokens), device=engine.device)

    def train_step() -> torch.Tensor:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return train_step


def measure(case: str, args: argparse.Namespace) -> dict:
    """Train, then record two steps."""
    torch.compiler.reset()
    train_step = build(case, args)
    runs = [time_step(train_step) for _ in range(args.steps)]
    seconds = [second for second, _ in runs]
    usual = median(seconds[1:])
    again = [str(step) for step, second in enumerate(seconds[1:], start=2) if second > max(0.5, 5 * usual)]
    trace = record_steps(train_step, args.run_dir / f"compilers_{case}_rank{dist.get_rank()}.json.gz", steps=2)
    page = summarize(trace)
    row = {"seconds": seconds, "first_s": seconds[0], "ms": 1e3 * usual, "again": " ".join(again) or "-"}
    row |= {"losses": [loss.item() for _, loss in runs], "idle": page["idle_ms"] / page["step_ms"]}
    return row | {key: page[key] for key in ("operations", "comm_ms", "hidden", "kinds_ms", "longest_ms", "verdict")}


def refuse_what_cannot_run(args: argparse.Namespace) -> None:
    if args.hidden % HEAD or min(args.hidden, args.layers, args.tokens, args.micro_batch) < 1 or args.steps < 3:
        sizes = f"--hidden {args.hidden} --layers {args.layers} --tokens {args.tokens} --micro_batch {args.micro_batch}"
        raise UserError(f"{sizes} --steps {args.steps}: hidden a multiple of {HEAD}, 3 steps or more")
    if get_accelerator().device_name() != "cpu":
        return
    if "deepcompile" in args.cases:
        raise UserError("--cases deepcompile: DeepCompile needs CUDA (deepspeed 0.19.8), this is a CPU: leave it out")
    if "compiled" in args.cases and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("--cases compiled: torch.compile needs a C++ compiler on a CPU: apt-get install g++")


def main() -> None:
    args = parse_args()
    refuse_what_cannot_run(args)
    device = join_world()
    args.run_dir = shared_folder(args.run_dir)
    table = Table(args.run_dir / "compilers.json", COLUMNS, ranks=dist.get_world_size())
    for case in args.cases:
        kept = live_tensors(device)
        with table.row(case) as row:
            row |= measure(case, args)
        free(device, kept)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
