"""Day 12: what out-of-memory looks like, and the ladder of cures, each with its gain in GiB and in tokens/s.

From the repository root, on two CPU processes, or on one GPU with a larger model:

    python day12/labs/oom.py
    python day12/labs/oom.py --ranks 1 --model gpt2-medium --micro_batch 8 --steps 6

Expect PyTorch's own complaint, then a table, oom.json and two plots in the run folder. Each trial is a process of its
own (trial.py), so that an out-of-memory leaves nothing behind: base with and without the limit, each cure without it to
see what it takes, and at the end the fastest that fits under the limit.
Checked with deepspeed 0.19.8. Source: config/plan.py (what takes how much); arXiv:1604.06174 (recomputation)
"""

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import default_ranks, run_ranks
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.run_log import default_run_dir

# What each rung of the ladder changes in the first one; {half} and the like are filled in from --micro_batch.
CASES = {
    "base": "",
    "half_batch": "--micro_batch {half} --accumulation 2",
    "batch_of_one": "--micro_batch 1 --accumulation {all}",
    "autocast": "--precision autocast",
    "bf16": "--precision bf16 --stage 1",
    "recompute": "--recompute",
    "loss_chunks": "--loss_chunks 8",
    "zero1": "--stage 1",
    "zero2": "--stage 2",
    "zero3": "--stage 3",
    "offload": "--stage 2 --offload",
    "together": "--precision bf16 --stage 2 --recompute --loss_chunks 8",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="rungs besides base")
    parser.add_argument("--limit_gib", type=float, help="memory of a rank in GiB (default: 3/4 of what base takes)")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences a rank and micro-batch")
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="processes, or GPUs")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day12"), help="folder for oom.json and plots")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    return parser.parse_args()


def trial(case: str, limit_gib: float | None, args: argparse.Namespace) -> dict:
    """Run trial.py's ranks; return its row, or {"error": the first complaint about memory}."""
    words = ["--model", args.model, "--steps", args.steps, "--seed", args.seed, "--micro_batch", args.micro_batch]
    words += CASES[case].format(half=args.micro_batch // 2, all=args.micro_batch).split()  # of two, the last one counts
    words += ["--limit_gib", limit_gib] if limit_gib else []
    ended = run_ranks(args.ranks, HERE / "labs/trial.py", *words)
    if row := re.search(r"^row (.*)$", ended[0].stdout, re.M):
        return json.loads(row[1])
    for rank in ended:
        if complaint := re.search(r"^no memory: rank \d+: (.*)$", rank.stdout, re.M):
            return {"error": complaint[1]}
    failed = next((rank for rank in ended if rank.returncode > 0), ended[0])
    lines = failed.stderr.strip().splitlines() or [f"exit code {failed.returncode}"]
    said = [line for line in lines if line.startswith("error: ")] or lines
    raise UserError(f"trial {case} failed, and not for want of memory: {said[-1].removeprefix('error: ')}")


COLUMNS = {
    "fits": "fits", "peak GiB": "peak_gib:.3f", "saved GiB": "saved_gib:.3f", "tok/s": "tokens_per_s:.0f",
    "speed": "speed:.2f", "last loss": "last_loss:.5f",
}  # fmt: skip


def climb(args: argparse.Namespace, base: dict, table: Table, limit_gib: float) -> None:
    """Add a row for each rung: what it takes, whether that is below the limit, and its speed, all beside base's."""
    base_gib = base["peak_bytes"] / 2**30
    for case in ["base", *(case for case in args.cases if case != "base")]:
        found = base if case == "base" else trial(case, None, args)
        row = {"case": case, "changes": CASES[case], "fits": "no"}
        if "error" in found:
            row["error"] = f"out of memory without the limit as well: {found['error']}"
        else:
            peak_gib = found["peak_bytes"] / 2**30
            row |= {"fits": "yes" if peak_gib <= limit_gib else "no", "peak_gib": peak_gib}
            row |= {"speed": found["tokens_per_s"] / base["tokens_per_s"], "saved_gib": base_gib - peak_gib}
            row |= {"tokens_per_s": found["tokens_per_s"], "losses": found["losses"], "last_loss": found["losses"][-1]}
        table.add(row)


def main() -> None:
    args = parse_args()
    get_preset(args.model)
    if args.micro_batch < 2 or args.micro_batch % 2:
        raise UserError(f"--micro_batch {args.micro_batch} cannot be halved: take an even number")
    if args.steps < 2:
        raise UserError(f"--steps {args.steps}: take 2 or more, the first is not timed")
    if args.limit_gib is not None and args.limit_gib <= 0:
        raise UserError(f"--limit_gib {args.limit_gib} leaves no memory at all")
    base = trial("base", None, args)
    if "error" in base:
        raise UserError(f"base does not even fit without a limit: a smaller --model or --micro_batch. {base['error']}")
    base_gib = base["peak_bytes"] / 2**30
    limit_gib = args.limit_gib or round(0.75 * base_gib, 3)
    complaint = trial("base", limit_gib, args).get("error", "nothing, it fits: set a lower --limit_gib")
    print(f"base takes {base_gib:.3f} GiB a rank; the limit is {limit_gib} GiB. Under it, base says:\n{complaint}\n")
    facts = {"model": args.model, "ranks": args.ranks, "limit_gib": limit_gib, "complaint": complaint}
    table = Table(Path(args.run_dir) / "oom.json", COLUMNS, **facts)
    climb(args, base, table, limit_gib)
    fitting = [row for row in table.rows if row["fits"] == "yes"]
    fastest = max(fitting, key=lambda row: row["tokens_per_s"])["case"] if fitting else None
    proof = "no rung fits"
    if fastest:  # and now in earnest
        row = trial(fastest, limit_gib, args)
        proof = row.get("error") or f"trains, {row['tokens_per_s']:.0f} tok/s, last loss {row['losses'][-1]:.5f}"
    print(f"fastest that fits, under the limit: {fastest}: {proof}")
    table.save(fastest=fastest, proof=proof)
    title = f"{args.model}, micro-batch {args.micro_batch}, {args.ranks} ranks, limit {limit_gib} GiB"
    table.bars("peak_gib", "peak GiB a rank", title, name="peak")
    table.bars("speed", "tokens/s, base = 1", title)
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
