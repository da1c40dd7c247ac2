"""Day 14: A/A test - the same step against itself: how often is a difference seen that is not there?

From the repository root, on two CPU processes or on GPUs:

    deepspeed --num_accelerators 2 day14/labs/aa.py
    deepspeed --num_accelerators 1 day14/labs/aa.py --model gpt2 --deepspeed_config day14/ds_config_bf16.json

Expect a table: for each way to measure, in how many trials A and B were over 5 % apart, and in how many the verdict
was wrong; aa.json with every time, and aa.png. One training runs and each step is timed. As A and B are the same step,
which time is A's and which is B's can be said afterwards: every way is tried on the same times.
Checked with deepspeed 0.19.8. Source: Mytkowicz et al. 2009 (ASPLOS), Producing Wrong Data.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import time_step
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.plots import save_plot
from common.ranks import print0
from common.run_log import default_run_dir
from config.read import read_config
from day14.cases import Case, load_workload
from day14.designs import DESIGNS, concluded, echo
from day14.stats import MIN_TURNS

COLUMNS = {
    "lowest": "low:.3f", "highest": "high:.3f", "over 5 % apart": "over_5:d", "wrong verdict": "wrong:d",
    "trials": "trials:d",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config_micro4.json"), help="DeepSpeed JSON config")
    parser.add_argument("--trials", type=int, default=40, help="comparisons of A with A")
    parser.add_argument("--turns", type=int, default=15, help="steps of A, and of B, in a trial")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--seq_len", type=int, help="tokens of a sequence (default: what the model takes)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day14"), help="folder for aa.json and aa.png")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    args = parser.parse_args()
    if args.turns < MIN_TURNS or args.trials < 1:
        raise UserError(f"--turns {args.turns} --trials {args.trials}: at least {MIN_TURNS} turns, and a trial")
    return args


def time_steps(case: Case, count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` steps on the slowest rank. The ranks compare at the end: nothing is in between."""
    mine = torch.tensor([time_step(case.step)[0] for _ in range(count)], device=device)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return mine.tolist()


def tabulate(times: list[float], table: Table, trials: int, turns: int) -> None:
    """A row for each way to measure: what it makes of the same times, cut into trials."""
    for name, design in DESIGNS.items():
        found = []
        for trial in range(trials):
            steps = iter(times[2 * turns * trial : 2 * turns * (trial + 1)])
            found.append(concluded(design, lambda _, steps=steps: next(steps), turns, seed=trial))
        ratios = [ratio for ratio, _ in found]
        over_5 = sum(abs(ratio - 1) > 0.05 for ratio in ratios)
        row = {"case": name, "low": min(ratios), "high": max(ratios), "over_5": over_5, "trials": trials}
        table.add(row | {"wrong": sum(verdict != "cannot tell" for _, verdict in found), "ratios": ratios})


def draw(times: list[float], rows: list[dict], path: Path, title: str) -> None:
    """Above, the times, one step after the other; below, a dot a trial for each way to measure."""
    figure, (above, below) = plt.subplots(2, figsize=(8, 6), height_ratios=[2, 3], layout="constrained")
    above.plot([1e3 * seconds for seconds in times], ".", markersize=2)
    above.set(xlabel="step", ylabel="ms", yscale="log", title=title)
    for at, row in enumerate(rows):
        spread = [at + 0.3 * (trial / max(1, row["trials"] - 1) - 0.5) for trial in range(row["trials"])]
        below.plot(row["ratios"], spread, "o", markersize=4, alpha=0.6)
    below.axvspan(0.95, 1.05, color="green", alpha=0.12)
    below.axvline(1.0, color="black", linewidth=1)
    below.set_yticks(range(len(rows)), [f"{r['case']}\n{r['over_5']} of {r['trials']} > 5 %" for r in rows])
    below.set(xlabel="A / B, the same step twice: all should be 1 (green: within 5 %)", ylim=(len(rows) - 0.5, -0.5))
    save_plot(figure, below, path)


def main() -> None:
    args = parse_args()
    config = read_config(args.deepspeed_config, needs=["optimizer.type"])
    device = join_world()
    workload = load_workload(args.model, args.corpus, args.seq_len, args.seed, device)
    case = Case("A", config, workload, device, args.seed)
    case.window(10)  # warm up
    times = time_steps(case, 2 * args.turns * args.trials, device)
    middle = sorted(times)[len(times) // 2]
    echoes = {lag: echo(times, lag) for lag in (1, 10, 100) if 4 * lag < len(times)}
    said = ", ".join(f"{found:.2f} after {lag}" for lag, found in echoes.items())
    print0(f"{len(times)} steps, median {1e3 * middle:.1f} ms | correlation with an earlier step: {said}")
    table = Table(Path(args.run_dir) / "aa.json", COLUMNS, model=args.model, turns=args.turns, step_s=times)
    tabulate(times, table, args.trials, args.turns)
    table.save(echo=echoes)
    if dist.get_rank() == 0:
        title = f"{args.model}, {dist.get_world_size()} rank(s): {len(times)} times of one step"
        draw(times, table.rows, Path(args.run_dir) / "aa.png", title)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
