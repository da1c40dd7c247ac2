"""Day 21: fragments - the same training on a GPU with four settings of the allocator: reserved beside allocated.

From the repository root, on one GPU:

    python day21/labs/fragments.py
    python day21/labs/fragments.py --steps 20 --micro_batch 4 --snapshot runs/snapshot.pickle

Expect a row for each setting, GPT-2 in bf16 with another sequence length in each step: the most that tensors took, the
most that was reserved, the gap between them; then the same settings with little more than tensors took, and who runs
out of memory. Then fragments.json; with --snapshot a memory snapshot of a few small steps, as .pickle and .gz.
The settings run at the same time, each in a process of its own: figures of memory are not touched by that as long as
the GPU has room for all, and times are; max_split, which takes several times what the others do, runs alone.
Checked with deepspeed 0.19.8. Source: https://docs.pytorch.org/docs/stable/notes/cuda.html (PYTORCH_CUDA_ALLOC_CONF)
"""

import argparse
import json
import os
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import free_port, join_world, run_together
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir
from day21.recompute import WAYS, recompute_every
from day21.shapes import add_shape_flags, build_shape
from day21.snapshot import save

COLUMNS = {
    "steps": "steps:d", "allocated MB": "allocated:MB", "reserved MB": "reserved:MB", "reserved/allocated": "ratio:.3f",
    "gap at the end MB": "gap:MB", "segments": "segments:d", "retries": "retries:d",
}  # fmt: skip
# case -> (PYTORCH_CUDA_ALLOC_CONF, DeepSpeed's checkpoints in buffers of their own)
CASES = {
    "default": ("", False), "expandable": ("expandable_segments:True", False),
    "max_split 256": ("max_split_size_mb:256", False), "recompute": ("", None), "contiguous": ("", True),
}  # fmt: skip
ALONE = ["max_split 256"]
LIMITED = ["default", "expandable", "max_split 256"]
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 5_000_000},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(parser, layers=12, hidden=768, heads=12, seq_len=1024, micro_batch=8, vocab=50257)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (not micro-batches)")
    parser.add_argument(
        "--room", type=float, default=1.05, help="limit of the second round, in what tensors took at most"
    )
    parser.add_argument("--limit_bytes", type=int, help="of a worker: all that it may reserve")
    parser.add_argument("--snapshot", help="record a snapshot of the first settings' small steps into this .pickle")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day21"), help="folder for fragments.json")
    return parser.parse_args()


def worker(args: argparse.Namespace, case: str) -> None:
    """Train with the settings of `case`, and print what the allocator says of it as one line, `row {...}`."""
    device = join_world()
    if args.limit_bytes:
        torch.cuda.set_per_process_memory_fraction(args.limit_bytes / get_accelerator().total_memory())
    if args.snapshot:
        torch.cuda.memory._record_memory_history(max_entries=200_000, stacks="python")
    model, _ = build_shape(args, "cpu")
    contiguous = CASES[case][1]
    if contiguous is not False:
        recompute_every(model, 1, WAYS["deepspeed"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    deepspeed.checkpointing.configure(
        None,
        partition_activations=bool(contiguous),
        contiguous_checkpointing=bool(contiguous),
        num_checkpoints=args.layers,
    )
    row, lengths = {"steps": 0}, random.Random(args.seed)
    try:
        for _ in range(args.steps):
            ids = torch.randint(args.vocab, (args.micro_batch, lengths.randrange(64, args.seq_len)), device=device)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            row["steps"] += 1
    except torch.OutOfMemoryError as error:
        row["complaint"] = " ".join(str(error).split())
    stats = torch.cuda.memory_stats()
    row |= {"allocated": stats["allocated_bytes.all.peak"], "reserved": stats["reserved_bytes.all.peak"]}
    row |= {"gap": stats["reserved_bytes.all.current"] - stats["allocated_bytes.all.current"]}
    row |= {"segments": stats["segment.all.current"], "retries": stats["num_alloc_retries"]}
    if args.snapshot:
        Path(args.snapshot).parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(args.snapshot)
        save(torch.cuda.memory._snapshot(), Path(args.snapshot).with_suffix(".gz"))
    sys.stdout.write(f"row {json.dumps(row)}\n")
    sys.stdout.flush()
    torch.distributed.destroy_process_group()


def run_cases(cases: list[str], args: argparse.Namespace, *more: object) -> dict[str, dict]:
    """Every case in a process of its own, all at once; return their rows."""
    words = [f"--{name}={getattr(args, name)}" for name in (*SHAPE, "steps", "seed")]
    words += ["--bf16"]
    worlds = [
        {"FRAGMENTS_CASE": case, "PYTORCH_CUDA_ALLOC_CONF": CASES[case][0], "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"} for case in cases
    ]  # fmt: skip
    rows = {}
    for case, ended in zip(cases, run_together(worlds, Path(__file__).resolve(), *words, *more), strict=True):
        if not (found := re.search(r"^row (.*)$", ended.stdout, re.M)):
            lines = (ended.stderr.strip() or ended.stdout).splitlines()
            said = [line for line in lines if line.startswith("error: ")] or lines
            raise UserError(f"{case} failed: {said[-1].removeprefix('error: ')}")
        rows[case] = json.loads(found[1])
    return rows


def record_snapshot(args: argparse.Namespace) -> None:
    """A few small steps of the first setting, with history, into the file that --snapshot names."""
    few = argparse.Namespace(**vars(args) | {"layers": 2, "hidden": 256, "heads": 4, "vocab": 4096, "steps": 4})
    run_cases(["default"], few, f"--snapshot={args.snapshot}")


SHAPE = ("family", "layers", "hidden", "heads", "seq_len", "micro_batch", "vocab")


def main() -> None:
    args = parse_args()
    if case := os.environ.get("FRAGMENTS_CASE"):
        worker(args, case)
        return
    if get_accelerator().device_name() != "cuda":
        raise UserError("this lab asks the allocator of a CUDA GPU; without one, day21/labs/replay.py tells the same")
    table = Table(Path(args.run_dir) / "fragments.json", COLUMNS, width=26, room=args.room)
    with ThreadPoolExecutor() as beside:
        recording = beside.submit(record_snapshot, args) if args.snapshot else None
        rows = run_cases([case for case in CASES if case not in ALONE], args)
        rows |= run_cases(ALONE, args)
    rows = {case: rows[case] for case in CASES}
    limit = int(args.room * rows["default"]["allocated"])
    limited = run_cases(LIMITED, args, f"--limit_bytes={limit}")
    for name, found in [*rows.items(), *((f"{case}, limited", row) for case, row in limited.items())]:
        table.add({"case": name, "ratio": found["reserved"] / found["allocated"], **found})
    for case, row in limited.items():
        print(f"\n{case}: {row.get('complaint', 'trained to the end')}")
    table.save(limit_bytes=limit)
    if recording:
        recording.result()  # raises what went wrong there
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
