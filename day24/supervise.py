"""Day 24: supervise a run over several hosts - say which host and rank, start again on the hosts that there are.

    python day24/supervise.py "deepspeed --hostfile runs/lab/hostfile day24/train.py --run_dir runs/day24/mine"
    python day24/supervise.py --wait_s 30 --min_hosts 1 "deepspeed --hostfile hosts day24/train.py --run_dir DIR"

Expect the run's own output, and lines that start with "supervise:". It runs on any host that reaches all others over
ssh and has the shared folder. No clock but its own is trusted: what counts is that a beat changed, not its date.
Checked with deepspeed 0.19.8. Source: day18/supervise.py; deepspeed/launcher/multinode_runner.py (PDSHRunner).
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.errors import UserError, clear_errors
from day17.checkpoints import FINISHED, checkpoints, newest_good, read_manifest
from day24.reach import Answer, ask, ask_all, hosts_of, send_seconds
from day24.watch import PHASES, read_beats

POLL_S, PROBE_S, GRACE_S, CLOCK_S = 0.1, 2, 1, 2
SLOW_FACTOR, SLOW_S, TRIAL_BYTES = 4, 1, 2**20  # a step this much longer than usual; then 1 MiB from each host
ECHOES = ("Timed out", "Connection", "timeout", "closed by peer", "Broken pipe")  # of a fault that is elsewhere


def where(beat: dict) -> str:
    return f"{beat['host']} (rank {beat['rank']}, step {beat['step']}, {beat.get('during', beat['phase'])})"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", help="the whole launch command in quotes, with a --hostfile and a --run_dir")
    parser.add_argument("--max_restarts", type=int, default=3, help="restarts in a row without a new checkpoint")
    parser.add_argument("--backoff_s", type=float, default=5, help="wait before a restart, doubled each time in a row")
    parser.add_argument("--hang_timeout_s", type=float, default=300, help="no beat of any rank for so long is a hang")
    parser.add_argument("--wait_s", type=float, default=120, help="how long to wait for all hosts before a start")
    parser.add_argument("--min_hosts", type=int, default=None, help="start on so few after --wait_s; default: all")
    return parser.parse_args()


class HostSupervisor:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.words, self.asked_to_stop = args, shlex.split(args.command), None
        for flag in ("--run_dir", "--hostfile"):
            if flag not in self.words[:-1]:
                raise UserError(f"no {flag} in {args.command!r}")
        if not shutil.which(self.words[0]):
            raise UserError(f"no program {self.words[0]!r} on the PATH, from {args.command!r}")
        self.run_dir = Path(self.words[self.words.index("--run_dir") + 1])
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.hosts = hosts_of(self.words[self.words.index("--hostfile") + 1])
        self.min_hosts = args.min_hosts or len(self.hosts)
        self.pool = ThreadPoolExecutor(2 * len(self.hosts))
        self.beats: dict[int, dict] = {}
        self.said: dict[str, str | None] = {}
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.asked_to_stop = signal.Signals(number)

    def say(self, sentence: str) -> None:
        print(f"supervise: {sentence}", flush=True)

    def say_once(self, about: str, sentence: str | None) -> None:
        """Say it when it is news about something; None: nothing is the matter there."""
        if self.said.get(about) != sentence:
            self.said[about] = sentence
            if sentence:
                self.say(sentence)

    def ranks_on(self, host: str) -> str:
        ranks = [str(rank) for rank, beat in self.beats.items() if beat["host"] == host]
        return f"{host} (rank {', '.join(ranks)})" if ranks else host

    # --- before a launch: which hosts are there, and what is left on them ---

    def signal_ranks(self, name: str) -> dict[str, str]:
        """{host: the command that sends signal `name` to what this run started there}."""
        run = shlex.quote(str(self.run_dir))
        commands = dict.fromkeys(self.hosts, ":")
        for beat in self.beats.values():  # process numbers are used again: look at the command line first
            pid = beat["pid"]
            commands[beat["host"]] += f"; grep -qF -- {run} /proc/{pid}/cmdline 2>/dev/null && kill -{name} {pid}"
        return {host: f"{command}; :" for host, command in commands.items()}

    def gather_hosts(self) -> list[str]:
        """Wait for all hosts, end what an earlier launch left on them, return those to start on."""
        ends = time.monotonic() + self.args.wait_s
        while True:
            answers = ask_all(self.signal_ranks("KILL"))
            for host, answer in answers.items():
                self.say_once(host, answer.problem and f"{self.ranks_on(host)} does not answer: {answer.problem}")
            there = [host for host, answer in answers.items() if not answer.problem]
            late = time.monotonic() > ends
            if len(there) == len(self.hosts) or (late and len(there) >= self.min_hosts) or self.asked_to_stop:
                return there
            if late:
                raise UserError(f"{len(there)} of {len(self.hosts)} hosts answer, {self.min_hosts} are needed: {there}")
            time.sleep(0.5)

    def launch_words(self, hosts: list[str]) -> list[str]:
        """The command with a hostfile of these hosts; and what it resumes from made to fit their number of ranks."""
        hostfile, words = self.run_dir / "hostfile", list(self.words)
        hostfile.write_text("".join(f"{host} slots={self.hosts[host]}\n" for host in hosts))
        words[words.index("--hostfile") + 1] = str(hostfile)
        ranks, (found, _) = sum(self.hosts[host] for host in hosts), newest_good(self.run_dir / "checkpoints")
        if found and read_manifest(found)["ranks"] != ranks:
            universal = found.parent / f"universal_{found.name}"
            self.say(f"{found.name} has {read_manifest(found)['ranks']} ranks, now {ranks}: {universal.name}")
            if not universal.exists():
                words_of_day_18 = [sys.executable, HERE.parent / "day18/convert.py", found.parent]
                if subprocess.run(words_of_day_18).returncode:
                    raise UserError(f"{found} does not convert, see above")
        return [words[0], "--force_multi", *words[1:]]  # over ssh also to a single host: it need not be this one

    # --- during it ---

    def run_once(self, hosts: list[str]) -> str | None:
        """Launch, and watch until it ends; return what went wrong, None when it finished or was asked to stop."""
        words = self.launch_words(hosts)
        shutil.rmtree(self.run_dir / "heartbeats", ignore_errors=True)
        (self.run_dir / FINISHED).unlink(missing_ok=True)
        self.on, self.told, self.back, self.step_s, self.trial = hosts, set(), None, [], None
        self.beats, self.asked, self.changed = {}, {}, time.monotonic()
        self.step_began = self.changed
        job, problem = subprocess.Popen(words, start_new_session=True), None
        while job.poll() is None and not problem:
            time.sleep(POLL_S)
            self.read()
            self.look_for_stragglers()
            problem = self.what_ended() or self.what_hosts_say()
            if self.asked_to_stop or self.back:
                self.tell()
        noticed_s = time.monotonic() - self.changed
        with suppress(subprocess.TimeoutExpired):
            job.wait(GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)  # pdsh and its logins; the ranks themselves in gather_hosts
        code = job.wait()
        self.read()
        if (self.run_dir / FINISHED).exists():
            return None
        if not problem and self.back and code == 0:
            return f"{self.back} is back: saved, to go on with it"
        return f"{self.name_cause(problem, code)}; noticed {noticed_s:.1f} s after the last beat"

    def read(self) -> None:
        """Take note of new beats: when, whether the host's clock is right, and how long a step takes."""
        new, now = read_beats(self.run_dir), time.monotonic()
        for rank, beat in new.items():
            if beat == self.beats.get(rank) or beat["phase"] == "failed":
                continue
            self.changed, ahead = now, beat["time"] - time.time()  # never more than POLL_S old
            wrong = (
                f"{beat['host']} (rank {rank}): its clock is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
            )
            self.say_once(f"clock of {beat['host']}", wrong if abs(ahead) > CLOCK_S else None)
            if rank == 0 and beat["step"] != self.beats.get(0, beat)["step"]:
                self.step_s.append(now - self.step_began)
                self.step_began = now
        self.beats = new

    def look_for_stragglers(self) -> None:
        """When a step takes much longer than usual, measure once which host sends slowly."""
        usual, now_s = median(self.step_s[2:7]) if len(self.step_s) >= 7 else None, time.monotonic() - self.step_began
        going = self.beats and all(beat["phase"] in PHASES[1:4] for beat in self.beats.values())
        if usual and going and not self.trial and now_s > max(SLOW_S, SLOW_FACTOR * usual):
            self.trial = self.pool.submit(send_seconds, self.on, TRIAL_BYTES)
            self.say(f"step {self.beats[0]['step']} takes {now_s:.1f} s so far, usual are {usual:.2f}: who is slow?")
        if isinstance(self.trial, Future) and self.trial.done():
            took, self.trial = self.trial.result(), "told"
            slow = [host for host in took if took[host] > max(0.5, 2 * min(took.values()))]
            rates = ", ".join(f"{host} {8e-6 * TRIAL_BYTES / max(took[host], 0.01):.1f}" for host in took)
            names = " and ".join(map(self.ranks_on, slow)) or "no host: the network is not it"
            self.say(f"slow: {names} (Mbit/s sent beside the training: {rates})")

    def what_ended(self) -> str | None:
        failed = [beat for beat in self.beats.values() if beat["phase"] == "failed"]
        if failed:
            return "failed"
        silent_s = time.monotonic() - self.changed
        return f"no beat for {silent_s:.0f} s" if silent_s > self.args.hang_timeout_s else None

    def what_hosts_say(self) -> str | None:
        """Ask every host every few seconds, without waiting for it: is it there, do its ranks live?"""
        for host in self.hosts:
            future, at, pids = self.asked.get(host, (None, 0, {}))
            if future and not future.done() or time.monotonic() - at < PROBE_S:
                continue
            if future:
                answer: Answer = future.result()
                on = f"{self.ranks_on(host)} does not answer: {answer.problem}"
                self.say_once(host, answer.problem and (on if host in self.on else None))
                if host not in self.on and not answer.problem and not self.back:
                    self.back = host
                    self.say(f"{host} is back: the run saves, and goes on with it")
                dead = [pids[word] for word in answer.text.split() if word in pids]
                if dead := [rank for rank in dead if self.beats[rank]["phase"] not in ("done", "failed")]:
                    return " and ".join(f"{where(self.beats[rank])} died without a word" for rank in dead)
            pids = {str(beat["pid"]): rank for rank, beat in self.beats.items() if beat["host"] == host}
            question = "; ".join(f"kill -0 {pid} 2>/dev/null || echo {pid}" for pid in pids) or ":"
            self.asked[host] = (self.pool.submit(ask, host, question), time.monotonic(), pids)
        return None

    def tell(self) -> None:
        """SIGTERM once to each host's ranks, which save and end."""
        ready = {beat["host"] for beat in self.beats.values() if beat["phase"] != "starting"} - self.told
        self.told |= ready
        for host in ready:
            self.pool.submit(ask, host, self.signal_ranks("TERM")[host])

    def name_cause(self, problem: str | None, code: int) -> str:
        """Hosts that do not answer first, then ranks with a reason of their own, then those that waited for them."""
        answers = ask_all(dict.fromkeys(self.on, "true"))
        gone = [host for host in self.on if answers[host].problem]
        for host in gone:
            self.said[host] = f"{self.ranks_on(host)} does not answer: {answers[host].problem}"
        failed = [beat for beat in self.beats.values() if beat["phase"] == "failed"]
        failed.sort(key=lambda beat: any(word in beat["problem"] for word in ECHOES))
        causes = [self.said[host] for host in gone]
        causes += [problem] if problem not in (None, "failed") else []
        causes += [f"{where(beat)}: {beat['problem']}" for beat in failed]
        if not causes:
            going = [where(beat) for beat in self.beats.values() if beat["phase"] != "done"]
            causes = [f"the launcher ended with code {code}; {', '.join(going) or 'no rank had begun'}"]
        return " | ".join(dict.fromkeys(causes))

    # --- and over again ---

    def run(self) -> None:
        in_a_row, newest = 0, None
        while True:
            hosts = self.gather_hosts()
            if self.asked_to_stop:
                return self.say(f"asked to stop by {self.asked_to_stop.name}: no start")
            start = time.monotonic()
            self.say(f"starting on {', '.join(hosts)}")
            problem = self.run_once(hosts)
            if problem is None or self.asked_to_stop:
                why = f"asked to stop by {self.asked_to_stop.name}" if self.asked_to_stop else "finished"
                return self.say(f"{why} after {time.monotonic() - start:.0f} s")
            found = next(iter(checkpoints(self.run_dir / "checkpoints")), None)
            in_a_row, newest = (in_a_row + 1 if found == newest else 1), found  # a new checkpoint: it gets somewhere
            self.say(f"{problem}; newest checkpoint {found.name if found else 'none'}")
            if in_a_row > self.args.max_restarts:
                raise UserError(f"{in_a_row - 1} restarts in a row without a new checkpoint: {problem}")
            wait_s = self.args.backoff_s * 2 ** (in_a_row - 1)
            self.say(f"restart {in_a_row} of {self.args.max_restarts} in {wait_s:g} s")
            ends = time.monotonic() + wait_s
            while time.monotonic() < ends and not self.asked_to_stop:
                time.sleep(POLL_S)


def main() -> None:
    HostSupervisor(parse_args()).run()


if __name__ == "__main__":
    with clear_errors():
        main()
