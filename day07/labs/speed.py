"""Day 07: how fast is ZeRO-3 - beside FSDP2 and ZeRO-2, with DeepSpeed's defaults, leaf modules, and tuned alike.

From the repository root; the second on two GPUs of 140 GB, five minutes or so:

    deepspeed --num_accelerators 2 day07/labs/speed.py --cases fsdp2 zero2 leaf --llama tiny --steps 4 --window 2
    deepspeed --num_accelerators 2 day07/labs/speed.py --model gpt2-xl --micro_batch 8 24 --llama 8b

Expect a row a case and size: tokens/s a rank, ratio to the first case, memory, loss; with --profile, where a step's
time went. GPT-2s are in memory at once and take turns (seven of GPT-2 XL need 110 GB); Llamas come one by one.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/zero/parameter_offload.py, partitioned_param_coordinator.py.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import slowest_median, take_turns, time_step
from bench.trace import ON_DEVICE, trace_step, union_ms
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.read import read_config
from day07.loops import blocks_of, build_deepspeed, build_fsdp2

LEAF_CLASSES = ["gpt2.modeling_gpt2.GPT2Block", "llama.modeling_llama.LlamaDecoderLayer"]
LEAF = {"leaf_module": {"classes": [f"transformers.models.{name}" for name in LEAF_CLASSES]}}
LIVE = {"stage3_max_live_parameters": 4_000_000_000, "stage3_max_reuse_distance": 4_000_000_000}
BUCKETS = {"reduce_bucket_size": 100_000_000, "stage3_prefetch_bucket_size": 100_000_000}
# Llamas by size: hidden, intermediate, layers, heads, those of k and v; vocabulary, tokens of a sequence, tokenizer.
# 8b is the shape of Llama 3.1 8B; 3b has 8 of its 32 layers, which DeepCompile compiles in minutes.
LLAMAS = {
    "tiny": ((64, 192, 2, 4, 2), 4096, 128, "bpe4096"),
    "3b": ((4096, 14336, 8, 32, 8), 128_256, 4096, "gpt2"),
    "8b": ((4096, 14336, 32, 32, 8), 128_256, 4096, "gpt2"),
}
LLAMA_BATCH = 2  # sequences a rank
# A whole block of a Llama 8B (218M) is fetched while the one before computes, not half of it; compiled code is shared.
AHEAD = {"stage3_prefetch_bucket_size": 250_000_000, "memory_efficient_linear": False}
# case: (what it starts from, what it changes in zero_optimization, and what besides)
RUNGS = {
    "fsdp2": (None, None, ()),
    "fsdp2_compiled": (None, None, ("compiled",)),
    "fsdp2_tuned": (None, None, ("compiled", "reentrant")),
    "zero2": (None, {"stage": 2, "overlap_comm": True}, ()),
    "zero2_compiled": ("zero2", {}, ("compiled",)),
    "zero2_tuned": ("zero2", {}, ("compiled", "reentrant")),
    "defaults": (None, {"stage": 3}, ()),
    "leaf": ("defaults", LEAF, ()),
    "leaf_reentrant": ("leaf", {}, ("reentrant",)),
    "leaf_compiled": ("leaf", {}, ("compiled",)),
    "leaf_copies": ("leaf", {"contiguous_gradients": False}, ()),
    "leaf_buckets": ("leaf", BUCKETS, ()),
    "leaf_live": ("leaf", LIVE, ()),
    "tuned_late": ("leaf", {"contiguous_gradients": False}, ("compiled", "reentrant")),
    "tuned": ("tuned_late", AHEAD, ("compiled", "reentrant")),
    "tuned_live": ("tuned", LIVE, ("compiled", "reentrant")),
    "tuned_fp32_grads": ("tuned", {}, ("compiled", "reentrant", "fp32_grads")),
    "tuned_fp32_norm": ("tuned", {}, ("compiled", "reentrant", "fp32_norm")),
    "deepcompile": ("defaults", {}, ("deepcompile",)),
    "granularity": ("defaults", {"stage3_module_granularity_threshold": 4_000_000}, ()),  # wrong on CUDA: the notes
}
MAIN = ["fsdp2", "fsdp2_tuned", "zero2", "zero2_tuned", "defaults", "leaf", "tuned"]  # those of the page's table
COLUMNS = {
    "model": "model:s", "micro": "micro_batch:d", "tok/s": "tokens_per_s:.0f", "ratio": "ratio:.3f",
    "held GiB": "held_bytes:GiB", "peak GiB": "peak_bytes:GiB", "last loss": "losses.-1:.4f",
}  # fmt: skip
PLAIN_LINEAR, NORM_DTYPE = torch.nn.functional.linear, stage3.get_norm_dtype
PRODUCTS = ("gemm", "nvjet", "cutlass")  # words in the names of kernels that multiply matrices
HOOKS = [f"{when}_sub_module_{way}_function" for when in ("pre", "post") for way in ("forward", "backward")]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=RUNGS, default=MAIN, help="what to train")
    parser.add_argument("--profile", nargs="*", choices=RUNGS, default=[], help="cases to look into for one more step")
    parser.add_argument("--micro_batch", nargs="+", type=int, default=[8], help="sequences a rank; several: one by one")
    parser.add_argument("--llama", choices=LLAMAS, help="after the GPT-2, or alone (--model none): case by case")
    parser.add_argument("--steps", type=int, default=9, help="optimizer steps (not micro-batches)")
    parser.add_argument("--window", type=int, default=3, help="steps that a case takes before the next one's turn")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day07"), help="folder for speed.json, plot and traces")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def zero_options(case: str) -> dict:
    """The `zero_optimization` of a rung: its own changes over those of the rung it starts from."""
    base, changes, _ = RUNGS[case]
    return (zero_options(base) if base else {}) | changes


def rung_config(case: str, micro_batch: int) -> dict:
    """Day 07's config with bf16, and with the `zero_optimization` of `case`: what it does not name has its default."""
    *_, changes = RUNGS[case]
    config = read_config(HERE / "ds_config.json")
    config |= {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": zero_options(case)}
    config["bf16"] = {"enabled": True}
    if "fp32_grads" in changes:  # as FSDP2 keeps them; in bf16 a step has to convert them, twice
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if "deepcompile" in changes:
        config["compile"] = {"deepcompile": True}
    config["optimizer"]["params"]["lr"] = 1e-4
    config["optimizer"]["params"]["fused"] = True  # PyTorch's one-kernel AdamW, as in the baseline: nothing to compile
    return config


@dataclass
class Rung:
    """A case in memory: how it trains, its engine (None: FSDP2), what is known of it, and what its GPU holds of it."""

    train_step: Callable[[dict], torch.Tensor]
    engine: deepspeed.DeepSpeedEngine | None
    facts: dict
    memory: dict[str, int] = field(default_factory=dict)  # held_bytes, peak_bytes; empty on CPUs


def fresh_model(name: str, vocab_size: int) -> torch.nn.Module:
    """A preset of common/model.py, or the Llama `llama-SIZE`, with fresh weights."""
    if not name.startswith("llama-"):
        return build_model(name, vocab_size)
    (hidden, intermediate, layers, heads, kv_heads), vocab_size, tokens, _ = LLAMAS[name.removeprefix("llama-")]
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": tokens}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, use_cache=False, **shape))
    model.loss_type = "ForCausalLM"
    return model


def restore(changes: Collection[str]) -> None:
    """Take back what ZeRO-3 leaves behind in this process, and set the precision in which it takes gradients' norms.

    It puts its own function in the place of `F.linear`, for all models to come (`memory_efficient_linear`, default
    true). Its norm is taken in fp64, and no key changes that: `fp32_norm` shows what that costs. Both hold for
    the process: of cases in memory together the one built last decides for all, so compare these with the Llama.
    """
    torch.nn.functional.linear = PLAIN_LINEAR
    stage3.get_norm_dtype = (lambda: torch.float32) if "fp32_norm" in changes else NORM_DTYPE


def build(case: str, model_name: str, vocab_size: int, args: argparse.Namespace, device: torch.device) -> Rung:
    _, zero, changes = RUNGS[case]
    restore(changes)
    before = get_accelerator().memory_allocated()
    torch.manual_seed(args.seed)
    with device:
        model = fresh_model(model_name, vocab_size)
    model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in changes})
    if "compiled" in changes:  # what runs inside the hooks; all blocks share the code
        # By default eight variants of a function for all cases and micro-batches together; later ones would run eager.
        # (ZeRO-3's own linear function makes a variant a block: `memory_efficient_linear`.)
        torch._dynamo.config.recompile_limit = 64
        # Nobody changes the modules between two steps: checking that in each call would cost the host time.
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        for block in blocks_of(model):
            block.forward = torch.compile(block.forward, options=options)
    facts = {"case": case, "model": model_name, "changes": sorted(changes)}
    if zero is None:
        rung = Rung(build_fsdp2(model, 1e-4, bf16=True)[0], None, facts)
    else:
        rung = Rung(*build_deepspeed(model, rung_config(case, args.micro_batch[0])), facts)
        facts["zero_optimization"] = zero_options(case)
        if "deepcompile" in changes:
            sys.setrecursionlimit(20_000)  # a deep model's graph ends in RecursionError at Python's 1,000
            rung.engine.compile()
        if rung.engine.zero_optimization_stage() == 3:  # leaf modules have no hooks inside
            facts["num_hooks"] = len(rung.engine.optimizer.parameter_offload.forward_hooks)
    if device.type != "cpu":
        rung.memory["held_bytes"] = get_accelerator().memory_allocated() - before
    return rung


