"""Day 16: slow_link - from which link speed on does a pipeline beat data parallelism at the same global batch?

On two hosts joined by links of known speed, made for this on one machine (root; CPU):

    python day16/labs/slow_link.py

On whatever joins your ranks or GPUs, each of them a stage:

    deepspeed --num_accelerators 2 day16/labs/slow_link.py --num_layers 4

Expect a row for each link and way: tokens/s, megabytes that a rank sent for a step beside the computed ones, megabytes
that it holds between steps, and the last loss, which is the same for all: they train the same model on the same text.
Checked with deepspeed 0.19.8. Source: bench/link.py; deepspeed/runtime/pipe/engine.py; day15/labs/volume.py.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors, settled_tensors
from bench.link import sent_over_link
from bench.memory import free
from bench.table import Table
from bench.timing import slowest_median, time_step
from bench.traffic import ring_share
from bench.world import join_world
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.plots import plt, save_plot
from common.ranks import over_ranks
from common.run_log import default_run_dir
from day08.cost import rate_bytes_per_s
from day08.wire import run_on_link, started_by_launcher
from day16 import gpt2_pipe as gpt2
from day16.stage_times import config_to_measure, dtype_of, profile_layers

WAYS = ("ddp", "zero 1", "pipeline")
COLUMNS = {
    "tok/s": "tokens_per_s:,.0f", "sent MB": "sent_bytes:MB", "computed MB": "computed_bytes:MB",
    "held MB": "held_bytes:MB", "last loss": "losses.-1:.6f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config_zero1.json"), help="DeepSpeed JSON config")
    rates = ["100mbit", "300mbit", "1gbit"]
    parser.add_argument("--rates", nargs="+", default=rates, help="speeds of the link, in tc's words")
    parser.add_argument("--rate", default=None, help="set for the ranks on a link: its speed")
    parser.add_argument("--global_batch", type=int, default=16, help="sequences per optimizer step")
    parser.add_argument("--micro_batch", type=int, default=2, help="sequences of a micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day16"), help="folder for slow_link.json")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--num_layers", type=int, default=12, help="blocks, in place of the preset's number")
    return parser.parse_args()


@dataclass
class Setting:
    """What all ways have in common: the model, its first weights, the JSON, and the batches, one for each step."""

    args: argparse.Namespace
    config: dict
    shape: GPT2Config
    start: dict[str, torch.Tensor]
    batches: torch.Tensor  # (steps + 1, global batch, tokens); the first step warms up
    device: torch.device

    def whole(self) -> torch.nn.Module:
        """The model of transformers with the first weights."""
        model = gpt2.whole_model(self.shape, self.args.seed).to(self.device, dtype_of(self.config))
        model.load_state_dict(self.start)
        return model

    def of_this_rank(self, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Data parallel: this rank's share of the global batch, in micro-batches."""
        return batch.chunk(dist.get_world_size())[dist.get_rank()].split(self.args.micro_batch)

    def build(self, way: str) -> Callable[[torch.Tensor], float]:
        """Return step(batch) -> mean loss of the global batch, on all ranks."""
        return {"ddp": self.ddp, "zero 1": self.zero_1, "pipeline": self.pipeline}[way]()

    def ddp(self) -> Callable:
        """PyTorch's own data parallelism: one all-reduce of the gradients, while the last backward pass still runs."""
        model = DistributedDataParallel(self.whole())
        params = {key: value for key, value in self.config["optimizer"]["params"].items() if key != "torch_adam"}
        optimizer = torch.optim.AdamW(model.parameters(), **params)

        def step(batch: torch.Tensor) -> float:
            parts = self.of_this_rank(batch)
            loss_sum = 0.0
            for number, ids in enumerate(parts, start=1):
                with nullcontext() if number == len(parts) else model.no_sync():
                    loss = model(input_ids=ids, labels=ids).loss / len(parts)
                    loss.backward()
                loss_sum += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            return over_ranks(loss_sum, self.device)

        return step

    def zero_1(self) -> Callable:
        """The whole model on every rank, optimizer states divided."""
        model = self.whole()
        parts = self.args.global_batch // (self.args.micro_batch * dist.get_world_size())
        config = self.config | {"gradient_accumulation_steps": parts}
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

        def step(batch: torch.Tensor) -> float:
            loss_sum = 0.0
            for ids in self.of_this_rank(batch):
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
                loss_sum += loss.item() / parts
            return over_ranks(loss_sum, self.device)

        return step

    def pipeline(self) -> Callable:
        """A stage on each rank, cut by measured time."""
        stages = dist.get_world_size()
        costs = profile_layers(self.shape, self.args.micro_batch, dtype_of(self.config), repeats=3)
        module = gpt2.CutPipeline(
            gpt2.layer_specs(self.shape), num_stages=stages, loss_fn=gpt2.next_token_loss,
            partition_method=gpt2.best_balanced(costs, stages),
        )  # fmt: skip
        gpt2.load_hf(module, self.shape, self.start)
        config = self.config | {"gradient_accumulation_steps": self.args.global_batch // self.args.micro_batch}
        config["zero_optimization"] = {"stage": 0}  # one pipeline: there is nobody to divide states with
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)

        def step(batch: torch.Tensor) -> float:
            return engine.train_batch(iter([(ids, ids) for ids in batch.split(self.args.micro_batch)])).item()

        return step

    def computed_bytes(self, way: str) -> float:
        """What the rank that sends most sends for a step: activations or gradients of all tokens, or weights' worth."""
        element, ranks = dtype_of(self.config).itemsize, dist.get_world_size()
        one_gradient = ring_share("all_reduce", ranks)  # 2(N-1)/N: elements sent for each element that is added up
        if way == "pipeline":
            tokens = self.args.global_batch * self.shape.n_positions
            borders = 1 if ranks == 2 else 2  # a stage in the middle sends forwards and backwards
            tied = ring_share("all_reduce", 2) * self.shape.vocab_size * self.shape.n_embd
            return element * (borders * tokens * self.shape.n_embd + tied)
        weights = sum(tensor.numel() for name, tensor in self.start.items() if name != "lm_head.weight")  # tied
        return element * weights * one_gradient * (1.5 if way == "zero 1" else 1)  # and the new weights back


