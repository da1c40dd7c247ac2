"""Find the fastest settings that fit: micro-batch, ZeRO stage, offload, recomputation, buckets. Days 12 and 27.

    python -m capstone.tune --config capstone/configs/tiny.yaml
    python -m capstone.tune --config capstone/configs/tiny.yaml --micro_batch 2 4 8 --stage 1 2 3 --exhaustive

What is searched changes speed and memory only: the global batch stays (micro-batch x accumulation x ranks), so the
winner trains the same model. Every trial is a launch of its own (trial.py); one that runs out of memory, fails or hangs
is a result like any other. Killed, the same command goes on: trials.jsonl has what is done. Ends with best.yaml, a
config to train with, and report.md. DeepSpeed 0.19.8's own autotuner refuses two CPU ranks.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

from deepspeed.accelerator import get_accelerator
from filelock import FileLock, Timeout

from bench.memory import NO_ROOM
from bench.results import machine, write_results
from bench.world import default_ranks, end_session, launch_command
from capstone.config import Config, add_config_flags, as_yaml, deepspeed_section, fingerprint, load_config
from capstone.monitor import memory_limit
from common.errors import UserError, clear_errors
from common.run_log import ROOT, show_path
from config.plan import GIB, gpt2_model, predict
from day17.checkpoints import write_whole

PRUNE_ABOVE = 1.25  # x the limit: a prediction that far above it is believed, a nearer one is tried
PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "torch_autocast": "bf16"}


class Settings(NamedTuple):
    """A point of the grid."""

    micro_batch: int
    stage: int
    offload: str  # none, cpu: the optimizer's states
    recompute: bool
    bucket: int  # reduce_bucket_size; 0 at stage 0, which has none

    def __str__(self) -> str:
        words = [f"micro-batch {self.micro_batch}", f"ZeRO-{self.stage}"]
        words += [f"bucket {self.bucket:,}"] * (self.stage > 0)
        return ", ".join(words + ["offload"] * (self.offload != "none") + ["recompute"] * self.recompute)


class Problem:
    """A config, a number of ranks and a memory limit: what a point of the grid means there."""

    def __init__(self, config: Config, ranks: int, limit: int) -> None:
        self.config, self.ranks, self.limit, self.base = config, ranks, limit, deepspeed_section(config, ranks)
        self.model = gpt2_model(config.model.preset)
        self.block_size = self.model.sizes[1] // self.model.hidden  # positions x width
        micro = self.base.get("train_micro_batch_size_per_gpu")
        self.batch = (
            self.base.get("train_batch_size") or micro * self.base.get("gradient_accumulation_steps", 1) * ranks
        )
        zero = self.base.get("zero_optimization", {})
        stage, offload = zero.get("stage", 0), zero.get("offload_optimizer", {}).get("device", "none")
        bucket = zero.get("reduce_bucket_size", 500_000_000) if stage else 0
        self.as_it_is = Settings(micro or self.batch // ranks, stage, offload, config.train.recompute, bucket)

    def grid(self, **values: Iterable) -> list[Settings]:
        """All points of `values` that make sense: the batch divides, and stage 0 has neither buckets nor offload."""
        points = {self.as_it_is: None}
        for point in (Settings(*parts) for parts in product(*(values[name] for name in Settings._fields))):
            if self.batch % (point.micro_batch * self.ranks) == 0 and not (
                point.stage == 0 and point.offload != "none"
            ):
                points[point if point.stage else point._replace(bucket=0)] = None
        return list(points)

    def section(self, point: Settings) -> dict:
        """The config's DeepSpeed section with this point's settings."""
        section = deepcopy(self.base)
        section.pop("train_batch_size", None)
        section["train_micro_batch_size_per_gpu"] = point.micro_batch
        section["gradient_accumulation_steps"] = self.batch // (point.micro_batch * self.ranks)
        zero = section.setdefault("zero_optimization", {})
        zero["stage"] = point.stage
        zero.pop("offload_optimizer", None)
        if point.stage:
            zero["reduce_bucket_size"] = point.bucket
        if point.offload != "none":
            zero["offload_optimizer"] = {"device": point.offload}
            if (
                section.get("optimizer", {}).get("params", {}).get("torch_adam")
            ):  # not DeepSpeed's, compiled on first use
                section["zero_force_ds_cpu_optimizer"] = False
        return section

    def predicted(self, point: Settings) -> float:
        """Bytes of a rank at the worst moment of a step, by config/plan.py; on CPU the host's share counts as well."""
        section = self.section(point)
        precision = next((p for key, p in PRECISIONS.items() if section.get(key, {}).get("enabled")), "fp32")
        need = predict(self.model, section, self.ranks, self.block_size, point.micro_batch, precision, point.recompute)
        return need["peak"] + (need["host"] if get_accelerator().device_name() == "cpu" else 0)


