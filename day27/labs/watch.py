"""Day 27: watch a run with a real Prometheus, break it, and see which alerts fire, how soon, and that no other does.

From the repository root; the first is a healthy run, the others inject faults (day27/faults.py):

    python day27/labs/watch.py --seconds 90
    python day27/labs/watch.py --fault nan@20
    python day27/labs/watch.py --fault slow@20-40 stall@45-60 kill@62
    python day27/labs/watch.py --speedup 10 --fault crash@8

Expect a line when an alert fires or ends, a table of faults with the seconds until their alert, and exit code 1 when an
alert is missing, late or false. The shipped rules run with every duration divided by --speedup, scrapes included.
Source: https://prometheus.io/docs/prometheus/2.42/querying/api/
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from bench.world import command_of, default_ranks, end_session, free_port, launch_command, process_tree
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir, show_path
from day27.faults import EXPECTED, FOLLOWS, read_faults
from day27.prometheus import ROOT, Prometheus, seconds

CRASHES = 3  # restarts that CrashLoop waits for
GRACE_S = 240  # after the last fault has begun: by then all have been noticed, or never will be


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", nargs="+", default=[], metavar="NAME@SECONDS", help="of day27/faults.py")
    parser.add_argument(
        "--seconds", type=float, default=90, help="of a healthy run; with faults, until all are noticed"
    )
    parser.add_argument("--speedup", type=float, default=30, help="divides every duration in the rules")
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="processes, or GPUs")
    parser.add_argument("--run_dir", default=default_run_dir("day27"), help="folder for watch.json and the run")
    return parser.parse_args()


class Job:
    """The training: started, started again after a crash when that is the fault, ended."""

    def __init__(self, command: list[str], log: Path, again: bool) -> None:
        self.command, self.log, self.again = command, log, again
        self.start()

    def start(self) -> None:
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def is_over(self) -> bool:
        if self.again and self.process.poll():
            end_session(self.process)
            self.start()
        return self.process.poll() is not None

    def ask_to_stop(self) -> None:
        """SIGTERM to the ranks, as a scheduler does: they save and end well. (To the launcher it would mean: kill.)"""
        for process in process_tree(self.process.pid):
            if any(word.startswith("--local_rank=") for word in command_of(process)):
                with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                    process.terminate()


def watch(prometheus: Prometheus, job: Job, args: argparse.Namespace) -> None:
    """Print alerts as they come and go: for --seconds, or until all faults have been noticed; then a bit longer."""
    times = read_faults(args.fault)
    start, before, fired, wanted = time.time(), {}, set(), {EXPECTED[name] for name in times}
    last = max((begins for begins, _ in times.values()), default=0)
    first_step, ends, limit = None, None, last + GRACE_S if wanted else args.seconds
    while ends is None or time.time() < ends:
        time.sleep(0.25)
        now = prometheus.firing()
        for name in sorted(now.keys() ^ before.keys()):
            what = f"firing: {name}: {now[name]}" if name in now else f"over: {name}"
            print(f"{time.time() - start:6.1f} s | {what}", flush=True)
        before, fired = now, fired | set(now)
        if first_step is None and prometheus.get("query", query="training_step > 0")["result"]:
            first_step = time.time()
            print(f"{first_step - start:6.1f} s | training", flush=True)
        late = first_step is not None and time.time() > first_step + limit
        over = job.is_over() and (first_step is None or not wanted)  # an alert may be for a run that is gone
        if ends is None and (late or over or (wanted and wanted <= fired)):
            ends = time.time() + 15  # a dead rank is noticed after its run is over, and a clean end must not be
            job.again = False
            if not wanted:
                job.ask_to_stop()


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(prometheus: Prometheus, faults: Path, start: float) -> tuple[list[dict], list[str]]:
    """A row a fault, and the alerts that nothing explains."""
    fired = prometheus.first_fired(start)
    rules = {rule["alert"]: rule for rule in prometheus.rules["groups"][0]["rules"]}
    begun = {}
    for row in rows_of(faults):
        begun.setdefault(row["fault"], row)  # a run that was started again has more of them
    starts = rows_of(faults.with_name("starts.jsonl"))
    if "crash" in begun and len(starts) > CRASHES:
        begun["crash"]["time"] = starts[CRASHES]["time"]  # one crash is none that repeats
    rows = []
    for fault in begun.values():
        alert = EXPECTED[fault["fault"]]
        after = fired[alert] - fault["time"] if alert in fired else None
        within = seconds(rules[alert]["annotations"]["within"])
        verdict = "missing" if after is None else "early" if after < 0 else "late" if after > within else "in time"
        rows.append({"fault": fault["fault"], "alert": alert, "fired_after_s": after, "within_s": within})
        rows[-1]["verdict"] = verdict
    explained = set().union(*({row["alert"]} | FOLLOWS.get(row["fault"], set()) for row in rows))
    return rows, sorted(fired.keys() - explained)


def main() -> None:
    args = parse_args()
    read_faults(args.fault)
    for name in ("seconds", "speedup", "ranks"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: take more than 0")
    folder = Path(args.run_dir).resolve()
    run_dir, start = folder / "run", time.time()
    if run_dir.exists():  # the run would go on from its checkpoint, with the faults and alerts of last time
        raise UserError(f"{show_path(folder)} holds a watched run: name another --run_dir, or delete it")
    run_dir.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `finally` below ends what was started
    prometheus = Prometheus(folder, run_dir / "prometheus_targets.json", args.speedup)
    flags = ["--run_dir", run_dir, "--port", free_port(args.ranks), "--steps", 10**6, "--log_every", 2]
    flags += ["--fault", *args.fault] if args.fault else []
    command = launch_command(args.ranks, HERE / "train.py", *flags)
    print(f"prometheus {prometheus.url} | every duration / {args.speedup:g}, a scrape every {prometheus.interval}")
    job = Job(command, folder / "train.log", again=any(spec.startswith("crash@") for spec in args.fault))
    try:
        watch(prometheus, job, args)
        code = job.process.poll()
        rows, false_alarms = table(prometheus, run_dir / "faults.jsonl", start)
        lived = f"{int(time.time() - start) + 1}s"
        scrapes = prometheus.value(f"sum(count_over_time(up[{lived}]))")
        steps = prometheus.value(f"max(max_over_time(training_step[{lived}]))")
    finally:
        end_session(job.process)
        prometheus.stop()
    for row in rows:
        after = f"{row['fired_after_s']:.1f} s" if row["fired_after_s"] is not None else "never"
        stated = f"stated {row['within_s']:.1f} s: {row['verdict']}"
        print(f"{row['fault']:<14}{row['alert']:<18}{after:>8} after the fault, {stated}")
    print(f"{steps} steps, {scrapes} scrapes, false alarms: {', '.join(false_alarms) or 'none'}")
    count = {"seconds": time.time() - start, "steps": steps, "scrapes": scrapes, "train_exit_code": code}
    write_results(
        folder / "watch.json", this_command(), speedup=args.speedup, **count, false_alarms=false_alarms, table=rows
    )
    if not steps:
        raise UserError(f"the run made no step: see {show_path(folder / 'train.log')}")
    if missing := len(args.fault) - len(rows):
        raise UserError(f"{missing} of the faults did not begin: see {show_path(folder / 'train.log')}")
    if wrong := [row["alert"] for row in rows if row["verdict"] != "in time"] + false_alarms:
        raise UserError(f"not as stated: {', '.join(wrong)}; see {show_path(folder / 'watch.json')}")


if __name__ == "__main__":
    with clear_errors():
        main()
