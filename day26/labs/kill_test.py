"""Day 26: kill a run at random moments of every stage, run it to the end, and compare with one left in peace.

    python day26/labs/kill_test.py
    python day26/labs/kill_test.py --kills 10 --kill_seed 3 --run_dir runs/day26/kills

Expect a line a kill (the stage, the moment, who was killed), and in the end whether weights, data, loss curve and
evaluation are the same to the bit. The exit code says so too. On two CPU processes; a few minutes.
Checked with deepspeed 0.19.8. Source: day18/supervise.py; man 2 kill.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import command_of, default_ranks, kill_all, launch_command, process_tree
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir
from day17.checkpoints import sha256

# A stage, how one sees from outside that it is over, or has begun, and how long after that the kill may come (seconds).
STAGES = {
    "start": (lambda run: False, lambda run, since: True, 8.0),
    "prepare": (
        lambda run: (run / "data/manifest.json").exists(),
        lambda run, since: (run / "data/work").exists(),
        2.0,
    ),
    "train": (lambda run: over(run), lambda run, since: changed(run / "metrics.jsonl", since), 1.0),
    "save": (lambda run: over(run), lambda run, since: any(run.glob("checkpoints/partial_step*")), 0.1),
    "model": (lambda run: (run / "model").exists(), lambda run, since: (run / "partial_model").exists(), 0.02),
    "evaluate": (lambda run: (run / "evaluation.json").exists(), lambda run, since: (run / "model").exists(), 0.8),
}
COLUMNS = {"run": "run", "stage": "stage", "s in": "after_s:.2f", "killed": "killed", "newest": "newest"}
STEPS = 12
SMALL = ["data.sources=[data/moby_dick.jsonl.xz]", "data.chunk_mb=0.2", "data.shard_mb=0.4", "data.held_out_share=0.3"]
SMALL += ["train.log_every=1", "train.eval_every=10", "checkpoint.save_every=3", "evaluate.max_blocks=32"]
SMALL += ["evaluate.items=20", "evaluate.sample_tokens=8"]


def over(run: Path) -> bool:
    """Whether the last step has been saved."""
    return (run / f"checkpoints/step{STEPS:06d}").exists()


def changed(path: Path, since: float) -> bool:
    return path.exists() and path.stat().st_mtime > since


def launch(args: argparse.Namespace, run: Path) -> subprocess.Popen:
    command = launch_command(args.ranks, HERE / "train.py", "--run_dir", run, "--steps", STEPS, *SMALL)
    log = open(run.parent / f"{run.name}.log", "a")  # noqa: SIM115 - the process writes on
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_once(args: argparse.Namespace, run: Path, stage: str, delay_s: float, rank: int | None) -> str:
    """Launch, wait for the stage, wait `delay_s`, kill; return who was killed, or "nobody": it had ended."""
    begun, since = STAGES[stage][1], time.time()
    process = launch(args, run)
    while process.poll() is None and not begun(run, since):
        time.sleep(0.002)
    time.sleep(delay_s)
    everybody = process_tree(process.pid)
    if process.poll() is not None:
        return "nobody"
    only = [victim for victim in everybody if f"--local_rank={rank}" in command_of(victim)]
    if only:
        kill_all(only)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)  # the launcher ends the others
    kill_all([*everybody, *process_tree(process.pid)])
    process.wait()
    return f"rank {rank}" if only else "all"


def what_came_out(run: Path) -> dict[str, object]:
    """What must be the same: weights, everything in the log but clocks (MFU is one) and memory, the evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    differ = ("tokens_per_s", "mfu_ratio", "memory_gib")
    rows = [{key: value for key, value in row.items() if key not in differ} for row in rows]
    return {
        "weights": sha256(run / "model/model.safetensors"),
        "data": sha256(run / "data/manifest.json"),
        "loss curve": rows,
        "evaluation": json.loads((run / "evaluation.json").read_text()),
    }


def first_difference(want: list[dict], found: list[dict]) -> str:
    """Where two logs part, in words."""
    for one, other in zip(want, found, strict=False):
        if keys := [key for key in one | other if one.get(key) != other.get(key)]:
            values = ", ".join(f"{key} {other.get(key)} instead of {one.get(key)}" for key in keys)
            return f"step {one.get('step')}: {values}"
    return f"{len(found)} rows instead of {len(want)}"


def kill_runs(args: argparse.Namespace, folder: Path, chance: random.Random) -> Table:
    """Kill `args.kills` times: a run once in each stage that it has before it, then the next run; all reach the end."""
    table = Table(folder / "kill_test.json", COLUMNS, width=10)
    number = 0
    while len(table.rows) < args.kills:
        number += 1
        run = folder / f"killed_{number}"
        for stage, (is_over, _, longest_s) in STAGES.items():
            delay_s, rank = chance.uniform(0, longest_s), chance.choice([None] * args.ranks + list(range(args.ranks)))
            if len(table.rows) == args.kills or is_over(run):
                continue
            who = kill_once(args, run, stage, delay_s, rank)
            if who == "nobody":  # the run had come to its end
                break
            newest = max((path.name for path in run.glob("checkpoints/step*")), default="none")
            kill = len(table.rows) + 1
            row = {"case": f"kill {kill}", "kill": kill, "run": number, "stage": stage, "after_s": delay_s}
            table.add(row | {"killed": who, "newest": newest})
        if code := launch(args, run).wait():
            raise UserError(f"run {number} did not come to its end: exit code {code}, {folder / run.name}.log")
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how often a run is killed, each in every stage in turn")
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="processes of each launch, or GPUs")
    parser.add_argument("--kill_seed", type=int, default=0, help="seed of the moments and the victims")
    parser.add_argument("--run_dir", default=default_run_dir("day26"), help="folder for kill_test.json and the runs")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    chance, folder = random.Random(args.kill_seed), Path(args.run_dir).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if code := launch(args, folder / "peace").wait():
        raise UserError(f"the run left in peace ended with exit code {code}: look at {folder / 'peace.log'}")
    table = kill_runs(args, folder, chance)
    peace, runs = what_came_out(folder / "peace"), sorted(folder.glob("killed_*/"))
    same = {name: all(what_came_out(run)[name] == peace[name] for run in runs) for name in peace}
    words = [f"{name} {'the same' if same[name] else 'DIFFERS'}" for name in same]
    print(f"{len(runs)} runs, {args.kills} kills, run to the end: " + " | ".join(words))
    for run in runs if not same["loss curve"] else []:
        print(f"{run.name}: {first_difference(peace['loss curve'], what_came_out(run)['loss curve'])}")
    table.save(same=same)
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    with clear_errors():
        main()
