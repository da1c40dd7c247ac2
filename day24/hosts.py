"""Day 24: several hosts on one machine - network namespaces, each with its own sshd, name, processes, disk and memory.

    sudo make lab                                                   two hosts, and a shell on host-a
    python day24/hosts.py --hosts 3 --rate 1gbit                    three hosts, each sending at most 1 Gbit/s
    python day24/hosts.py deepspeed --hostfile runs/lab/hostfile day24/train.py --steps 20

Expect a prompt on host-a: what you type there runs unchanged on real hosts. `exit` takes all of it down. Root, Linux.
Checked with Linux 6.18, iproute2 6.1, OpenSSH 9.2. Source: man 7 namespaces, man 1 unshare, man 8 sshd.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.link import INTERFACE, Link, open_link, why_no_link
from bench.world import process_tree
from common.errors import UserError, clear_errors

PROGRAMS = {"sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "nsenter": "util-linux"}
RATE = re.compile(r"\d+(\.\d+)?([kmgt]i?)?(bit|bps)", re.I)  # of tc, man 8 tc
PATH = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"  # the environment's own programs first
# What a host's first process does: a disk of its own, names, sshd; then it collects the processes that end (wait).
BOOT = """
mount --bind {folder} {folder} && mount -t tmpfs -o size={disk} disk {folder}/disk
mount -t tmpfs -o size={memory} shm /dev/shm && mount -t tmpfs run /run && mkdir /run/sshd
mount --bind {folder}/hosts_{name} /etc/hosts && mount --bind {folder}/ssh_config /etc/ssh/ssh_config
test ! -e ~root/.bashrc || mount --bind {folder}/bashrc ~root/.bashrc
hostname {name} && {login} && touch {folder}/disk/up
while sleep 0.5; do :; done
"""
SSHD = """Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile {folder}/disk/sshd.pid
SetEnv {login}
"""
SSH = """Host *
    IdentityFile {folder}/key
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking accept-new
    LogLevel ERROR
    ConnectTimeout 3
    ServerAliveInterval 2
    ServerAliveCountMax 3