class Trials:
    """Runs trials and remembers them: one line of trials.jsonl each, written when it has ended."""

    def __init__(self, problem: Problem, folder: Path, steps: int, timeout_s: float) -> None:
        self.problem, self.folder, self.steps, self.timeout_s = problem, folder, steps, timeout_s
        here = machine()
        self.here = {"hardware": here["hardware"], "versions": here["versions"]}  # another machine: other trials
        self.path, self.done, self.asked, self.new = folder / "trials.jsonl", {}, [], 0
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):  # killed while writing it
                lines.pop()
                write_whole(self.path, "".join(lines))
            self.done = {row["key"]: row for row in map(json.loads, lines)}

    def __call__(self, point: Settings, turn: int = 0) -> dict:
        """The row of this point's trial, from the file or measured now. Another `turn`, another measurement."""
        model = self.problem.config.model.model_dump()
        spec = {"model": model, "vocabulary": self.problem.model.vocab, "deepspeed": self.problem.section(point)}
        spec |= {"recompute": point.recompute, "steps": self.steps, "limit": self.problem.limit}
        key = fingerprint(spec, self.problem.ranks, turn, self.here)
        if key not in self.done:
            start = time.perf_counter()
            row = {"key": key, "settings": point._asdict(), "turn": turn, **self.launch(spec)}
            row |= {"seconds": round(time.perf_counter() - start, 1), "predicted_bytes": self.problem.predicted(point)}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key], self.new = row, self.new + 1
            why = f": {row['why']}" if row["status"] in ("failed", "hung") else ""
            result = f"{row['tokens_per_s']:,.0f} tok/s" if row["status"] == "ok" else row["status"] + why
            again = f" (turn {turn})" if turn else ""
            print(f"trial {len(self.done):3} | {point}{again} | {result} | {row['seconds']:.0f} s", flush=True)
        self.asked.append(self.done[key])
        return self.done[key]

    def launch(self, spec: dict) -> dict:
        """Start the ranks, wait, and say what came of it: ok, no memory, failed, or hung."""
        write_whole(self.folder / "trial.json", json.dumps(spec, indent=1))
        flags = ["--module", "capstone.trial", "--spec", self.folder / "trial.json", "--parent", os.getpid()]
        with open(self.folder / "trial.log", "w+", encoding="utf-8") as log:
            job = subprocess.Popen(
                launch_command(self.problem.ranks, *flags), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = job.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # nothing of it is left, whatever happened: it would disturb the next one
                end_session(job)
            log.seek(0)
            text = log.read()
        if row := re.search(r"^row (.*)$", text, re.M):
            return {"status": "ok", **json.loads(row[1])}
        if code is None:
            return {"status": "hung", "why": f"not done after {self.timeout_s:g} s"}
        if found := re.search(r"^no memory: (.*)$", text, re.M) or NO_ROOM.search(text):
            return {"status": "no memory", "why": found[found.lastindex or 0]}
        last = ([line for line in text.splitlines() if re.match(r"\s*\w*(Error|error)", line)] or ["no message"])[-1]
        killed = " (killed: by the system for want of memory, perhaps)" if code in (-9, 137, 247) else ""
        return {"status": "failed", "why": f"exit code {code}{killed}: {last.strip()}"}


def search(points: list[Settings], start: Settings, trial: Callable[[Settings], dict]) -> Settings | None:
    """Change one setting at a time, follow each change to its best micro-batch, until nothing is faster.

    The micro-batch is not a setting like the others: what saves memory costs speed and pays by a larger one. What ran
    out of memory rules out the same with a larger one. Where the start does not run, the others are tried, in the
    order of `points` (the thriftiest first), until one does; None if none does.
    """
    too_large, speeds = set(), {}

    def speed(point: Settings) -> float:
        smaller = (point._replace(micro_batch=size) for size in sizes if size < point.micro_batch)
        if point not in points or not too_large.isdisjoint(smaller):
            return 0.0
        if point not in speeds:
            row = trial(point)
            speeds[point] = row.get("tokens_per_s", 0.0)
            too_large.update([point] if row["status"] == "no memory" else [])
        return speeds[point]

    def best_size(point: Settings) -> Settings:
        """Larger micro-batches while they are faster; where the first one is not, smaller ones while they are."""
        for further in (sizes[sizes.index(point.micro_batch) + 1 :], sizes[: sizes.index(point.micro_batch)][::-1]):
            before = point
            for size in further:
                if speed(other := point._replace(micro_batch=size)) > speed(point):
                    point = other
                elif speed(point):  # does not run yet: go on
                    break
            if point != before:
                break
        return point

    def changed(point: Settings, name: str) -> list[Settings]:
        """The points like `point` but for `name`; from and to stage 0, which has no bucket, with every bucket."""
        values = {getattr(other, name) for other in points} - {getattr(point, name)}
        found = [point._replace(**{name: value}) for value in sorted(values)]
        buckets = sorted({other.bucket for other in points} - {0})
        return [
            other._replace(bucket=bucket)
            for other in found
            for bucket in ([0] if other.stage == 0 else [other.bucket] if other.bucket else buckets)
        ]

    sizes = sorted({point.micro_batch for point in points})
    best, before = next((point for point in [start, *points] if speed(point)), None), None
    while best != before:
        best = before = best_size(best)
        for name in ("stage", "recompute", "offload", "bucket"):
            best = max([best, *(best_size(other) for other in changed(best, name))], key=speed)
    return best


def compare(points: list[Settings], turns: Iterable[int], trial: Trials) -> dict[Settings, float]:
    """Measure `points` again, one after the other, turn by turn: {settings: median tokens/s}, fastest first.

    The machine's mood changes over minutes; in turns it is the same for all of them.
    """
    speeds = {point: [] for point in points}
    for turn in turns:
        for point in points:
            speeds[point].append(trial(point, turn).get("tokens_per_s", 0.0))
    return dict(sorted(((p, median(found)) for p, found in speeds.items()), key=lambda pair: -pair[1]))


def fastest(tried: dict[Settings, dict]) -> list[Settings]:
    return sorted((p for p in tried if tried[p]["status"] == "ok"), key=lambda p: -tried[p]["tokens_per_s"])


def table(trials: Trials, pruned: dict[Settings, float]) -> list[dict]:
    """A row a point, fastest first: settings, status, tokens/s (the median of its turns), peak and predicted memory."""
    by_point = {}
    for row in {row["key"]: row for row in trials.asked}.values():  # the file may hold those of other limits too
        by_point.setdefault(Settings(**row["settings"]), []).append(row)
    rows = []
    for point, found in by_point.items():
        good = [row for row in found if row["status"] == "ok"]
        row = {"settings": str(point), "status": "ok" if good else found[0]["status"], "trials": len(found)}
        row["tokens_per_s"] = median(r["tokens_per_s"] for r in good) if good else None
        row["peak_gib"] = max(r["peak_bytes"] for r in good) / GIB if good else None
        rows.append(row | {"predicted_gib": found[0]["predicted_bytes"] / GIB, "why": found[0].get("why", "")})
    for point, need in pruned.items():
        if point not in by_point:
            rows.append(
                {"settings": str(point), "status": "pruned", "trials": 0, "tokens_per_s": None, "peak_gib": None}
            )
            rows[-1] |= {"predicted_gib": need / GIB, "why": f"predicted {need / GIB:.2f} GiB"}
    return sorted(rows, key=lambda row: -(row["tokens_per_s"] or 0))


def report(problem: Problem, rows: list[dict], summary: list[str]) -> str:
    """The result as a page of Markdown."""
    here = machine()
    lines = [
        f"# Tuning {problem.config.model.preset}",
        "",
        f"{here['hardware']}, {problem.ranks} ranks, {here['date']}.",
    ]
    lines += [f"Global batch {problem.batch}; limit {problem.limit / GIB:.2f} GiB a rank.", "", *summary, ""]
    lines += ["| settings | result | tokens/s | peak GiB | predicted GiB |", "| :-- | :-- | --: | --: | --: |"]
    for row in rows:
        speed = f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else ""
        peak = f"{row['peak_gib']:.2f}" if row["peak_gib"] else ""
        why = f"{row['status']}: {row['why']}" if row["why"] else row["status"]
        lines.append(f"| {row['settings']} | {why.replace('|', '/')} | {speed} | {peak} | {row['predicted_gib']:.2f} |")
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_flags(parser)
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="processes, or GPUs")
    parser.add_argument("--limit_gib", type=float, help="memory of a rank (default: 0.95 of the GPU's, or its share)")
    parser.add_argument("--micro_batch", type=int, nargs="+", default=[2, 4, 8, 16], help="values to try")
    parser.add_argument(
        "--stage", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="ZeRO stages to try"
    )
    parser.add_argument("--offload", nargs="+", choices=["none", "cpu"], default=["none", "cpu"], help="values to try")
    parser.add_argument("--recompute", nargs="+", choices=["no", "yes"], default=["no", "yes"], help="values to try")
    parser.add_argument(
        "--bucket", type=int, nargs="+", default=[500_000, 50_000_000], help="reduce_bucket_size to try"
    )
    parser.add_argument("--steps", type=int, default=8, help="measured optimizer steps a trial")
    parser.add_argument("--timeout_s", type=float, default=300, help="a trial that takes longer has hung")
    parser.add_argument("--finalists", type=int, default=2, help="the fastest so many are measured again, in turns")
    parser.add_argument("--turns", type=int, default=3, help="of the finalists")
    parser.add_argument(
        "--exhaustive",
        action="store_true",
        help="also run all other trials (--turns 1 or more), to see what was missed",
    )
    parser.add_argument("--out", help="folder of trials.jsonl, best.yaml and report.md (default: RUN_DIR/tune)")
    return parser.parse_intermixed_args()


