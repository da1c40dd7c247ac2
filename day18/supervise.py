"""Day 18: supervise a run - start it again after a crash or a hang, and say which rank it was.

    python day18/supervise.py "deepspeed --num_accelerators 2 day18/train.py --run_dir runs/day18/mine --steps 200"
    python day18/supervise.py --drill kill "deepspeed --num_accelerators 2 day18/train.py --run_dir runs/day18/drill"

Expect the run's own output, and a line that starts with "supervise:" whenever something ends or begins. A run is
finished when it has written finished.json: the launcher's exit code is 0 also when the launcher was killed.
Checked with deepspeed 0.19.8. Source: deepspeed/launcher/launch.py (what happens to the other ranks when one dies).
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.errors import UserError, clear_errors
from day17.checkpoints import FINISHED, checkpoints

PHASES = ("starting", "batch", "compute", "boundary", "done")  # of a step, in order; a save belongs to the boundary
POLL_S, GRACE_S = 0.1, 3


class Heartbeat:
    """What a rank writes about itself: one line, process id, step, phase. The file's time is that of the last beat."""

    def __init__(self, run_dir: str | Path, rank: int) -> None:
        self.path = Path(run_dir) / "heartbeats" / f"rank_{rank}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.beat(0, "starting")

    def beat(self, step: int, phase: str) -> None:
        self.path.write_text(f"{os.getpid()} {step} {phase}\n")


def read_heartbeats(run_dir: Path, since: float) -> dict[int, dict]:
    """{rank: {"pid", "step", "phase", "time"}} of the beats since this launch."""
    beats = {}
    for path in (run_dir / "heartbeats").glob("rank_*"):
        words = path.read_text().split()
        if len(words) == 3 and path.stat().st_mtime >= since:  # else caught in the middle of a write, or of an old run
            beat = {"pid": int(words[0]), "step": int(words[1]), "phase": words[2], "time": path.stat().st_mtime}
            beats[int(path.name[5:])] = beat
    return dict(sorted(beats.items()))


def process_state(pid: int) -> str:
    """What the system says of a process; "dead" when it is gone or waits for its parent to take note."""
    try:
        state = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "dead"
    return "dead" if state == psutil.STATUS_ZOMBIE else state


def where(beats: dict[int, dict], ranks: list[int]) -> str:
    return ", ".join(f"rank {r} (pid {beats[r]['pid']}, step {beats[r]['step']}, {beats[r]['phase']})" for r in ranks)


def furthest_behind(beats: dict[int, dict]) -> list[int]:
    """The ranks for which the others wait: stopped processes, or else those at the earliest step and phase."""
    stopped = [rank for rank, beat in beats.items() if process_state(beat["pid"]) == psutil.STATUS_STOPPED]
    at = {rank: (beat["step"], PHASES.index(beat["phase"])) for rank, beat in beats.items()}
    return stopped or [rank for rank in at if at[rank] == min(at.values())]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", help="the whole launch command in quotes; it must name a --run_dir")
    parser.add_argument("--max_restarts", type=int, default=3, help="restarts in a row without a new checkpoint")
    parser.add_argument("--backoff_s", type=float, default=5, help="wait before a restart, doubled each time in a row")
    parser.add_argument("--hang_timeout_s", type=float, default=300, help="no beat of any rank for so long is a hang")
    parser.add_argument(
        "--drill", choices=["kill", "stop", "launcher"], help="once: kill or stop a rank, or kill its launcher"
    )
    parser.add_argument("--drill_rank", type=int, default=1, help="rank for the drill")
    parser.add_argument("--drill_step", type=int, default=12, help="step at which the drill takes place")
    return parser.parse_args()


