"""Day 26: what the package costs - day 12's program and the capstone train the same model by turns.

    python day26/labs/speed.py
    python day26/labs/speed.py --config capstone/configs/gpt2.yaml --ranks 1 --steps 200 --log_every 20

Expect a line a run and the ratio of their tokens/s. Both train the lean model of day 12 on the shipped corpora with the
config's DeepSpeed section, without accumulation; the capstone with checksums, monitoring and metrics endpoint on.
Checked with deepspeed 0.19.8. Source: day12/train.py, capstone/train.py.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from bench.world import default_ranks, free_port, launch_command
from capstone.config import ROOT, TINY, load_config
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir, read_rows

NEVER = 10**6


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=TINY, help="YAML config of the project")
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="processes, or GPUs")
    parser.add_argument("--turns", type=int, default=2, help="runs of each program")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=10, help="optimizer steps between two log lines")
    parser.add_argument("--run_dir", default=default_run_dir("day26"), help="folder for speed.json and the runs")
    return parser.parse_args()


def tokens_per_s(program: str, run: Path, ranks: int, flags: list) -> list[float]:
    """Train once; return the speed at each log line, without the two in which kernels are chosen and compiled."""
    log = run.parent / f"{run.name}.log"
    with open(log, "w") as output:
        command = launch_command(ranks, ROOT / program, *flags)
        code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output).returncode
    if code:
        raise UserError(f"{program} ended with exit code {code}: {log} says why")
    return [row["tokens_per_s"] for row in read_rows(run) if "loss" in row][2:]


def main() -> None:
    args = parse_args()
    folder = Path(args.run_dir).resolve()
    if args.steps < 3 * args.log_every or args.turns < 1:
        raise UserError(f"--steps {args.steps}, --turns {args.turns}: take 3 x --log_every or more, and 1 or more")
    alike = {
        "model.code": "lean", "data.sources": "[data/moby_dick.jsonl.xz, data/sotu.jsonl.xz]",
        "data.folder": folder / "data", "data.held_out_share": 0.05, "monitor.port": free_port(args.ranks),
        "train.steps": args.steps, "train.log_every": args.log_every, "train.eval_every": NEVER,
        "train.global_batch": 0, "deepspeed.gradient_accumulation_steps": 1, "checkpoint.save_every": NEVER,
        "evaluate.max_blocks": 16, "evaluate.items": 10, "evaluate.sample_tokens": 8,
    }  # fmt: skip
    asked = [f"{key}={value}" for key, value in alike.items()]
    config = load_config(args.config, asked, args.ranks)
    section = folder / "ds_config.json"
    section.parent.mkdir(parents=True, exist_ok=True)
    section.write_text(json.dumps(config.deepspeed, indent=2))
    same = ["--model", config.model.preset, "--deepspeed_config", section, "--steps", args.steps]
    same += ["--log_every", args.log_every, "--eval_every", NEVER, "--sample_every", NEVER, "--save_every", NEVER]

    speeds = {"day12/train.py": [], "capstone/train.py": []}
    for turn in range(1, args.turns + 1):
        for program, found in speeds.items():
            run = folder / f"{program.split('/')[0]}_{turn}"
            if program == "day12/train.py":
                flags = [*same, "--run_dir", run]
            else:
                flags = ["--config", args.config, *asked, f"run_dir={run}"]
            found.append(tokens_per_s(program, run, args.ranks, flags))
            print(f"turn {turn} | {program:18} {median(found[-1]):12,.0f} tok/s", flush=True)
    table = [
        {"program": name, "tokens_per_s": median(sum(found, [])), "turns": found} for name, found in speeds.items()
    ]
    plain, packaged = table
    ratio = packaged["tokens_per_s"] / plain["tokens_per_s"]
    single = [median(ours) / median(theirs) for theirs, ours in zip(plain["turns"], packaged["turns"], strict=True)]
    batch = f"{config.deepspeed['train_micro_batch_size_per_gpu']} sequences a rank"
    between = f"single turns {min(single):.3f} to {max(single):.3f}"
    print(f"{config.model.preset}, {args.ranks} ranks, {batch}: capstone / day 12 = {ratio:.3f}, {between}")
    write_results(
        folder / "speed.json", this_command(), model=config.model.preset, ranks=args.ranks, batch=batch, ratio=ratio,
        lowest=min(single), highest=max(single), table=table,
    )  # fmt: skip


if __name__ == "__main__":
    with clear_errors():
        main()
