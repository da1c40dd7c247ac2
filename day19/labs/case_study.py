"""Day 19: case study - a slow training step with five planted problems: found in traces, cured one by one, by turns.

From the repository root, on two CPU processes or two GPUs (one has no messages to bundle):

    deepspeed --num_accelerators 2 day19/labs/case_study.py
    deepspeed --num_accelerators 2 day19/labs/case_study.py --model gpt2 --micro_batch 8 --turns 9 --window 5

Expect a row for the slow step and one after each cure: milliseconds, the gain over the row before and over the first,
idle and open communication from the row's own trace; below it what the trace still has against it. Then case.json and
the traces, which day19/labs/read_trace.py reads. All cases take turns, so one bad minute meets them all.
Checked with deepspeed 0.19.8. Source: https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import losses_apart, ratio, take_turns
from bench.world import join_world
from common.data import load_corpus, load_tokenizer
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.ranks import print0
from common.run_log import default_run_dir
from day19.slow import PROBLEMS, OnTheFly, build_step, documents
from day19.traces import record_steps, shared_folder, summarize, suspects

COLUMNS = {
    "ms": "ms:,.1f", "gain": "gain:.2f", "in all": "total:.2f", "idle": "idle:.0%", "open comm": "exposed:.0%",
    "operations": "operations:,.0f", "messages": "messages:.0f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="cures, in this order")
    parser.add_argument("--turns", type=int, default=7, help="windows of each case, by turns")
    parser.add_argument("--window", type=int, default=3, help="steps between two looks at the clock")
    parser.add_argument("--trace_steps", type=int, default=2, help="steps in a trace")
    parser.add_argument("--micro_batch", type=int, default=4, help="sequences a rank and micro-batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day19"), help="folder for case.json and the traces")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def look_into(step: Callable, path: Path, steps: int) -> dict:
    """Record `step`, and return what the row takes from the trace of this rank."""
    trace = record_steps(step, path, steps)
    page, found = summarize(trace), suspects(trace)
    row = {"idle": page["idle_ms"] / page["step_ms"], "exposed": page["exposed_ms"] / page["step_ms"]}
    return row | {"found": " ".join(found) or "none", "suspects": found, "operations": page["operations"],
                  "messages": page["messages"], "verdict": page["verdict"], "page": page}  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.turns < 2 or min(args.window, args.trace_steps) < 1:
        sizes = f"--turns {args.turns} --window {args.window} --trace_steps {args.trace_steps}"
        raise UserError(f"{sizes}: two turns or more, the first does not count; the others start at 1")
    join_world()
    run_dir = shared_folder(args.run_dir)
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    data = OnTheFly(documents(blocks, tokenizer), tokenizer, preset.block_size)
    cases = {"slow": set()}
    for number, problem in enumerate(args.order, start=1):
        cases[f"{number}. {problem}"] = set(args.order[:number])
    steps = {case: build_step(cured, args.model, args.micro_batch, data, args.seed) for case, cured in cases.items()}

    def window(step: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        return [step() for _ in range(args.window)]

    runs = take_turns({case: partial(window, step) for case, step in steps.items()}, args.turns)
    losses = {case: [loss.item() for _, losses in runs[case] for loss in losses] for case in cases}
    table = Table(run_dir / "case.json", COLUMNS, width=16, problems=PROBLEMS, ranks=dist.get_world_size())
    before = "slow"
    for case, step in steps.items():
        path = run_dir / f"case_{case.split()[-1]}_rank{dist.get_rank()}.json.gz"
        row = {"case": case, "ms": 1e3 * median(seconds for seconds, _ in runs[case][1:]) / args.window}
        row |= {"gain": ratio(runs[before], runs[case]), "total": ratio(runs["slow"], runs[case])}
        row["losses"] = losses[case]
        row["losses_apart"] = losses_apart(losses[case], losses["slow"])
        table.add(row | look_into(step, path, args.trace_steps))
        found = table.rows[-1]["suspects"] or {"no suspect": "none of the five signs is in this trace"}
        print0("\n".join(f"    {name}: {said}" for name, said in found.items()))
        before = case
    last = table.rows[-1]
    apart = max(row["losses_apart"] for row in table.rows)
    print0(f"in all {last['total']:.2f} times as fast; losses at most {apart:.1e} apart | {last['verdict']}")
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
