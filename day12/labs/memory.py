"""Day 12: memory monitor - a timeline of what a rank holds within a few steps, by kind.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day12/labs/memory.py
    deepspeed --num_accelerators 2 day12/labs/memory.py --recompute --loss_chunks 8
    deepspeed --num_accelerators 1 day12/labs/memory.py --model gpt2 --deepspeed_config day12/ds_config_gpt2.json

Expect a line a step, then memory.png (stacked kinds, sample by sample) and memory.json in the run folder. Tensors are
found by walking them; on a GPU the allocator's figures stand beside them, and what the walk does not see is "unseen".
Checked with deepspeed 0.19.8. Source: arXiv:1910.02054, section 3; docs.pytorch.org, torch_cuda_memory.html
"""

import argparse
import gc
import sys
import weakref
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import bucket_tensors, bytes_by_kind, live_tensors
from bench.results import this_command, write_results
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.plots import plt
from common.ranks import print0
from common.run_log import default_run_dir, show_path
from day12.gpt import build_gpt

KINDS = ["parameters", "optimizer", "gradients", "buckets", "activations", "other", "unseen"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = str(HERE / "ds_config_fp32.json")
    parser.add_argument("--deepspeed_config", default=config, help="DeepSpeed JSON config")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing, switched on in the model")
    parser.add_argument("--loss_chunks", type=int, default=1, help="parts of the logits, one after the other")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day12"), help="folder for memory.json and memory.png")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


class Saved:
    """A tensor that autograd keeps for the backward pass, where Python can see it. Gone when autograd lets go of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Timeline:
    """Samples of what this rank holds: [{"step", "when", kind: bytes, ...}, ...]."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self.engine = engine
        self.samples: list[dict] = []
        self.saved: weakref.WeakSet[Saved] = weakref.WeakSet()
        self.step = 0
        self.in_forward = False
        for number, block in enumerate(engine.module.h):
            block.register_forward_hook(lambda block, inputs, out, number=number: self.after_block(number, out))

    def after_block(self, number: int, output: torch.Tensor) -> None:
        if self.in_forward:  # not when a block is computed again, within the backward pass
            self.sample(f"forward {number}")
            output.register_hook(lambda gradient: self.sample(f"backward {number}"))  # returns None: changes nothing

    def keep(self, tensor: torch.Tensor) -> Saved:
        box = Saved(tensor)
        self.saved.add(box)
        return box

    def sample(self, when: str) -> None:
        """Take a sample; each storage counts once, for the first kind that claims it."""
        engine, zero = self.engine, self.engine.optimizer
        states = [t for state in engine.basic_optimizer.state.values() for t in state.values()]
        states += [weights for group in engine.basic_optimizer.param_groups for weights in group["params"]]
        slices = getattr(zero, "averaged_gradients", {}).values()  # ZeRO-1 and 2: what this rank updates
        gradients = [gradient for part in slices for gradient in part or [] if gradient is not None]
        gradients += [p.grad for p in engine.module.parameters() if p.grad is not None]
        held = bytes_by_kind(
            live_tensors(engine.device).values(),
            parameters=engine.module.parameters(),
            optimizer=states,
            gradients=gradients,
            buckets=bucket_tensors(zero),
            activations=[box.tensor for box in list(self.saved)],
        )
        allocator = {}
        if engine.device.type != "cpu":
            allocator = {
                "allocated": get_accelerator().memory_allocated(),
                "reserved": get_accelerator().memory_reserved(),
            }
            held["unseen"] = max(0, allocator["allocated"] - sum(held.values()))  # C++ holds it: gradients on their way
        self.samples.append({"step": self.step, "when": when, "total": sum(held.values()), **held, **allocator})


def plot(samples: list[dict], path: Path, title: str) -> None:
    """Stack the kinds, sample by sample; name the moments of the last step."""
    figure, axes = plt.subplots(figsize=(8, 4))
    kinds = [kind for kind in KINDS if any(sample.get(kind) for sample in samples)]
    x = range(len(samples))
    axes.stackplot(x, [[s.get(kind, 0) / 1e6 for s in samples] for kind in kinds], labels=kinds, step="mid")
    for name in ("allocated", "reserved"):
        if name in samples[0]:
            axes.plot(x, [sample[name] / 1e6 for sample in samples], "k-" if name == "allocated" else "k:", label=name)
    starts = [i for i, sample in enumerate(samples) if sample["when"] == "start"]
    for start in starts:
        axes.axvline(start, color="black", linewidth=0.5)
    shown = [i for i in x if samples[i]["step"] == samples[-1]["step"]] if len(samples) <= 60 else starts
    axes.set_xticks(shown, [samples[i]["when"] for i in shown], rotation=90)
    axes.set(ylabel="MB on rank 0", title=title)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5))  # in the order of the stack
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    args = parse_args()
    for name in ("steps", "loss_chunks"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: take 1 or more")
    join_world()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    gc.freeze()  # what is here now is libraries: walks over the live tensors no longer see it, and are fast
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_gpt(args.model, len(tokenizer))
    model.recompute, model.loss_chunks = args.recompute, args.loss_chunks
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    how = f"recompute {model.recompute} | loss in {model.loss_chunks} part(s) | {engine.device.type}"
    print0(f"zero stage {engine.zero_optimization_stage()} | {model.num_params:,} parameters | {how}")
    sampler = DistributedSampler(blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(blocks, batch_size=engine.train_micro_batch_size_per_gpu(), sampler=sampler, drop_last=True)
    timeline = Timeline(engine)
    batches = endless_batches(loader)
    print0(f"MB on rank 0: {'start':>12}{'most seen':>12}{'at':>14}{'end':>10}{'allocated':>12}{'reserved':>12}")
    for step in range(1, args.steps + 1):
        timeline.step = step
        get_accelerator().reset_peak_memory_stats()
        timeline.sample("start")
        for _ in range(engine.gradient_accumulation_steps()):
            batch = to_device(next(batches), engine.device)
            timeline.in_forward = True
            with torch.autograd.graph.saved_tensors_hooks(timeline.keep, lambda box: box.tensor):
                loss = engine(**batch).loss
            timeline.in_forward = False
            timeline.sample("forward")
            engine.backward(loss)
            timeline.sample("backward")
            engine.step()
            del batch, loss
        timeline.sample("step")
        samples = [sample for sample in timeline.samples if sample["step"] == step]
        most = max(samples, key=lambda sample: sample["total"])
        mb = [f"{sample['total'] / 1e6:.2f}" for sample in (samples[0], most, samples[-1])]
        peaks = ["-", "-"]  # on CPU there is no allocator to ask
        if engine.device.type != "cpu":
            peaks = [get_accelerator().max_memory_allocated(), get_accelerator().max_memory_reserved()]
            peaks = [f"{peak / 1e6:.2f}" for peak in peaks]
        print0(f"step {step:9d}{mb[0]:>12}{mb[1]:>12}{most['when']:>14}{mb[2]:>10}{peaks[0]:>12}{peaks[1]:>12}")
    if engine.global_rank == 0:
        run_dir = Path(args.run_dir)
        write_results(
            run_dir / "memory.json", this_command(), num_params=model.num_params, ranks=engine.dp_world_size,
            last_step=samples, samples=timeline.samples,
        )  # fmt: skip
        plot(timeline.samples, run_dir / "memory.png", f"{args.model}, {engine.dp_world_size} ranks, {how}")
        print0(f"timeline: {show_path(run_dir)}/memory.png, memory.json")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