def train_window(
    rung: Rung, batches: Iterator[dict], num_steps: int, device: torch.device
) -> list[tuple[float, float]]:
    """Train `num_steps`: (milliseconds, loss) of each. Memory goes into `rung`, without what other cases hold."""
    gpu, steps = get_accelerator(), []
    gpu.reset_peak_memory_stats()
    others = gpu.memory_allocated() - rung.memory.get("held_bytes", 0)
    for _ in range(num_steps):
        batch = to_device(next(batches), device)
        seconds, loss = time_step(partial(rung.train_step, batch))
        steps.append((seconds * 1e3, over_ranks(loss.item(), device)))
    if device.type != "cpu":
        rung.memory["held_bytes"] = gpu.memory_allocated() - others
        rung.memory["peak_bytes"] = gpu.max_memory_allocated() - others
    return steps


def in_the_trace(rung: Rung, batch: dict, path: Path) -> dict[str, float]:
    """Milliseconds of one step on this rank: wall time, and from the trace what GPU and host did of it.

    `gpu_update`: from the end of the last matrix product on: what is left of averaging, then norm, clipping, AdamW.
    """
    wall = []
    events = trace_step(lambda: wall.append(time_step(partial(rung.train_step, batch))[0] * 1e3), path)
    on_gpu = [event for event in events if event.get("cat") in ON_DEVICE]
    calls = [event for event in events if event.get("cat") == "cuda_runtime"]
    ends = [event["ts"] + event["dur"] for event in on_gpu]
    products = [end for end, event in zip(ends, on_gpu, strict=True) if any(word in event["name"] for word in PRODUCTS)]
    return {
        "wall": wall[0],
        "gpu_busy": union_ms(on_gpu),
        "gpu_computing": union_ms(event for event in on_gpu if "nccl" not in event["name"]),
        "gpu_update": (max(ends) - max(products)) / 1e3 if products else 0.0,
        "host_waiting": union_ms(call for call in calls if "Synchronize" in call["name"]),
        "host_launching": union_ms(call for call in calls if "Synchronize" not in call["name"]),
        "kernels": len(on_gpu),
    }


