"""Day 24: what does a run over two hosts do when something breaks? Each fault injected, noticed, and resumed from.

    sudo .venv/bin/python day24/labs/faults.py

Expect a line a fault: what the supervisor said, after how many seconds, and whether the weights of the run that went
on are those of a run that nobody disturbed - to the bit on the same ranks. Two minutes; root, as for `make lab`.
Source: day24/notes.md; the faults are those of Llama Team 2024, The Llama 3 Herd of Models, table 5.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import free_port, run_ranks
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir
from day17.checkpoints import checkpoints, read_manifest
from day18.loading import load_safely
from day24.hosts import Lab, open_lab
from day24.watch import read_beats

TIMEOUT_S, WAIT_S, SAVE_EVERY = 7, 3, 5
# Each fault: the step from which on it is injected, within how many seconds the supervisor has to have named it, and
# how many ranks go on: the weights that are compared are those of their first checkpoint after the fault.
PLAN = {
    "link cut": (7, TIMEOUT_S + 8, 2),  # the collective's time-out, then 3 s until ssh gives up, then the sentence
    "disk full": (17, 5, 2),
    "sshd gone": (27, 10, 2),
    "link slow": (29, 30, 2),
    "host killed": (37, TIMEOUT_S + 8, 1),
    "one host fewer": (37, WAIT_S + 12, 1),  # from the moment at which the host is known to be gone
    "host back": (43, 15, 2),
    "other config": (43, 60, 2),  # at the next start, which is what takes the time
    "wrong clock": (43, 60, 2),
}
STEPS = 130


class Drill:
    """A supervised run in the lab: what it says, with the time of each line."""

    def __init__(self, lab: Lab, run_dir: Path, flags: list[str]) -> None:
        self.lab, self.run_dir, self.lines, self.reached = lab, run_dir, [], 0
        train = ["deepspeed", "-q", "--hostfile", lab.hostfile, "--master_addr", lab["A"].address, "--master_port"]
        train += [free_port(), "day24/train.py", *flags, "--run_dir", run_dir, "--timeout_s", TIMEOUT_S]
        train += ["--host_log", lab.folder / "disk"]
        supervise = ["--backoff_s", 0.5, "--wait_s", WAIT_S, "--min_hosts", 1, " ".join(map(str, train))]
        self.process = lab["A"].popen(
            *(sys.executable, "-u", "day24/supervise.py", *supervise),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE.parent,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))

    def wait_for(self, pattern: str, since: float, seconds: float = 90) -> tuple[float, str]:
        """When after `since` the supervisor first said what matches, and the words that did."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            ended = self.process.poll() is not None
            for at, line in list(self.lines):
                if at >= since and (found := re.search(pattern, line)):
                    return at - since, found[0].removeprefix("supervise: ")
            if ended:
                break
            time.sleep(0.05)
        said = "\n".join(line for _, line in self.lines[-30:])
        raise UserError(f"nobody said {pattern!r} within {seconds:g} s of the fault; the last lines:\n{said}")

    def step(self) -> int:
        """The last step that a rank of any launch so far has begun: what is saved later was saved after the fault."""
        self.reached = max([self.reached, *(beat["step"] for beat in read_beats(self.run_dir).values())])
        return self.reached

    def wait_for_step(self, step: int, ranks: int = 2) -> float:
        """Until all ranks of this launch are at `step`; return the time."""
        ends = time.monotonic() + 120
        while time.monotonic() < ends and self.process.poll() is None:
            beats = read_beats(self.run_dir) if self.run_dir.exists() else {}
            if len(beats) == ranks and all(b["step"] >= step and b["phase"] != "failed" for b in beats.values()):
                return time.monotonic()
            time.sleep(0.02)
        said = "\n".join(line for _, line in self.lines[-30:])
        raise UserError(f"the run did not get to step {step}:\n{said}")