"""


class Host:
    """One host of the lab. `open_lab` makes them."""

    def __init__(self, letter: str, link: Link, folder: Path) -> None:
        self.letter, self.link, self.folder = letter, link, folder
        self.name, self.address = f"host-{letter.lower()}", link.address(letter)
        self.process: subprocess.Popen | None = None

    def start(self, disk: str = "64m", memory: str = "256m", sshd: bool = True, **env: str) -> None:
        """Switch it on: its namespaces, and sshd. `env`: what every login finds in its environment.

        Its disk ({folder}/disk, `disk` large) and its shared memory (`memory`) are empty and its own; what it has
        besides is the machine's, as if all hosts had mounted one shared folder.
        """
        login = " ".join(f"{key}={value}" for key, value in {"PATH": PATH, **env}.items())
        config = SSHD.format(folder=self.folder, login=login)
        (self.folder / f"sshd_config_{self.name}").write_text(config)
        login = f"{shutil.which('sshd')} -f {self.folder}/sshd_config_{self.name}" if sshd else "true"
        boot = BOOT.format(folder=self.folder, name=self.name, disk=disk, memory=memory, login=login)
        ready = self.folder / "disk" / ("sshd.pid" if sshd else "up")
        inside = ["ip", "netns", "exec", self.link.namespace(self.letter), "unshare", "--mount", "--uts", "--ipc"]
        inside += ["--pid", "--fork", "--kill-child", "--mount-proc"]  # its first process ends: all of it ends
        words = ["setpriv", "--pdeathsig", "KILL", *inside, "sh", "-ec", boot]  # and so does it when this program ends
        _tc("ip", "-n", self.link.namespace(self.letter), "link", "set", INTERFACE, "up")
        with open(self.folder / f"boot_{self.name}", "w") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, cwd="/")
        for _ in range(100):
            if self.process.poll() is not None:
                raise UserError(f"{self.name} does not start: {(self.folder / f'boot_{self.name}').read_text()}")
            inside = process_tree(self.process.pid)[1:]
            if inside and not self.run("test", "-e", ready, check=False).returncode:
                return
            time.sleep(0.05)
        raise UserError(f"{self.name}: no sshd after 5 s: {(self.folder / f'boot_{self.name}').read_text()}")

    def inside(self) -> list[str]:
        """The words that start a command on this host, as if typed at its console."""
        first = [child.pid for child in process_tree(self.process.pid)[1:2]]
        if not first:
            raise UserError(f"{self.name} is off")
        return ["nsenter", "--target", str(first[0]), "--mount", "--uts", "--ipc", "--net", "--pid"]

    def popen(self, *words: object, **options) -> subprocess.Popen:
        env = {key: value for key, value in os.environ.items() if key not in _RANK}
        env |= {"PATH": PATH, "DS_ENV_FILE": str(self.folder / "deepspeed_env"), **options.pop("env", {})}
        folder = options.pop("cwd", None) or os.getcwd()
        return subprocess.Popen([*self.inside(), f"--wdns={folder}", *map(str, words)], env=env, **options)

    def run(self, *words: object, check: bool = True, timeout: float = 300, **options) -> subprocess.CompletedProcess:
        """Run a command on this host to its end; return exit code and output. UserError when it fails."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "stdin": subprocess.DEVNULL}
        process = self.popen(*words, start_new_session=True, **(pipes | options))
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            stderr += f"\nno end after {timeout:g} s"
            process.returncode = 124
        if check and process.returncode:
            raise UserError(f"{self.name}: {' '.join(map(str, words))}: {(stdout + stderr).strip()[-2000:]}")
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    # --- what can happen to a host ---

    def cut(self) -> None:
        """Pull its cable: what it sends is lost, and nobody tells the others."""
        _tc("ip", "-n", self.link.namespace(self.letter), "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        _tc("ip", "-n", self.link.namespace(self.letter), "link", "set", INTERFACE, "up")

    def slow(self, rate: str | None) -> None:
        """Limit what it sends, and not what it receives; None: no limit."""
        shape = ("tbf", "rate", rate, "burst", "128kb", "latency", "400ms") if rate else ("pfifo",)
        _tc("tc", "-n", self.link.namespace(self.letter), "qdisc", "replace", "dev", INTERFACE, "root", *shape)

    def kill(self) -> None:
        """Power off: no process gets to say goodbye, and neither does TCP."""
        self.cut()
        for process in process_tree(self.process.pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def stop_sshd(self) -> None:
        """End the sshd that listens. The logins that there are go on, as on any host."""
        self.run("sh", "-c", f"kill $(cat {self.folder}/disk/sshd.pid)")

    def start_sshd(self) -> None:
        self.run(shutil.which("sshd"), "-f", f"{self.folder}/sshd_config_{self.name}")

    def fill_disk(self) -> None:
        self.run("dd", "if=/dev/zero", f"of={self.folder}/disk/full", "bs=64k", check=False)

    def clear_disk(self) -> None:
        self.run("rm", f"{self.folder}/disk/full")

    def overlay(self, path: Path, instead: Path) -> None:
        """On this host alone the file `path` reads like `instead`: an old copy, a config that somebody tried."""
        self.run("mount", "--bind", instead, path)

    def shift_clock(self, seconds: float) -> None:
        """Each Python that starts here from now on sees `seconds` more on the clock: namespaces share the real one."""
        start_up = next(Path(sysconfig.get_path("purelib")).glob("*.pth"), None)  # lines that Python runs as it starts
        if not start_up:
            raise UserError(f"no .pth file in {sysconfig.get_path('purelib')}: the lab cannot shift a clock")
        real = "time.real = getattr(time, 'real', time.time)"  # such files may be run twice
        shift = f"import time; {real}; time.time = lambda t=time: t.real() + {seconds}"
        shifted = self.folder / f"clock_{self.name}.pth"
        shifted.write_text(f"{start_up.read_text()}\n{shift}\n")
        self.overlay(start_up, shifted)

    def uncover(self, path: Path) -> None:
        self.run("umount", path)


class Lab:
    """`hosts`, their `link`, and a `folder` with hostfile, deepspeed_env and the throw-away keys."""

    def __init__(self, hosts: list[Host], link: Link, folder: Path) -> None:
        self.hosts, self.link, self.folder = hosts, link, folder
        self.hostfile, self.environment = folder / "hostfile", folder / "deepspeed_env"

    def __getitem__(self, letter: str) -> Host:
        return self.hosts[self.link.hosts.index(letter)]


_RANK = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"}


def why_no_lab() -> str | None:
    """None where the lab can stand; else one sentence that says what this machine lacks."""
    if missing := why_no_link():
        return missing
    for program, package in PROGRAMS.items():
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"):
            return f"the lab of day 24 needs the program {program!r}: apt-get install {package}"
    trial = subprocess.run(["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "true"])
    return "this machine's kernel, or its container, lets nobody mount: no lab of day 24" if trial.returncode else None


@contextmanager
def open_lab(folder: Path, hosts: int = 2, slots: int = 1, rate: str | None = None) -> Iterator[Lab]:
    """Bring up host-a, host-b, ... with `slots` ranks each; take all down at the end. `folder`: where its files lie.

    Raises UserError with what is missing. What a killed process left behind is taken down first.
    """
    if not 1 <= hosts <= 26 or slots < 1:
        raise UserError(f"--hosts {hosts} --slots {slots}: 1 to 26 hosts (one a letter), and at least one rank on each")
    if rate and not RATE.fullmatch(rate):
        raise UserError(f"--rate {rate}: a number and tc's unit, for example 100mbit or 1gbit")
    if missing := why_no_lab():
        raise UserError(missing)
    folder = folder.absolute()
    pid_file = folder / "lab.pid"
    if folder.exists() and not pid_file.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--folder {folder}: a lab empties its folder, and this one holds something else: name another")
    if pid_file.exists() and process_tree(int(pid_file.read_text())):
        raise UserError(f"a lab stands in {folder} (process {pid_file.read_text()}): exit it first, or name another")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "disk").mkdir(parents=True)
    pid_file.write_text(str(os.getpid()))
    try:
        with open_link(rate, hosts) as link:
            lab = Lab([Host(letter, link, folder) for letter in link.hosts], link, folder)
            _write_files(lab, slots)
            try:
                for host in lab.hosts:
                    host.start()
                yield lab
            finally:
                for host in lab.hosts:
                    if host.process and host.process.poll() is None:
                        host.kill()
    finally:
        shutil.rmtree(folder)


def _write_files(lab: Lab, slots: int) -> None:
    folder = lab.folder
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    others = "".join(f"{host.address} {host.name}\n" for host in lab.hosts)
    for host in lab.hosts:  # as Debian's installer writes it: the host's own name is an address of the loopback
        (folder / f"hosts_{host.name}").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{others}")
    (folder / "bashrc").write_text("")  # what the user's own one starts, a power failure could leave half done
    lab.hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in lab.hosts))
    passed_on = {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
    passed_on |= {"DS_ACCELERATOR": "cpu", "PATH": PATH}
    passed_on |= {name: os.environ[name] for name in ("UNDER_MAKE", "COURSE_CACHE") if name in os.environ}
    lab.environment.write_text("\n".join(f"{key}={value}" for key, value in passed_on.items()))  # no blank line


def _tc(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2, help="hosts: host-a, host-b, ...")
    parser.add_argument("--slots", type=int, default=1, help="ranks on each host, as the hostfile says")
    parser.add_argument("--rate", default=None, help="what each host may send, in tc's words: 100mbit, 1gbit")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs/lab", help="for hostfile, keys, environment")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a command for host-a; a shell when there is none")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with open_lab(args.folder, args.hosts, args.slots, args.rate) as lab:
        names = ", ".join(f"{host.name} {host.address}" for host in lab.hosts)
        print(f"{names} | {lab.hostfile} | {lab.environment}", flush=True)
        process = lab["A"].popen(*(args.command or ["bash", "--norc"]), env={"PS1": r"\h:\W\$ "})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        code = process.wait()
    sys.exit(code)


if __name__ == "__main__":
    with clear_errors():
        main()