def on_the_host(rung: Rung, batch: dict) -> dict[str, float]:
    """Milliseconds of one step that the host spends in ZeRO-3's hooks, with gradients and in step(); waits included.

    From now on: it puts clocks around DeepSpeed's own functions, and leaves them there.
    """
    spent = {}

    def timed(function, kind):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[kind] = spent.get(kind, 0.0) + (time.perf_counter() - start) * 1e3
            return result

        return wrapper

    optimizer = rung.engine.optimizer
    for name in HOOKS:
        setattr(optimizer.parameter_offload, name, timed(getattr(optimizer.parameter_offload, name), "hooks"))
    reduce_one = optimizer.reduce_ready_partitions_and_remove_grads
    optimizer.reduce_ready_partitions_and_remove_grads = timed(reduce_one, "gradients")
    optimizer.step = timed(optimizer.step, "step")
    seconds, _ = time_step(partial(rung.train_step, batch))
    return spent | {"wall": seconds * 1e3}


def look_into(rung: Rung, batch: dict, folder: Path) -> dict[str, dict[str, float]]:
    """One step under the profiler, and for ZeRO-3 one more with clocks in it: {"trace_ms": ..., "host_ms": ...}."""
    found = {"trace_ms": in_the_trace(rung, batch, folder / f"trace_{rung.facts['case']}_rank{dist.get_rank()}.json")}
    hooked = "deepcompile" not in rung.facts["changes"]  # DeepCompile removes the hooks
    if rung.engine and rung.engine.zero_optimization_stage() == 3 and hooked:
        found["host_ms"] = on_the_host(rung, batch)
    return found


