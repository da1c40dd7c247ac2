"""Day 16: compare - stages x micro-batches: tokens/s, the bubble beside its formula, and ZeRO on the same ranks.

From the repository root, on two CPU processes or two GPUs; the second on four GPUs (bf16):

    deepspeed --num_accelerators 2 day16/labs/compare.py
    deepspeed --num_accelerators 4 day16/labs/compare.py --model gpt2-xl --deepspeed_config day16/ds_config_bf16.json

Expect a row for each way and number of micro-batches: tokens/s, the part of the time that the ranks waited, the
formula's bubble, the wait that the stages' own times explain, and the bytes a rank holds; compare.json and a plot.
Checked with deepspeed 0.19.8. Source: arXiv:2104.04473, section 2.2; deepspeed/runtime/pipe/engine.py.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from common.cpu import start_without_compiler
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.plots import plt, save_plot
from common.ranks import over_ranks, print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path
from day16 import gpt2_pipe as gpt2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--micro_batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="to go through")
    parser.add_argument("--zero", nargs="*", type=int, default=[1, 3], help="ZeRO stages of plain data parallelism")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day16"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--micro_batch", type=int, help="sequences of a micro-batch, in place of the config's number")
    return parser.parse_args()


def timed(step: Callable, steps: int) -> list[float]:
    """Seconds of `steps` steps after one that warms up; the ranks begin together."""
    seconds = []
    for _ in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        step()
        get_accelerator().synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def waits(engine, step: Callable, steps: int) -> tuple[float, float]:
    """(part of the pipeline's time in which a rank waited, the part that the stages' own times explain), measured.

    The pipeline's time ends with the first stage's last backward pass: bubbles are in there, the optimizer is not.
    """
    clock, waited, explained, micro_batches = gpt2.StageClock(engine), [], [], engine.micro_batches
    for _ in range(steps):
        dist.barrier()
        start = time.perf_counter()
        step()
        found = gpt2.from_all_ranks((engine.stage_id, clock.ended - start, clock.take()))
        span = max(seconds for _, seconds, _ in found)
        waited.append(1 - sum(busy for *_, busy in found) / len(found) / span)
        each = [max(busy for at, _, busy in found if at == s) / micro_batches for s in range(engine.num_stages)]
        explained.append(1 - micro_batches * sum(each) / len(each) / gpt2.shortest_step(each, micro_batches))
    clock.stop()
    return median(waited), median(explained)


def plot(table: list[dict], path: Path, title: str) -> None:
    """Tokens/s against micro-batches, a line for each way."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for way in dict.fromkeys(row["way"] for row in table):
        points = [(row["micro_batches"], row["tokens_per_s"]) for row in table if row["way"] == way]
        axes.plot(*zip(*points, strict=True), "o-", label=way)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="micro-batches of a step", ylabel="tokens/s", ylim=(0, None), title=title)
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    require_launcher()
    if min(args.steps, *args.micro_batches) < 1:
        raise UserError(f"--steps {args.steps} --micro_batches {min(args.micro_batches)}: both start at 1")
    config = gpt2.config_to_measure(args.deepspeed_config, args.micro_batch)
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    ranks, device = dist.get_world_size(), torch.device(get_accelerator().current_device_name())
    micro_batch = config["train_micro_batch_size_per_gpu"]
    vocab_size = len(load_tokenizer(get_preset(args.model).tokenizer))
    shape = gpt2.shape_of(args.model, vocab_size)
    with device:  # weights are drawn there, which takes a GPU seconds and a CPU minutes
        start = gpt2.whole_model(shape, args.seed).state_dict()
    start = {name: tensor.cpu() for name, tensor in start.items()}
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    costs = gpt2.profile_layers(shape, micro_batch, dtype)
    torch.manual_seed(args.seed)
    ids = torch.randint(vocab_size, (micro_batch, shape.n_positions))
    here, table = ids.to(device), []
    # What lay here before an engine was built; referenced, so that no address is used twice. (ZeRO-3 engines leave
    # tensors behind when destroyed, and on CPU the whole model lies here as well.)
    before = {}
    print0("way                | micro-batches |   tok/s | waited | formula | explained | MB a rank")

    def add(way: str, engine, step: Callable, micro_batches: int, stages: int) -> None:
        seconds = over_ranks(median(timed(step, args.steps)), device, "max")
        row = {"way": way, "stages": stages, "micro_batches": micro_batches, "batch": engine.train_batch_size()}
        row["tokens_per_s"] = engine.train_batch_size() * shape.n_positions / seconds
        row |= {"waited": None, "formula": None, "explained": None}
        if stages > 1:
            row["waited"], row["explained"] = waits(engine, step, args.steps)
            row["formula"] = (stages - 1) / (micro_batches + stages - 1)
        new = [tensor for at, tensor in live_tensors(device).items() if at not in before]
        held = sum(tensor.untyped_storage().nbytes() for tensor in new)
        row["held_bytes"] = over_ranks(held, device, "max")
        del new
        table.append(row)
        cells = ["     –" if row[k] is None else f"{row[k]:6.3f}" for k in ("waited", "formula", "explained")]
        figures = f"{row['tokens_per_s']:7.0f} | {cells[0]} | {cells[1]:>7} | {cells[2]:>9}"
        print0(f"{way:18} | {micro_batches:13} | {figures} | {row['held_bytes'] / 1e6:9.1f}")
        if dist.get_rank() == 0:  # after each row, so that an interrupted run leaves what it has
            write_results(Path(args.run_dir) / "compare.json", this_command(), table=table)

    def free() -> None:
        """Empty what an engine made: `engine.destroy()` leaves the tensors of stage 3 alive (0.19.8)."""
        gc.collect()
        for at, tensor in live_tensors(device).items():
            if at not in before and tensor.untyped_storage().resizable():
                tensor.untyped_storage().resize_(0)
        get_accelerator().empty_cache()

    # Before the pipelines: they leave a grid behind that a plain engine stumbles over (0.19.8).
    for stage in args.zero:  # the whole model on every rank, without PipelineModule: stages 2 and 3 are possible here
        zero = {"reduce_bucket_size": 500_000} | config["zero_optimization"] | {"stage": stage}  # default: 2 GB
        zero = config | {"zero_optimization": zero}
        for micro_batches in args.micro_batches:
            zero["gradient_accumulation_steps"] = micro_batches
            before = live_tensors(device)
            with device:
                model = gpt2.whole_model(shape, args.seed)
            engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=dict(zero))

            def step(engine=engine, micro_batches=micro_batches) -> None:
                for _ in range(micro_batches):
                    engine.backward(engine(input_ids=here, labels=here).loss)
                    engine.step()

            add(f"{ranks} x zero {stage}", engine, step, micro_batches, 1)
            engine.destroy()
            del engine, model, step
            free()

    for stages in (s for s in (1, 2, 4, 8) if s <= ranks and ranks % s == 0):
        before = live_tensors(device)
        with device:
            module = gpt2.CutPipeline(
                gpt2.layer_specs(shape), num_stages=stages, loss_fn=gpt2.next_token_loss,
                partition_method=gpt2.best_balanced(costs, stages), checkpointable_layers=["GPT2Block"],
            )  # fmt: skip
        gpt2.load_hf(module, shape, start)
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
        for micro_batches in args.micro_batches:
            engine.set_train_batch_size(micro_batch * micro_batches * engine.dp_world_size)
            batches = [(ids, ids)] * micro_batches
            add(
                f"{ranks // stages} x {stages} stages", engine,
                lambda engine=engine, batches=batches: engine.train_batch(iter(batches)), micro_batches, stages,
            )  # fmt: skip
        engine.destroy()
        del engine, module
        free()

    if dist.get_rank() == 0:
        plot(table, Path(args.run_dir) / "tokens_per_s.png", f"{args.model} on {ranks} ranks")
        print0(f"table: {show_path(args.run_dir)}/compare.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
