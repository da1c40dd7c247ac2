"""Day 24, your turn: put the hostfile, the environment file and the command line of a broken cluster right.

Fill in the three TODOs, then check yourself; with root it also starts two hosts and a job on them, as `make lab` does:

    python day24/exercise.py

What is known of the cluster: host-a and host-b have one rank each. host-c is under repair. Between the hosts runs
eth0, 10.77.0.1 and 10.77.0.2; docker0 is up as well, with the same address on every host. host-a's name for itself is
127.0.1.1, as on every Debian. What somebody left there is in BROKEN_HOSTFILE, BROKEN_ENVIRONMENT and BROKEN_OPTIONS.
It says what is still wrong, or "solved". The answers are in solution.py. Source: day24/notes.md, Pitfalls.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from deepspeed.launcher.runner import _parse_hostfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from bench.world import free_port
from common.errors import UserError, clear_errors
from day24.hosts import open_lab, why_no_lab

# 关于这个集群已知的事：host-a 和 host-b 各有一个 rank，host-c 在维修。主机之间走 eth0，地址是 10.77.0.1 和 10.77.0.2；
# docker0 也开着，在每台主机上地址都相同。和所有 Debian 一样，host-a 把自己的名字解析为 127.0.1.1。
BROKEN_HOSTFILE = """\
host-a:1
host-b slots=1
host-c slots=1
host-b slots=1
"""
BROKEN_ENVIRONMENT = """\
# handed to every rank by the launcher

export GLOO_SOCKET_IFNAME=docker0
OMP_NUM_THREADS=1
"""
BROKEN_OPTIONS = ["--hostfile", "hosts.txt", "--master_addr", "127.0.0.1"]
MEET_S = 60  # a job that does not end by then hangs


def hostfile() -> str:
    """Return what the hostfile has to say, so that DeepSpeed starts one rank on each host that works."""
    # TODO 1: one line a host, NAME slots=RANKS. Which of the four lines are not right, and why?
    # 返回 hostfile 的内容，让 DeepSpeed 在每台能用的主机上启动一个 rank。每台主机一行：名字 slots=rank 数。四行里哪些
    # 不对，为什么？
    raise NotImplementedError


def environment() -> str:
    """Return what .deepspeed_env has to say; DeepSpeed splits every line at its first "=", whatever it is."""
    # TODO 2: no comment, no blank line, no `export`; and an interface that leads to the other host.
    # 返回 .deepspeed_env 的内容；DeepSpeed 不管一行是什么，都在第一个 "=" 处切开。不能有注释、空行、`export`；网卡要
    # 通向另一台主机。
    raise NotImplementedError


def options(hostfile: str) -> list[str]:
    """Return the launcher's options, given the path of the hostfile: what goes between `deepspeed` and the script."""
    # TODO 3: a hostfile that is not there is no error: DeepSpeed warns, and trains on this machine alone. And where
    # do the ranks of host-b find rank 0?
    # 给定 hostfile 的路径，返回启动器的选项：写在 `deepspeed` 和脚本之间的部分。hostfile 不存在不算错误：DeepSpeed 只
    # 警告一声，就在本机上训练。host-b 的 rank 又到哪里找 rank 0？
    raise NotImplementedError


def of_kind(number: int, kind: type, answer: object) -> object:
    if not isinstance(answer, kind):
        raise UserError(f"not yet: TODO {number}: it returns {answer!r}, want a {kind.__name__}.")
    return answer


def check_on_paper(hostfile: Callable, environment: Callable, options: Callable) -> None:
    """What DeepSpeed's own readers make of the answers; UserError says what is wrong."""
    lines = of_kind(1, str, hostfile()).splitlines()
    try:
        found = dict(_parse_hostfile(lines))
    except ValueError as error:
        raise UserError(f"not yet: TODO 1: {error}.") from error
    if found != {"host-a": 1, "host-b": 1}:
        raise UserError(f"not yet: TODO 1: ranks on {found}, want one each on host-a and host-b.")
    for number, line in enumerate(of_kind(2, str, environment()).splitlines(), 1):
        if "=" not in line:
            raise UserError(
                f"not yet: TODO 2: the launcher dies of line {number}, {line!r}: not enough values to unpack."
            )
        if not line.split("=")[0].isidentifier():
            raise UserError(f"not yet: TODO 2: line {number} sets a variable called {line.split('=')[0]!r}.")
    passed_on = dict(line.split("=", 1) for line in environment().splitlines())
    if (interface := passed_on.get("GLOO_SOCKET_IFNAME")) != "eth0":
        raise UserError(f"not yet: TODO 2: gloo would use {interface or 'the address of the own name, 127.0.1.1'}.")
    words = of_kind(3, list, options("HOSTFILE"))
    if "HOSTFILE" not in words:
        raise UserError(f"not yet: TODO 3: {words} do not name the hostfile: DeepSpeed would train on this host alone.")
    address = words[words.index("--master_addr") + 1] if "--master_addr" in words[:-1] else "10.77.0.1"
    if address not in ("10.77.0.1", "host-a"):
        raise UserError(f"not yet: TODO 3: at {address} host-b finds itself, not rank 0: it waits there for ever.")


def check_in_lab(hostfile: Callable, environment: Callable, options: Callable) -> str:
    """Bring the cluster up and start a job on it with the answers; return what the job said."""
    with tempfile.TemporaryDirectory() as folder, open_lab(Path(folder) / "lab") as lab:
        for host in lab.hosts:
            host.run("sh", "-c", "ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0")
            host.run("ip", "link", "set", "docker0", "up")
        (lab.folder / "mine").write_text(hostfile())
        accelerator = f"DS_ACCELERATOR={os.environ.get('DS_ACCELERATOR', 'cpu')}"
        lab.environment.write_text("\n".join([*environment().splitlines(), accelerator]))
        words = [*options(str(lab.folder / "mine")), "--master_port", free_port(), Path(__file__).resolve(), "--meet"]
        done = lab["A"].run("deepspeed", *words, check=False, timeout=MEET_S, cwd=lab.folder)
    said = [line for line in done.stdout.splitlines() if "met on" in line]
    if not said or "host-a host-b" not in said[0]:
        raise UserError(f"not yet: the job on two hosts did not meet: {(done.stderr or done.stdout).strip()[-300:]}")
    return said[0].split(": ")[-1]  # pdsh puts the host before each line


def check(hostfile: Callable, environment: Callable, options: Callable) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--meet", action="store_true", help="used by the check: a rank of the job on two hosts")
    if parser.parse_args().meet:
        return meet()
    check_on_paper(hostfile, environment, options)
    missing = why_no_lab()
    if os.environ.get("RANK", "0") != "0":  # started as ranks: one of them is enough for the lab
        return None
    said = f"on paper; {missing}" if missing else check_in_lab(hostfile, environment, options)
    print(f"solved: {said}")


def meet() -> None:
    """What each rank of the job does: name its host to the others."""
    dist.init_process_group("gloo")
    hosts = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, platform.node())
    if dist.get_rank() == 0:
        print(f"{len(hosts)} ranks met on {' '.join(hosts)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(hostfile, environment, options)