def measure(
    micro_batch: int, running: dict[str, Rung], blocks, look: bool, args: argparse.Namespace, device: torch.device
) -> list[dict]:
    """Train all cases by turns with this micro-batch: a row each. `look`: into those of --profile, afterwards."""
    loader = DataLoader(blocks, micro_batch, sampler=DistributedSampler(blocks, seed=args.seed))  # own blocks
    batches = {case: endless_batches(loader) for case in running}
    windows = {case: partial(train_window, rung, batches[case], args.window, device) for case, rung in running.items()}
    turns = take_turns(windows, -(-args.steps // args.window))
    rows = []
    for case, rung in running.items():
        steps = [step for _, window in turns[case] for step in window]
        step_ms = [milliseconds for milliseconds, _ in steps]
        losses = [loss for _, loss in steps]
        row = rung.facts | rung.memory | {"micro_batch": micro_batch, "tokens": blocks.block_size, "losses": losses}
        row |= {"step_ms": step_ms, "median_ms": slowest_median(step_ms, device, warm_up=args.window)}  # 1st: warm-up
        row["linear"] = torch.nn.functional.linear.__name__  # PyTorch's, or what ZeRO-3 has put in its place
        row["tokens_per_s"] = micro_batch * blocks.block_size / row["median_ms"] * 1e3
        looks = {}
        if look and case in args.profile:  # the last time: whoever came later would meet the clocks that it leaves
            looks = look_into(rung, to_device(next(batches[case]), device), Path(args.run_dir))
        rows.append(row | looks)
    return rows


def finish(row: dict, table: Table) -> dict:
    """The row with its ratio to the first case of this size. Prints what a look into the case has shown."""
    size = row["model"], row["micro_batch"]
    same = [other for other in table.rows if (other["model"], other["micro_batch"]) == size and "error" not in other]
    for kind in ("trace_ms", "host_ms"):
        if kind in row:
            print0(f"    {kind}: {' | '.join(f'{name} {value:.1f}' for name, value in row[kind].items())}")
    return row | {"ratio": (same or [row])[0]["median_ms"] / row["median_ms"]}


def live_storages(device: torch.device) -> dict[int, torch.UntypedStorage]:
    """{address: storage} of the tensors alive on `device`.

    `bench.held` walks them too, but stops at what torch.compile keeps of tracing a Llama: a shape without a storage.
    """
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        tensor = thing._local_tensor if type(thing) is DTensor else thing  # FSDP2's: this rank's part
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == device.type:
            with suppress(RuntimeError):  # of data_ptr(), where there is no storage
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return found


def empty(device: torch.device, keep: Collection[int]) -> None:
    """Empty what came after `keep`, `live_storages(device)` of before: stage 3's tensors survive `engine.destroy()`."""
    torch._dynamo.reset()  # compiled code may hold some of it
    for address, storage in live_storages(device).items():
        if address not in keep and storage.resizable():
            storage.resize_(0)
    get_accelerator().empty_cache()


def train_together(args: argparse.Namespace, device: torch.device, table: Table) -> None:
    """All cases of the GPT-2 in memory at once, by turns, with each micro-batch."""
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    running = {case: build(case, args.model, len(tokenizer), args, device) for case in args.cases}
    for micro_batch in args.micro_batch:
        look = micro_batch == args.micro_batch[-1] and not args.llama
        for row in measure(micro_batch, running, blocks, look, args, device):
            table.add(finish(row, table))


def train_one_by_one(args: argparse.Namespace, device: torch.device, table: Table) -> None:
    """The cases of the Llama, each alone in memory: two of eight billion parameters do not fit side by side."""
    *_, tokens, tokenizer = LLAMAS[args.llama]
    blocks, _ = load_corpus(args.corpus, load_tokenizer(tokenizer), tokens)
    name = f"llama-{args.llama}"
    for case in args.cases:
        kept = live_storages(device)
        with table.row(case, model=name, micro_batch=LLAMA_BATCH) as row:
            running = {case: build(case, name, 0, args, device)}
            row |= finish(measure(LLAMA_BATCH, running, blocks, True, args, device)[0], table)
        running = None
        empty(device, kept)


def main() -> None:
    args = parse_args()
    if args.steps <= args.window:
        raise UserError(f"--steps {args.steps}: more than --window {args.window}, as the first window is not timed")
    if args.model == "none" and not args.llama:
        raise UserError("--model none: nothing to train; name a Llama with --llama, or a preset of common/model.py")
    if missing := set(args.profile) - set(args.cases):
        raise UserError(f"--profile {' '.join(sorted(missing))}: only a case that is trained; add it to --cases")
    device = join_world()
    gc.freeze()  # the libraries' million objects: the garbage collector need not look at them in each step
    ranks = dist.get_world_size()
    table = Table(Path(args.run_dir) / "speed.json", COLUMNS, ranks=ranks, model=args.model)
    kept = live_storages(device)
    if args.model != "none":
        train_together(args, device, table)
    if args.llama:
        empty(device, kept)
        train_one_by_one(args, device, table)
    title = f"{ranks} ranks"
    table.bars("tokens_per_s", "tokens/s a rank", title, name="speed", label="{model} {micro_batch}, {case}")
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
