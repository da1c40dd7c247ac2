"""A link of known speed between hosts that are network namespaces of one machine: shape it, meter it, run ranks on it.

    with open_link("100mbit") as link:                               # hosts A and B; root and iproute2
        ended = link.run_ranks("AB", "day08/labs/fit_link.py")       # rank 0 on A, rank 1 on B
        link.set_rate("1gbit")

    before = sent_over_link()                                        # within a rank
    all_reduce(tensor)
    print(sent_over_link() - before)                                 # bytes that left this rank's host, headers too

What Linux's traffic control limits is the rate: messages still arrive within microseconds.
Checked with Linux 6.18 and iproute2 6.1. Source: man 8 ip-netns, man 8 tc-tbf, man 5 proc (/proc/net/dev)
"""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from string import ascii_uppercase

import psutil

from bench.world import free_port, run_together
from common.errors import UserError

INTERFACE = "eth0"  # of each host, in its own namespace
NAME = "ds28-{pid}-{host}"  # the namespaces of this process: what a killed one leaves behind is known by it


class Link:
    """Hosts joined by a switch. `open_link` makes one."""

    def __init__(self, hosts: int) -> None:
        self.hosts = ascii_uppercase[:hosts]

    def namespace(self, host: str) -> str:
        """The network namespace of host "A", "B", ..."""
        return NAME.format(pid=os.getpid(), host=host)

    def address(self, host: str) -> str:
        """The address at which the other hosts find it."""
        return f"10.77.0.{self.hosts.index(host) + 1}"

    def set_rate(self, rate: str | None) -> None:
        """Limit what each host sends to `rate`, in tc's words ("100mbit", "1gbit"); None: as fast as the machine."""
        shape = ("tbf", "rate", rate, "burst", "128kb", "latency", "400ms") if rate else ("pfifo",)
        for host in self.hosts:
            _run("tc", "-n", self.namespace(host), "qdisc", "replace", "dev", INTERFACE, "root", *shape)

    def run_ranks(self, placement: str, *words: object) -> list[subprocess.CompletedProcess]:
        """Run a script on one rank a letter of `placement`, "AABB" say: ranks 0 and 1 on host A, 2 and 3 on host B.

        Each has the environment that a launcher would give it. Return exit code and output of each rank; one that
        fails ends the others after 3 s. Raises ValueError for a host that the link does not have.
        """
        if unknown := sorted(set(placement) - set(self.hosts)):
            raise ValueError(f"placement {placement!r}: no host {unknown[0]!r} on this link, which has {self.hosts}")
        world = {"MASTER_ADDR": self.address(placement[0]), "MASTER_PORT": str(free_port())}
        world |= {"WORLD_SIZE": str(len(placement)), "GLOO_SOCKET_IFNAME": INTERFACE}
        ranks = [world | {"RANK": str(n), "LOCAL_RANK": str(placement[:n].count(h))} for n, h in enumerate(placement)]
        inside = [("ip", "netns", "exec", self.namespace(host)) for host in placement]
        return run_together(ranks, *words, inside=inside)


@contextmanager
def open_link(rate: str | None, hosts: int = 2) -> Iterator[Link]:
    """Bring up hosts "A", "B", ... joined by a link of `rate` (None: unshaped), and take them down at the end.

    Raises UserError with what is missing. What a killed process left behind is taken down first.
    """
    if missing := why_no_link():
        raise UserError(missing)
    link = Link(hosts)
    switch = link.namespace("switch")
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "up", "type", "bridge")
        for host in link.hosts:
            there = link.namespace(host)
            _run("ip", "netns", "add", there)
            pair = ("type", "veth", "peer", "name", f"to{host}", "netns", switch)
            _run("ip", "link", "add", INTERFACE, "netns", there, *pair)
            _run("ip", "-n", switch, "link", "set", f"to{host}", "master", "bridge", "up")
            _run("ip", "-n", there, "addr", "add", f"{link.address(host)}/24", "dev", INTERFACE)
            _run("ip", "-n", there, "link", "set", "lo", "up")
            _run("ip", "-n", there, "link", "set", INTERFACE, "up")
        link.set_rate(rate)
        yield link
    finally:
        _take_down(os.getpid())


def why_no_link() -> str | None:
    """None where a link can be made; else one sentence that says what this machine lacks."""
    if os.geteuid() != 0:
        return "a link between hosts of one machine needs root: start this as root, in a container or with sudo"
    trial = NAME.format(pid=os.getpid(), host="trial")
    try:
        for pid in {
            int(found[1]) for found in map(re.compile(r"ds28-(\d+)-").match, _run("ip", "netns").split()) if found
        }:
            if not psutil.pid_exists(pid):
                _take_down(pid)
        _run("ip", "netns", "add", trial)
        _run("ip", "-n", trial, "link", "add", INTERFACE, "type", "veth", "peer", "name", "other")
        _run(
            "tc",
            "-n",
            trial,
            "qdisc",
            "add",
            "dev",
            INTERFACE,
            *["root", "tbf", "rate", "1mbit", "burst", "128kb", "latency", "1s"],
        )
    except FileNotFoundError as error:
        return f"a link between hosts of one machine needs the program {error.filename!r}: apt-get install iproute2"
    except UserError as error:
        return f"this machine's kernel cannot make a link between network namespaces: {error}"
    finally:
        with suppress(FileNotFoundError):
            subprocess.run(["ip", "netns", "delete", trial], capture_output=True)
    return None


def sent_over_link() -> int:
    """Bytes that this rank's host has sent over the link so far, with the headers of TCP, IP and Ethernet."""
    return int(re.search(rf"{INTERFACE}:\s*(?:\d+\s+){{8}}(\d+)", Path("/proc/net/dev").read_text())[1])


def _take_down(pid: int) -> None:
    for name in _run("ip", "netns").split():
        if name.startswith(NAME.format(pid=pid, host="")):
            _run("ip", "netns", "delete", name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
