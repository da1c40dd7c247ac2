"""Day 08: who hides the all-reduce? A step of each way on a link of known speed: time, bytes, and what overlapped.

On one machine, as root (CPU; it makes two hosts and a link between them), or on whatever joins your ranks or GPUs:

    python day08/labs/overlap.py
    python day08/labs/overlap.py --answer exercise
    deepspeed --num_accelerators 2 day08/labs/overlap.py --model gpt2 --block 1024 --tokens 8192 --bucket_mib 25

Expect a row for each way, overlap.json, and overlap.png: when each step computed, and when it communicated. With
--answer your exercise is one more row, and has to reach its targets.
Checked with deepspeed 0.19.8 and torch 2.13.0. Source: day08/ways.py; torchtitan pull request 3020.
"""

import argparse
import importlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.link import sent_over_link
from bench.results import this_command, write_results
from bench.table import Table
from bench.timing import ratio, slowest_median, take_turns
from bench.trace import ON_DEVICE, trace_step, union_ms
from bench.traffic import ring_share
from bench.world import join_world
from common.data import load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.plots import save_plot
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir, show_path
from day08.messages import BACKENDS
from day08.ways import WAYS, build_step
from day08.wire import run_on_link, started_by_launcher

TARGET_BYTES, TARGET_TIME = 1.02, 1.15  # of the formula, of DDP's
COLUMNS = {
    "ms": "ms:,.1f",
    "of DDP": "of_ddp:.2f",
    "sent/formula": "wire:.3f",
    "communicating": "comm_ms:,.1f",
    "hidden": "hidden:.0%",
}
COLUMNS |= {"loss": "loss:.6f"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of day08/ways.py")
    parser.add_argument("--answer", choices=["exercise", "solution"], default=None, help="whose DataParallel to add")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per rank and step")
    parser.add_argument("--block", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--turns", type=int, default=6, help="steps of each way, the first two of them to warm up")
    parser.add_argument("--bucket_mib", type=int, default=1, help="MiB of gradients in a bucket")
    parser.add_argument("--rate", default="200mbit", help="speed of the link, in tc's words")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--run_dir", default=default_run_dir("day08"), help="folder for overlap.json and overlap.png")
    return parser.parse_args()


def step_of_answer(name: str, model: torch.nn.Module, bucket_mib: int):
    """Return step(batch) -> loss with DataParallel of day08/exercise.py or day08/solution.py."""
    mine = importlib.import_module(f"day08.{name}").DataParallel(model, bucket_mib * 2**20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        mine.finish()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def spans(step, path: Path) -> dict[str, list[dict]]:
    """Events of one step, of its collectives and of its computation: kernels on a GPU, operators on a CPU."""
    events = trace_step(step, path)
    on_gpu = [event for event in events if event.get("cat") in ON_DEVICE]
    if on_gpu:
        parts = {True: [], False: []}
        for event in on_gpu:
            parts["nccl" in event["name"].lower()].append(event)
        return {"comm": parts[True], "compute": parts[False]}
    comm = [event for event in events if event["name"].startswith(BACKENDS)]
    return {"comm": comm, "compute": [event for event in events if event["name"].startswith("aten::")]}


def merged(events: list[dict], start: float) -> list[tuple[float, float]]:
    """The events as (begin, length) in ms after `start`, those that nearly touch joined: bars to draw."""
    bars: list[list[float]] = []
    times = sorted(((e["ts"] - start) / 1e3, (e["ts"] + e["dur"] - start) / 1e3) for e in events)
    gap = times[-1][1] / 400 if times else 0.0  # the width of a line in the picture
    for begin, end in times:
        if bars and begin <= bars[-1][1] + gap:
            bars[-1][1] = max(bars[-1][1], end)
        else:
            bars.append([begin, end])
    return [(round(begin, 2), round(end - begin, 2)) for begin, end in bars]


def look(way: str, step, num_bytes: int, args: argparse.Namespace, device: torch.device) -> dict:
    """Count the bytes of one step, where there is a wire to meter, and trace another. Collective."""
    dist.barrier()
    before = sent_over_link() if on_link() else 0
    step()
    dist.barrier()
    sent = sent_over_link() - before if on_link() else None
    found = spans(step, Path(args.run_dir) / f"{way}_rank{dist.get_rank()}.trace.json")
    comm, compute, both = (
        over_ranks(union_ms(events), device)
        for events in (found["comm"], found["compute"], found["comm"] + found["compute"])
    )
    start = min(event["ts"] for event in found["compute"])
    bars = {kind: merged(events, start) for kind, events in found.items()}
    wire = sent and sent / (ring_share("all_reduce", dist.get_world_size()) * num_bytes)
    return {
        "wire": wire,
        "comm_ms": comm,
        "hidden": max(0.0, comm + compute - both) / comm if comm else None,
        "bars": bars,
    }


def on_link() -> bool:
    """Whether this rank runs on a host that wire.py made: gloo is told its interface."""
    return os.environ.get("GLOO_SOCKET_IFNAME") == "eth0" and os.environ["MASTER_ADDR"].startswith("10.77.")


def measure(args: argparse.Namespace) -> None:
    """What each rank does. Collective."""
    device = join_world()
    if device.type == "cpu":
        torch.set_num_threads(max(1, os.cpu_count() // dist.get_world_size()))  # the ranks share the cores
    else:
        torch.set_float32_matmul_precision("high")  # TF32
    tokenizer = load_tokenizer(get_preset(args.model).tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, args.block)
    count = max(1, args.tokens // args.block)
    ids = torch.stack([blocks[dist.get_rank() * count + i]["input_ids"] for i in range(count)])
    batch = to_device({"input_ids": ids, "labels": ids}, device)
    steps = {}
    for way in [*args.ways, *(["yours"] if args.answer else [])]:
        torch.manual_seed(args.seed)
        model = build_model(args.model, len(tokenizer)).to(device)
        num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
        if way == "yours":
            steps[way] = partial(step_of_answer(args.answer, model, args.bucket_mib), batch)
        else:
            steps[way] = partial(build_step(way, model, args.bucket_mib), batch)
    cases = {}
    for way, step in steps.items():
        cases |= {f"before {way}": dist.barrier, way: step}  # or one rank's delay is the next way's
    runs = take_turns(cases, args.turns)
    table = Table(Path(args.run_dir) / "overlap.json", COLUMNS, ranks=dist.get_world_size())
    for way, step in steps.items():
        row = {"case": way, "ms": 1e3 * slowest_median([s for s, _ in runs[way]], device, warm_up=2)}
        if "ddp" in steps:  # turn by turn: what slows the machine meanwhile meets both
            row["of_ddp"] = over_ranks(1 / ratio(runs["ddp"], runs[way], warm_up=2), device, "max")
        row["loss"] = over_ranks(float(runs[way][-1][1]), device)  # of the last turn: the same number of updates in all
        table.add(row | look(way, step, num_bytes, args, device))
    runs.clear()
    for step in steps.values():
        if hasattr(step.func, "engine"):
            step.func.engine.destroy()
    steps.clear()
    cases.clear()
    dist.destroy_process_group()


def draw(rows: list[dict], path: Path, title: str) -> None:
    """For each way, what rank 0 computed (blue) and communicated (orange), over the milliseconds of a step."""
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.55 * len(rows)))
    for at, row in enumerate(rows):
        for kind, color, shift in (("compute", "C0", -0.38), ("comm", "C1", 0.02)):
            label = {"compute": "computes", "comm": "communicates"}[kind] if at == 0 else None
            axes.broken_barh(row["bars"][kind], (at + shift, 0.36), facecolors=color, label=label)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="ms of one step, traced on rank 0", title=title)
    save_plot(figure, axes, path)


def judge(rows: dict[str, dict]) -> None:
    """UserError when the answer misses a target."""
    yours = rows["yours"]
    if yours["wire"] and yours["wire"] > TARGET_BYTES:
        raise UserError(f"not yet: yours sends {yours['wire']:.2f} times the formula's bytes, want {TARGET_BYTES}")
    if yours["of_ddp"] > TARGET_TIME:
        raise UserError(f"not yet: yours takes {yours['of_ddp']:.2f} times DDP's time, want {TARGET_TIME}")
    print0(f"solved: {yours['of_ddp']:.2f} times DDP's time, {yours['wire'] or 1:.3f} times the formula's bytes")


def main() -> None:
    args = parse_args()
    if args.turns < 3 or args.answer and "ddp" not in args.ways:
        raise UserError(f"--turns {args.turns}: at least 3, two warm up; --answer is compared with ddp of --ways")
    folder = Path(args.run_dir)
    if started_by_launcher():
        measure(args)
        if os.environ["RANK"] != "0" or on_link():
            return
        rows, where = json.loads((folder / "overlap.json").read_text())["table"], "as launched"
    else:
        flags = ["--ways", *args.ways, "--model", args.model, "--tokens", args.tokens, "--block", args.block]
        flags += ["--turns", args.turns, "--bucket_mib", args.bucket_mib, "--seed", args.seed, "--corpus", args.corpus]
        flags += ["--answer", args.answer] if args.answer else []
        rows = run_on_link([args.rate], folder, HERE / "labs/overlap.py", *flags)[args.rate]["table"]
        where = args.rate
        write_results(folder / "overlap.json", this_command(), table=rows)
    draw(rows, folder / "overlap.png", f"{args.model}, {args.tokens:,} tokens per rank, {where}")
    print0(f"table: {show_path(folder)}/overlap.json")
    if args.answer:
        judge({row["case"]: row for row in rows})


if __name__ == "__main__":
    with clear_errors():
        main()
