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
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.errors import UserError, clear_errors
from common.model import get_preset
from common.plots import plot_bars
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path

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
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2, help="processes, or GPUs")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day12"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="mini", help="preset of common/model.py")
    parser.add_argument("--port", type=int, default=29500, help="port on which rank 0 waits for the others")
    return parser.parse_args()


def trial(case: str, limit_gib: float | None, args: argparse.Namespace) -> dict:
    """Start trial.py's ranks, as the launcher would; return its row, or {"error": the first complaint}."""
    changes = CASES[case].format(half=args.micro_batch // 2, all=args.micro_batch).split()
    command = [
        sys.executable,
        HERE / "labs/trial.py",
        "--model",
        args.model,
        "--steps",
        args.steps,
        "--seed",
        args.seed,
    ]
    command += [*(["--micro_batch", args.micro_batch] if "--micro_batch" not in changes else []), *changes]
    command += ["--limit_gib", limit_gib] if limit_gib else []
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port), "WORLD_SIZE": str(args.ranks)}
    processes = [
        subprocess.Popen(
            [str(word) for word in command], env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(args.ranks)
    ]  # fmt: skip
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        time.sleep(0.05)
    for process in processes:  # one that failed ends them all: the others wait for it in vain
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
    outputs = [process.communicate() for process in processes]
    if row := re.search(r"^row (.*)$", outputs[0][0], re.M):
        return json.loads(row[1])
    complaint = next((found[1] for out, _ in outputs if (found := re.search(r"^rank \d+: (.*)$", out, re.M))), None)
    if complaint is None:
        raise UserError(f"trial {case} failed, and not for want of memory: {outputs[0][1].strip().splitlines()[-1]}")
    return {"error": complaint}


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
    base_gib, table, run_dir = base["peak_bytes"] / 2**30, [], Path(args.run_dir)
    limit_gib = args.limit_gib or round(0.75 * base_gib, 3)
    complaint = trial("base", limit_gib, args).get("error", "nothing, it fits: set a lower --limit_gib")
    print(f"base takes {base_gib:.3f} GiB a rank; the limit is {limit_gib} GiB. Under it, base says:\n{complaint}\n")
    print(f"{'case':14}{'fits':>6}{'peak GiB':>10}{'saved GiB':>11}{'tok/s':>9}{'speed':>8}{'last loss':>11}")
    for case in ["base", *(case for case in args.cases if case != "base")]:
        row = base if case == "base" else trial(case, None, args)
        if "error" in row:
            table.append({"case": case, "changes": CASES[case], "fits": "no", "error": row["error"]})
            print(f"{case:14}{'no':>6}  out of memory without the limit as well")
            continue
        peak_gib, speed = row["peak_bytes"] / 2**30, row["tokens_per_s"] / base["tokens_per_s"]
        fits = "yes" if peak_gib <= limit_gib else "no"
        table.append({"case": case, "changes": CASES[case], "fits": fits, "peak_gib": peak_gib, "speed": speed})
        table[-1] |= {"saved_gib": base_gib - peak_gib, "tokens_per_s": row["tokens_per_s"], "losses": row["losses"]}
        numbers = f"{peak_gib:>10.3f}{base_gib - peak_gib:>11.3f}{row['tokens_per_s']:>9.0f}{speed:>8.2f}"
        print(f"{case:14}{fits:>6}{numbers}{row['losses'][-1]:>11.5f}", flush=True)
    fitting = [row for row in table if row["fits"] == "yes"]
    fastest = max(fitting, key=lambda row: row["tokens_per_s"], default=None)
    if fastest:  # and now in earnest
        proof = trial(fastest["case"], limit_gib, args)
        proof = proof.get("error") or f"trains, {proof['tokens_per_s']:.0f} tok/s, last loss {proof['losses'][-1]:.5f}"
    else:
        proof = "no rung fits"
    print(f"fastest that fits, under the limit: {fastest and fastest['case']}: {proof}")
    write_results(
        run_dir / "oom.json", this_command(), model=args.model, ranks=args.ranks, limit_gib=limit_gib,
        complaint=complaint, fastest=fastest and fastest["case"], proof=proof, table=table,
    )  # fmt: skip
    trained = [row for row in table if "peak_gib" in row]
    title = f"{args.model}, micro-batch {args.micro_batch}, {args.ranks} ranks, limit {limit_gib} GiB"
    plot_bars({row["case"]: row["peak_gib"] for row in trained}, run_dir / "peak.png", title, "peak GiB a rank")
    plot_bars({row["case"]: row["speed"] for row in trained}, run_dir / "speed.png", title, "tokens/s, base = 1")
    print(f"table: {show_path(run_dir)}/oom.json | plots: peak.png, speed.png")


if __name__ == "__main__":
    with clear_errors():
        main()