def inject(drill: Drill) -> list[dict]:
    """One fault after the other; return what was said of each, after how many seconds, and where the run went on."""
    host, rows = drill.lab["B"], []

    def noticed(case: str, since: float, pattern: str) -> None:
        seconds, said = drill.wait_for(pattern, since)
        _, within_s, ranks = PLAN[case]
        row = {"case": case, "step": drill.step(), "noticed_s": seconds, "within_s": within_s, "said": said}
        rows.append(row | {"ranks": ranks})
        print(f"{case}: {seconds:.1f} s: {said}", flush=True)

    at = drill.wait_for_step(PLAN["link cut"][0])
    host.cut()
    noticed("link cut", at, r"host-b \(rank 1\) does not answer: .*timed out.*noticed [\d.]+ s")
    host.mend()

    at = drill.wait_for_step(PLAN["disk full"][0])
    host.fill_disk()
    noticed("disk full", at, r"host-b \(rank 1, step \d+, \w+\): OSError: \[Errno 28\] No space left on device")
    host.clear_disk()

    at = drill.wait_for_step(PLAN["sshd gone"][0])
    host.stop_sshd()
    noticed("sshd gone", at, r"host-b(?: \(rank 1\))? does not answer: .*refused")
    host.start_sshd()

    at = drill.wait_for_step(PLAN["link slow"][0])
    host.slow("10mbit")
    noticed("link slow", at, r"slow: host-b \(rank 1\) .*")
    host.slow(None)

    at = drill.wait_for_step(PLAN["host killed"][0])
    host.kill()
    noticed("host killed", at, r"host-b \(rank 1\) does not answer: .*timed out.*noticed [\d.]+ s")
    noticed("one host fewer", time.monotonic(), r"has 2 ranks, now 1: universal_step\d+")
    drill.wait_for_step(drill.step() + SAVE_EVERY + 1, ranks=1)  # one checkpoint of one rank, to compare
    host.start(sshd=False)  # back from the repair shop: an old config, a clock of its own, and sshd last
    host.shift_clock(3600)
    config, other = HERE / "ds_config.json", drill.lab.folder / "ds_config.json"
    other.write_text(config.read_text().replace("0.001", "0.003"))
    host.overlay(config, other)
    host.start_sshd()
    at = time.monotonic()
    noticed("host back", at, r"host-b is back: .*")
    noticed(
        "other config", at, r"not the same on all hosts: host-b \(rank 1\) has day24/ds_config.json \w+, host-a.*?\."
    )
    host.uncover(config)
    noticed("wrong clock", at, r"host-b \(rank 1\): its clock is 3[56]\d\d s ahead")
    drill.wait_for(r"finished after", at)
    return rows


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint / "mp_rank_00_model_states.pt")["module"]


def compare(rows: list[dict], whole: Path, disturbed: Path) -> None:
    """Into each row: the first checkpoint after the fault that both runs have, and how far its weights are apart."""
    ours = {folder.name: folder for folder in checkpoints(disturbed / "checkpoints")}
    both = sorted(folder.name for folder in checkpoints(whole / "checkpoints") if folder.name in ours)
    ranks = {name: read_manifest(ours[name])["ranks"] for name in both}
    for row in rows:
        name = next((name for name in both if int(name[4:]) > row["step"] and ranks[name] == row["ranks"]), None)
        if not name:
            raise UserError(f"{row['case']}: no checkpoint of {row['ranks']} ranks after step {row['step']}")
        mine, theirs = weights(ours[name]), weights(whole / "checkpoints" / name)
        row["compared"] = name
        row["apart"] = max((mine[key] - theirs[key]).abs().max().item() for key in theirs)
        row["bitwise"] = "yes" if all(torch.equal(mine[key], theirs[key]) for key in theirs) else "no"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default=default_run_dir("day24"), help="folder for the runs and the table")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    load_safely()
    run_dir = Path(args.run_dir).absolute()
    flags = ["--steps", STEPS, "--save_every", SAVE_EVERY, "--keep_last", 99, "--log_every", STEPS]
    flags += ["--corpus", "moby_dick"]
    with open_lab(run_dir / "lab") as lab:
        drill = Drill(lab, run_dir / "disturbed", flags)
        try:
            rows = inject(drill)
        finally:
            (run_dir / "output.txt").write_text("".join(f"{at:.1f} {line}\n" for at, line in drill.lines))
            drill.process.kill()
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the lab: more threads add up in another order
    whole = run_ranks(2, HERE / "train.py", *flags, "--run_dir", run_dir / "whole")
    if any(rank.returncode for rank in whole):
        raise UserError(f"the run that nobody disturbed failed: {whole[0].stderr[-500:]}")
    compare(rows, run_dir / "whole", run_dir / "disturbed")
    columns = {"noticed s": "noticed_s:.1f", "within": "within_s:.0f", "bitwise": "bitwise:s", "apart": "apart:.1e"}
    table = Table(
        run_dir / "faults.json", columns | {"compared": "compared:s", "ranks": "ranks:d"}, timeout_s=TIMEOUT_S
    )
    for row in rows:
        table.add(row)
    table.close()
    shutil.rmtree(run_dir / "whole")


if __name__ == "__main__":
    with clear_errors():
        main()