def finals(problem: Problem, tried: dict[Settings, dict], trial: Trials, args: argparse.Namespace) -> dict:
    """The fastest few and the config as it is, measured again in turns: {settings: tokens/s}, fastest first."""
    finalists = fastest(tried)[: args.finalists]
    if problem.as_it_is not in finalists and tried.get(problem.as_it_is, {}).get("status") == "ok":
        finalists.append(problem.as_it_is)
    if not args.turns:
        return {point: tried[point]["tokens_per_s"] for point in finalists}
    return compare(finalists, range(1, args.turns + 1), trial)


def try_the_rest(found: Settings, points: list[Settings], pruned: dict, trial: Trials, turns: int) -> tuple[dict, dict]:
    """Run all points: what was missed? Return {settings: tokens/s} of `found` and the fastest other one, and facts."""
    tried = {point: trial(point) for point in points}
    rival = [point for point in fastest(tried) if point != found][:1]
    speeds = compare([found, *rival], range(turns + 1, 2 * turns + 1), trial)
    wrongly = [point for point in pruned if tried[point]["status"] == "ok"]
    share = speeds[found] / max(speeds.values())
    return speeds, {"found": str(found), "share_of_optimum": share, "wrongly_pruned": len(wrongly)}


def tune(args: argparse.Namespace, config: Config, folder: Path) -> None:
    limit = args.limit_gib * GIB if args.limit_gib else 0.95 * memory_limit(args.ranks)
    problem = Problem(config, args.ranks, int(limit))
    yes = [word == "yes" for word in args.recompute]
    points = problem.grid(
        micro_batch=args.micro_batch, stage=args.stage, offload=args.offload, recompute=yes, bucket=args.bucket
    )
    needs = {point: problem.predicted(point) for point in points}
    pruned = {point: need for point, need in needs.items() if need > PRUNE_ABOVE * problem.limit}
    fitting = sorted((point for point in points if point not in pruned), key=needs.get)
    what = f"{config.model.preset}, global batch {problem.batch}, {args.ranks} ranks of {problem.limit / GIB:.2f} GiB"
    print(f"{what}: {len(points)} points, {len(pruned)} of them pruned by their predicted bytes")
    trial = Trials(problem, folder, args.steps, args.timeout_s)
    if trial.done:
        print(f"{show_path(trial.path)}: {len(trial.done)} trials done already")
    tried = {}

    def ask(point: Settings) -> dict:
        tried[point] = trial(point)
        return tried[point]

    if search(fitting, problem.as_it_is, ask) is None:
        why = f"see {show_path(trial.path)}" if tried else "every prediction is far above it, so nothing was tried"
        raise UserError(f"none of {len(points)} points runs in {problem.limit / GIB:.2f} GiB: {why}")
    facts = {"points": len(points), "pruned": len(pruned), "search_trials": len(tried)}
    speeds = finals(problem, tried, trial, args)
    before = speeds.get(problem.as_it_is)
    if args.exhaustive:
        speeds, more = try_the_rest(next(iter(speeds)), points, pruned, trial, args.turns)
        before = speeds.get(problem.as_it_is, before)  # of the same turns, if it is there
        facts |= more
    write_down(problem, folder, trial, speeds, before, facts, table(trial, pruned))


