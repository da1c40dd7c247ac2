"""Day 16: compare - stages x micro-batches: tokens/s, the bubble beside its formula, and ZeRO on the same ranks.

From the repository root, on two CPU processes or two GPUs; the second on four GPUs (bf16):

    deepspeed --num_accelerators 2 day16/labs/compare.py
    deepspeed --num_accelerators 4 day16/labs/compare.py --model gpt2-xl --deepspeed_config day16/ds_config_bf16.json

Expect a row for each way and number of micro-batches: tokens/s, the part of the time that the ranks waited, the
formula's bubble, the wait that the stages' own times explain, and the bytes a rank holds; compare.json and a plot.
Checked with deepspeed 0.19.8. Source: arXiv:2104.04473, section 2.2; deepspeed/runtime/pipe/engine.py.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from transformers import GPT2Config

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.timing import slowest_median, time_step
from bench.world import join_world
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.plots import plt, save_plot
from common.ranks import over_ranks
from common.run_log import default_run_dir
from day16 import gpt2_pipe as gpt2
from day16.stage_times import StageClock, config_to_measure, dtype_of, profile_layers, shortest_step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--micro_batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="to go through")
    parser.add_argument("--zero", nargs="*", type=int, default=[1, 3], help="ZeRO stages of plain data parallelism")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument(
        "--run_dir", default=default_run_dir("day16"), help="folder for compare.json and tokens_per_s.png"
    )
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--micro_batch", type=int, help="sequences of a micro-batch, in place of the config's number")
    return parser.parse_args()


def timed(step: Callable, steps: int) -> list[float]:
    """Seconds of `steps` steps after one that warms up; the ranks begin together."""
    seconds = []
    for _ in range(steps + 1):
        dist.barrier()
        seconds.append(time_step(step)[0])
    return seconds[1:]


def waits(engine, step: Callable, steps: int) -> tuple[float, float]:
    """(part of the pipeline's time in which a rank waited, the part that the stages' own times explain), measured.

    The pipeline's time ends with the first stage's last backward pass: bubbles are in there, the optimizer is not.
    """
    micro_batches = engine.micro_batches
    clock = StageClock(engine)
    waited, explained = [], []
    for _ in range(steps):
        dist.barrier()
        start = time.perf_counter()
        step()
        found = gpt2.from_all_ranks((engine.stage_id, clock.ended - start, clock.take()))
        span = max(seconds for _, seconds, _ in found)
        waited.append(1 - sum(busy for *_, busy in found) / len(found) / span)
        each = [max(busy for at, _, busy in found if at == s) / micro_batches for s in range(engine.num_stages)]
        explained.append(1 - micro_batches * sum(each) / len(each) / shortest_step(each, micro_batches))
    clock.stop()
    return median(waited), median(explained)


def plot(table: list[dict], path: Path, title: str) -> None:
    """Tokens/s against micro-batches, a line for each way."""
    figure, axes = plt.subplots(figsize=(7, 4))
    ran = [row for row in table if "error" not in row]
    for way in dict.fromkeys(row["way"] for row in ran):
        points = [(row["micro_batches"], row["tokens_per_s"]) for row in ran if row["way"] == way]
        axes.plot(*zip(*points, strict=True), "o-", label=way)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="micro-batches of a step", ylabel="tokens/s", ylim=(0, None), title=title)
    save_plot(figure, axes, path)


COLUMNS = {
    "micro-batches": "micro_batches:", "tok/s": "tokens_per_s:.0f", "waited": "waited:.3f", "formula": "formula:.3f",
    "explained": "explained:.3f", "MB a rank": "held_bytes:MB",
}  # fmt: skip


@dataclass
class Setting:
    """What all ways have in common."""

    args: argparse.Namespace
    config: dict
    shape: GPT2Config
    ids: torch.Tensor  # of one micro-batch
    device: torch.device
    table: Table

    def measure(self, engine, step: Callable, micro_batches: int, stages: int, kept: dict) -> dict:
        """Figures of `step` of `engine`. `kept`: the live tensors from before it was built, which it does not hold."""
        seconds = slowest_median(timed(step, self.args.steps), self.device)
        tokens = engine.train_batch_size() * self.shape.n_positions
        row = {"batch": engine.train_batch_size(), "tokens_per_s": tokens / seconds}
        row |= {"waited": None, "formula": None, "explained": None}
        if stages > 1:
            row["waited"], row["explained"] = waits(engine, step, self.args.steps)
            row["formula"] = (stages - 1) / (micro_batches + stages - 1)
        new = [tensor for at, tensor in live_tensors(self.device).items() if at not in kept]
        held = sum(tensor.untyped_storage().nbytes() for tensor in new)
        return row | {"held_bytes": over_ranks(held, self.device, "max")}

    def data_parallel(self, stage: int) -> None:
        """The whole model on every rank, without PipelineModule: ZeRO-2 and 3 are possible here."""
        zero = {"reduce_bucket_size": 500_000} | self.config.get("zero_optimization", {}) | {"stage": stage}
        config = self.config | {"zero_optimization": zero}  # (the bucket's default is 2 GB)
        here = self.ids.to(self.device)
        way = f"{dist.get_world_size()} x zero {stage}"
        for micro_batches in self.args.micro_batches:
            kept = live_tensors(self.device)
            with self.table.row(way, way=way, stages=1, micro_batches=micro_batches) as row:
                with self.device:
                    model = gpt2.whole_model(self.shape, self.args.seed)
                case = config | {"gradient_accumulation_steps": micro_batches}
                engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=case)

                def step(engine=engine, micro_batches=micro_batches) -> None:
                    for _ in range(micro_batches):
                        engine.backward(engine(input_ids=here, labels=here).loss)
                        engine.step()

                row |= self.measure(engine, step, micro_batches, 1, kept)
                engine.destroy()
            free(self.device, kept)

    def pipeline(self, stages: int, costs: list[float], start: dict[str, torch.Tensor]) -> deepspeed.PipelineEngine:
        """As many pipelines of `stages` stages as there are ranks for, cut by time."""
        with self.device:
            module = gpt2.CutPipeline(
                gpt2.layer_specs(self.shape), num_stages=stages, loss_fn=gpt2.next_token_loss,
                partition_method=gpt2.best_balanced(costs, stages), checkpointable_layers=["GPT2Block"],
            )  # fmt: skip
        gpt2.load_hf(module, self.shape, start)
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=self.config)
        return engine

    def pipelines(self, stages: int, costs: list[float], start: dict[str, torch.Tensor]) -> None:
        """A row for each number of micro-batches, all with one engine: it is built anew after an out-of-memory."""
        num_pipelines = dist.get_world_size() // stages
        way = f"{num_pipelines} x {stages} stages"
        kept = live_tensors(self.device)
        engine = None
        for micro_batches in self.args.micro_batches:
            with self.table.row(way, way=way, stages=stages, micro_batches=micro_batches) as row:
                if engine is None:
                    engine = self.pipeline(stages, costs, start)
                engine.set_train_batch_size(len(self.ids) * micro_batches * num_pipelines)

                def step(engine=engine, micro_batches=micro_batches) -> None:
                    engine.train_batch(iter([(self.ids, self.ids)] * micro_batches))

                row |= self.measure(engine, step, micro_batches, stages, kept)
            if "error" in row:  # what is left of it would be in the next one's way
                engine = None
                free(self.device, kept)
        if engine is not None:
            engine.destroy()
        free(self.device, kept)


def main() -> None:
    args = parse_args()
    if min(args.steps, *args.micro_batches) < 1:
        raise UserError(f"--steps {args.steps} --micro_batches {min(args.micro_batches)}: both start at 1")
    config = config_to_measure(args.deepspeed_config, args.micro_batch)
    device = join_world()
    ranks, micro_batch = dist.get_world_size(), config["train_micro_batch_size_per_gpu"]
    shape = gpt2.shape_of(args.model, len(load_tokenizer(get_preset(args.model).tokenizer)))
    with device:  # weights are drawn there, which takes a GPU seconds and a CPU minutes
        start = gpt2.whole_model(shape, args.seed).state_dict()
    start = {name: tensor.cpu() for name, tensor in start.items()}
    costs = profile_layers(shape, micro_batch, dtype_of(config))
    torch.manual_seed(args.seed)
    ids = torch.randint(shape.vocab_size, (micro_batch, shape.n_positions))
    table = Table(Path(args.run_dir) / "compare.json", COLUMNS)
    setting = Setting(args, config, shape, ids, device, table)
    for stage in args.zero:  # before the pipelines: they leave a grid behind that a plain engine stumbles over (0.19.8)
        setting.data_parallel(stage)
    for stages in (s for s in (1, 2, 4, 8) if s <= ranks and ranks % s == 0):
        setting.pipelines(stages, costs, start)
    if dist.get_rank() == 0:
        plot(table.rows, Path(args.run_dir) / "tokens_per_s.png", f"{args.model} on {ranks} ranks")
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