def refuse_bad_batch(global_batch: int, micro_batch: int, ranks: int) -> None:
    """Data parallel, each rank has an equal number of whole micro-batches."""
    if global_batch % (micro_batch * ranks):
        sizes = f"--global_batch {global_batch} --micro_batch {micro_batch}"
        raise UserError(f"{sizes}: the batch is not a multiple of micro-batch x {ranks} ranks")


def measure(args: argparse.Namespace) -> None:
    """What each rank does: every way, one after the other. Collective."""
    config = config_to_measure(args.deepspeed_config, args.micro_batch) | {"gradient_clipping": 0.0}
    device = join_world()
    ranks = dist.get_world_size()
    refuse_bad_batch(args.global_batch, args.micro_batch, ranks)
    shape = gpt2.shape_of(args.model, len(load_tokenizer(get_preset(args.model).tokenizer)), args.num_layers)
    start = gpt2.whole_model(shape, args.seed).state_dict()
    torch.manual_seed(args.seed)
    batches = torch.randint(shape.vocab_size // 8, (args.steps + 1, args.global_batch, shape.n_positions))
    setting = Setting(args, config, shape, start, batches.to(device), device)
    table = Table(Path(args.run_dir) / "slow_link.json", COLUMNS, ranks=ranks, batch=args.global_batch)
    for way in WAYS:  # the pipeline last: it leaves groups behind that a plain engine stumbles over (0.19.8)
        kept = live_tensors(device)
        with table.row(way, way=way) as row:
            step = setting.build(way)
            seconds, sent, losses = [], [], []
            for batch in setting.batches:
                dist.barrier()
                before = sent_over_link() if args.rate else 0
                spent, loss = time_step(lambda step=step, batch=batch: step(batch))
                seconds.append(spent)
                losses.append(loss)
                dist.barrier()
                sent.append(sent_over_link() - before if args.rate else 0)
            tokens = args.global_batch * shape.n_positions
            row |= {"tokens_per_s": tokens / slowest_median(seconds, device, warm_up=1), "losses": losses}
            row["sent_bytes"] = over_ranks(sorted(sent)[len(sent) // 2], device, "max") if args.rate else None
            row["computed_bytes"] = setting.computed_bytes(way)
            new = [tensor for at, tensor in settled_tensors(device).items() if at not in kept]
            row["held_bytes"] = over_ranks(sum(t.untyped_storage().nbytes() for t in new), device, "max")
            del step, new
        free(device, kept)
    table.close()
    dist.destroy_process_group()


def plot(ways: dict[str, list[dict]], path: Path, title: str) -> None:
    """Tokens/s against the speed of the link, a line for each way."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for way, rows in ways.items():
        mbits = [rate_bytes_per_s(row["rate"]) * 8 / 1e6 for row in rows]
        axes.plot(mbits, [row["tokens_per_s"] for row in rows], "o-", label=way)
    axes.set_xscale("log")
    axes.set_xticks(mbits, [f"{rate:g}" for rate in mbits])
    axes.minorticks_off()
    axes.set(xlabel="link between the two hosts, Mbit/s", ylabel="tokens/s", ylim=(0, None), title=title)
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    for name in ("global_batch", "micro_batch", "steps", "num_layers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1")
    if started_by_launcher():
        return measure(args)
    names = ("deepspeed_config", "global_batch", "micro_batch", "steps", "seed", "model", "num_layers")
    flags = [word for name in names for word in (f"--{name}", getattr(args, name))]
    found = run_on_link(args.rates, Path(args.run_dir), HERE / "labs/slow_link.py", *flags)
    table = Table(Path(args.run_dir) / "slow_link.json", {"gain": "gain:.2f", **COLUMNS}, width=22)
    for rate, one in found.items():
        rows = {row["way"]: row for row in one["table"]}
        best = max(rows[way]["tokens_per_s"] for way in WAYS[:2])
        for way, row in rows.items():
            table.add(row | {"case": f"{rate}, {way}", "rate": rate, "gain": row["tokens_per_s"] / best})
    ways = {way: [row for row in table.rows if row["way"] == way] for way in WAYS}
    print("pipeline / the better of the others: " + ", ".join(f"{r['rate']} {r['gain']:.2f}" for r in ways["pipeline"]))
    plot(
        ways, Path(args.run_dir) / "slow_link.png", f"{args.model}, {args.num_layers} blocks, batch {args.global_batch}"
    )
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
