"""Day 12: from 137k to 534k tokens/s - GPT-2 124M under DeepSpeed, change by change, beside plain PyTorch.

From the repository root, on one GPU (on one CPU process it runs with what a CPU can do; its figures mean nothing):

    deepspeed --num_accelerators 1 day12/labs/speed.py --model gpt2 --micro_batch 32
    deepspeed --num_accelerators 1 day12/labs/speed.py --steps 6 --window 2 --cases hf lean torch
    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    deepspeed --num_accelerators 1 day12/labs/speed.py --model gpt2 --micro_batch 32 --turns 21 --nanogpt ../nanoGPT

Expect a table: tokens/s, MFU, peak memory and the loss, a line per rung; each keeps the changes of those before. With
--turns the last rung and PyTorch's loop are measured alternately, for a fair ratio, with the largest difference of
their losses. nanoGPT, where you have a clone of it, is measured in the same run. day12/speed.md reads the figures.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py (_take_model_step, allreduce_gradients).
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.nn.functional import pad
from torch.utils.data import DataLoader, DistributedSampler
from transformers.modeling_outputs import CausalLMOutput

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.timing import losses_apart, ratio, take_turns, time_step
from bench.trace import ON_DEVICE, longest_ms, ms_by_kind, trace_step, union_ms
from bench.world import join_world
from common.data import TokenBlocks, endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import Preset, build_model, get_preset
from common.ranks import print0
from common.run_log import default_run_dir
from day12.fast import clip_with_pytorch, skip_averaging
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
        "--turns", type=int, default=0, help="windows of the last rung and of PyTorch's loop, measured alternately"
    )
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a clone of nanoGPT, to measure its model as well")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences a rank and micro-batch")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (not micro-batches)")
    parser.add_argument("--window", type=int, default=10, help="steps between two looks at the clock")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument(
        "--run_dir", default=default_run_dir("day12"), help="folder for speed.json, speed.png and traces"
    )
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


def build(case: str, vocab_size: int, args: argparse.Namespace, device: torch.device) -> Callable:
    """Return train_step(batch) -> loss of a case."""
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
        return build_torch(model, compiled)
    config = {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True, "fused": True}},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "timers": {"throughput": {"enabled": "no_timer" not in on}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=config)
    if compiled:
        engine.compile()
    if "foreach_clip" in on:
        clip_with_pytorch(engine)
    if "no_average" in on:
        skip_averaging(engine)

    def train_step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return train_step


@dataclass
class Setting:
    """What all cases have in common: data, device, and the numbers that turn seconds into figures."""

    args: argparse.Namespace
    device: torch.device
    blocks: TokenBlocks
    vocab_size: int
    flops: int  # a token

    def build(self, case: str) -> tuple[Callable, Iterator[dict]]:
        """(train_step, its batches): every case gets the same ones."""
        sampler = DistributedSampler(self.blocks, seed=self.args.seed)  # each rank its own blocks
        loader = DataLoader(self.blocks, self.args.micro_batch, sampler=sampler, drop_last=True)
        batches = (to_device(batch, self.device) for batch in endless_batches(loader))
        return build(case, self.vocab_size, self.args, self.device), batches

    def window(self, train_step: Callable, batches: Iterator[dict]) -> list[torch.Tensor]:
        """Losses of the steps between two looks at the clock, in which the host need not wait for the device."""
        return [train_step(next(batches)) for _ in range(self.args.window)]

    def speed(self, runs: list[tuple[float, list[torch.Tensor]]]) -> dict:
        """tokens/s and MFU of one rank: the median of the windows after the first; all losses and windows."""
        window_s = [seconds / self.args.window for seconds, _ in runs]
        rate = self.args.micro_batch * get_preset(self.args.model).block_size / median(window_s[1:])
        peak = peak_flops(self.device)
        losses = [loss.item() for _, losses in runs for loss in losses]
        return {"tokens_per_s": rate, "mfu": peak and rate * self.flops / peak, "losses": losses, "window_s": window_s}


KINDS = {  # of GPU work, by words in the kernels' names
    "attention": ("flash", "cudnn", "sdpa", "fmha", "attention"), "loss": ("loss_and_gradient", "log_softmax", "nll"),
    "products": ("gemm", "cutlass", "nvjet", "sm90_xmma", "cublas"), "optimizer": ("adam", "multi_tensor", "lpnorm"),
    "averaging": ("nccl",),
}  # fmt: skip


def look_into_a_step(step: Callable, path: Path) -> dict:
    """Milliseconds of GPU work in one step by kind, of idling, and of the longest kernels, from a trace."""
    repeats = 3  # in the middle one the host runs ahead as it does in training
    events = [event for event in trace_step(step, path, repeats) if event.get("cat") in ON_DEVICE]
    spent = ms_by_kind(events, KINDS)
    first, last = min(event["ts"] for event in events), max(event["ts"] + event["dur"] for event in events)
    spent["idle"] = (last - first) / 1e3 - union_ms(events)
    longest = {name: ms / repeats for name, ms in longest_ms(events).items()}
    return {kind: ms / repeats for kind, ms in spent.items()} | {"longest": longest}


def measure(setting: Setting, case: str, row: dict) -> None:
    """Train the case and fill its row."""
    args = setting.args
    get_accelerator().reset_peak_memory_stats()
    train_step, batches = setting.build(case)
    runs = [time_step(lambda: setting.window(train_step, batches)) for _ in range(args.steps // args.window)]
    row |= setting.speed(runs)
    row |= {"last_loss": row["losses"][-1], "peak_gib": get_accelerator().max_memory_allocated() / 2**30}
    if case in args.profile:
        batch = next(batches)
        trace = Path(args.run_dir) / f"trace_{case}_rank{dist.get_rank()}.json"
        row["gpu_ms"] = look_into_a_step(lambda: train_step(batch), trace)


def alternately(setting: Setting, cases: list[str]) -> dict:
    """A window of each case in turn; their figures, and how much faster than the others the last rung is."""
    built = {case: setting.build(case) for case in cases}
    steps = {case: lambda both=both: setting.window(*both) for case, both in built.items()}
    runs = take_turns(steps, setting.args.turns)
    found = {case: setting.speed(runs[case]) for case in cases}
    for case in cases:
        found[case]["window_s"] = found[case]["window_s"][1:]  # the first warms up
        print0(f"{case:16}{found[case]['tokens_per_s']:12,.0f} tok/s, last loss {found[case]['losses'][-1]:.4f}")
    losses = found["no_average"]["losses"]
    apart = losses_apart(losses, found["torch"]["losses"])
    ratios = {case: ratio(runs[case], runs["no_average"]) for case in cases if case != "no_average"}
    how_far = f"losses at most {apart:.4f} apart over {len(losses)} steps"
    print0(f"DeepSpeed / PyTorch, alternately: {ratios['torch']:.4f} | {how_far}")
    found |= {"ratio": ratios["torch"], "losses_apart": apart}
    if "nanogpt" in ratios:
        found["ratio_nanogpt"] = ratios["nanogpt"]
        print0(f"DeepSpeed / nanoGPT, alternately: {ratios['nanogpt']:.4f}")
    return found


def refuse_bad_flags(args: argparse.Namespace) -> None:
    if args.window < 1 or args.steps < 2 * args.window:
        sizes = f"--steps {args.steps} --window {args.window}"
        raise UserError(f"{sizes}: take two windows or more, the first does not count")
    if args.nanogpt and not Path(args.nanogpt, "model.py").exists():
        raise UserError(f"--nanogpt {args.nanogpt}: no model.py there; git clone https://github.com/karpathy/nanoGPT")
    if args.turns == 1:
        raise UserError("--turns 1: take 2 or more, the first does not count")
    if args.profile and get_accelerator().device_name() == "cpu":
        cases = " ".join(args.profile)
        raise UserError(f"--profile {cases} shows what a GPU does in a step: this is a CPU, leave it out")


def main() -> None:
    args = parse_args()
    refuse_bad_flags(args)
    device = join_world()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    with torch.device("meta"):
        flops = GPT(preset, len(tokenizer)).flops_per_token(preset.block_size)
    setting = Setting(args, device, blocks, len(tokenizer), flops)
    nanogpt = ["nanogpt"] if args.nanogpt else []
    columns = {"tok/s/rank": "tokens_per_s:,.0f", "MFU": "mfu:.1%", "peak GiB": "peak_gib:.2f"}
    columns["last loss"] = "last_loss:.4f"
    table = Table(Path(args.run_dir) / "speed.json", columns, flops_per_token=flops)
    for case in [*args.cases, *nanogpt]:
        kept = live_tensors(device)
        with table.row(case) as row:
            measure(setting, case, row)
        if "gpu_ms" in row and "error" not in row:
            spent = dict(row["gpu_ms"])
            longest = spent.pop("longest")
            print0("    ms: " + " | ".join(f"{kind} {ms:.2f}" for kind, ms in spent.items()))
            print0("\n".join(f"    {ms:7.2f} {name}" for name, ms in longest.items()))
        free(device, kept)
    if args.turns:
        table.save(turns=alternately(setting, ["torch", "no_average", *nanogpt]))
    table.bars("tokens_per_s", "tokens/s", f"{args.model}, {args.micro_batch} sequences a rank", name="speed")
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