class Supervisor:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.words, self.drill, self.asked_to_stop = args, shlex.split(args.command), args.drill, None
        if "--run_dir" not in self.words[:-1]:
            raise UserError(f"no --run_dir in {args.command!r}: without it each launch would begin a new run")
        if not shutil.which(self.words[0]):
            raise UserError(f"no program {self.words[0]!r} on the PATH, from {args.command!r}")
        self.run_dir = Path(self.words[self.words.index("--run_dir") + 1])
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.asked_to_stop = signal.Signals(number)

    def _tell(self, beats: dict[int, dict]) -> None:
        """Once to each rank, however late it starts; not to the launcher, which would end before they have saved."""
        for rank in beats.keys() - self.told:
            self.told.add(rank)
            with suppress(ProcessLookupError):
                os.kill(beats[rank]["pid"], signal.SIGTERM)

    def run_once(self) -> str | None:
        """Launch, and watch until it ends; return what went wrong, None when it finished or was asked to stop."""
        self.launched = time.time()
        job = subprocess.Popen(self.words, start_new_session=True)  # its own process group, to be killed as one
        problem, last_sign, self.told = None, None, set()
        while job.poll() is None:
            time.sleep(POLL_S)
            beats = read_heartbeats(self.run_dir, self.launched)
            self._drill(beats)
            if self.asked_to_stop:
                self._tell(beats)
            ended = [rank for rank, beat in beats.items() if process_state(beat["pid"]) == "dead"]
            dead = [rank for rank in ended if beats[rank]["phase"] != "done"]
            silent_s = time.time() - max([self.launched, *(beat["time"] for beat in beats.values())])
            if dead:  # the other ranks wait for it, with NCCL for ever; the launcher asks them to end one after another
                problem, last_sign = f"{where(beats, dead)} died", min(beats[rank]["time"] for rank in dead)
                try:
                    job.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    break
            elif silent_s > self.args.hang_timeout_s:
                problem = f"no beat for {silent_s:.0f} s; furthest behind: {where(beats, furthest_behind(beats))}"
                break
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)  # what is left of it
        code, beats = job.wait(), read_heartbeats(self.run_dir, self.launched)
        going = [rank for rank, beat in beats.items() if beat["phase"] != "done"]
        if self.finished() or (code == 0 and beats and not going):
            return None
        if code == 0 and not problem:
            problem = f"the launcher is gone, but {where(beats, going) or 'no rank had begun'}: no {FINISHED}"
        if last_sign:
            problem += f", the job was over {time.time() - last_sign:.1f} s after its last beat"
        return f"{problem or 'no rank was seen to die first'}; exit code {code}"

    def finished(self) -> bool:
        """Whether the run says itself that it has reached its last step, in this launch."""
        marker = self.run_dir / FINISHED
        return marker.exists() and marker.stat().st_mtime >= self.launched

    def _drill(self, beats: dict[int, dict]) -> None:
        beat = beats.get(self.args.drill_rank)
        if self.drill and beat and beat["step"] >= self.args.drill_step:
            print(f"supervise: drill: {self.drill} {where(beats, [self.args.drill_rank])}", flush=True)
            victim = psutil.Process(beat["pid"]).ppid() if self.drill == "launcher" else beat["pid"]
            os.kill(victim, signal.SIGSTOP if self.drill == "stop" else signal.SIGKILL)
            self.drill = None

    def run(self) -> None:
        in_a_row, newest = 0, None
        while True:
            start = time.monotonic()
            problem = self.run_once()
            ended = f"after {time.monotonic() - start:.0f} s"
            if problem is None or self.asked_to_stop:
                why = "finished" if self.finished() else "stopped by a signal to its ranks"
                why = f"asked to stop by {self.asked_to_stop.name}" if self.asked_to_stop else why
                print(f"supervise: {why} {ended}{f'; {problem}' if problem else ''}", flush=True)
                return
            found = next(iter(checkpoints(self.run_dir / "checkpoints")), None)
            in_a_row, newest = (in_a_row + 1 if found == newest else 1), found  # a new checkpoint: it gets somewhere
            print(f"supervise: {problem} ({ended}); newest checkpoint {found.name if found else 'none'}", flush=True)
            if in_a_row > self.args.max_restarts:
                raise UserError(f"{in_a_row - 1} restarts in a row without a new checkpoint: {problem}")
            wait_s = self.args.backoff_s * 2 ** (in_a_row - 1)
            print(f"supervise: restart {in_a_row} of {self.args.max_restarts} in {wait_s:g} s", flush=True)
            ends = time.monotonic() + wait_s
            while time.monotonic() < ends and not self.asked_to_stop:
                time.sleep(POLL_S)
            if self.asked_to_stop:
                print(f"supervise: asked to stop by {self.asked_to_stop.name}: no restart", flush=True)
                return


def main() -> None:
    Supervisor(parse_args()).run()


if __name__ == "__main__":
    with clear_errors():
        main()