def write_down(
    problem: Problem, folder: Path, trial: Trials, speeds: dict, before: float | None, facts: dict, rows: list[dict]
) -> None:
    """Write best.yaml, report.md and tune.json, and print the summary. `before`: tokens/s of the config as it is."""
    top = next(iter(speeds))
    summary = [f"Fastest: {top}: {speeds[top]:,.0f} tokens/s."]
    if as_it_is := [row for row in rows if row["settings"] == str(problem.as_it_is) and row["status"] != "pruned"]:
        speed = f"{before:,.0f} tokens/s" if before else as_it_is[0]["why"]
        summary.append(f"The config as it is: {problem.as_it_is}: {speed}.")
        facts |= {"times_as_fast": speeds[top] / before} if before else {}
    if "found" in facts:
        of_all = f"{facts['search_trials']} of {facts['points']} trials"
        summary.append(
            f"The search found {facts['found']} with {of_all}: {facts['share_of_optimum']:.1%} of the optimum."
        )
        summary.append(f"Of {facts['pruned']} pruned points {facts['wrongly_pruned']} would have run.")
    values = problem.config.model_dump() | {"deepspeed": problem.section(top)}
    values["train"]["recompute"] = top.recompute
    write_whole(folder / "best.yaml", as_yaml(Config(**values)))
    load_config(folder / "best.yaml", ranks=problem.ranks)  # what was written trains
    write_whole(folder / "report.md", report(problem, rows, summary))
    command = shlex.join(["python", "-m", "capstone.tune", *sys.argv[1:]])
    write_results(folder / "tune.json", command, **facts, limit_gib=problem.limit / GIB, summary=summary, table=rows)
    print("\n".join(summary))
    print(f"{trial.new} trials now | {show_path(folder / 'best.yaml')} | {show_path(folder / 'report.md')}")


def main() -> None:
    args = parse_args()
    if args.exhaustive and args.turns < 1:
        raise UserError("--exhaustive compares in turns: --turns 1 or more")
    for name in ("ranks", "steps", "finalists", "micro_batch", "bucket"):
        value = getattr(args, name)
        if (least := min(value) if isinstance(value, list) else value) < 1:
            raise UserError(f"--{name} {least}: take 1 or more")
    if args.turns < 0 or args.timeout_s <= 0:
        raise UserError(f"--turns {args.turns}, --timeout_s {args.timeout_s:g}: want 0 or more turns, and some time")
    if args.limit_gib is not None and not 0 < args.limit_gib < math.inf:
        raise UserError(f"--limit_gib {args.limit_gib} is no limit: take a number of GiB above 0")
    config = load_config(args.config, args.overrides, args.ranks)
    folder = Path(args.out) if args.out else config.run_path / "tune"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            tune(args, config, folder)
    except Timeout:
        raise UserError(f"another tuner works in {show_path(folder)}: wait for it, or name another --out") from None


if __name__ == "__main__":
    with clear_errors():
        main()
