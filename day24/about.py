"""Day 24: what one host says about itself before a job - versions, GPUs, code, disk, memory, clock, network, ports.

    python day24/about.py --describe day24/ds_config.json       one line of JSON: `day24/labs/preflight.py` reads it
    python day24/about.py --serve 29600 --clients 1             answer pings and swallow bytes
    python day24/about.py --send host-b:29600                   one line of JSON: latency, bandwidth, clock

It needs Python and nothing else, and takes a tenth of a second. Source: man 5 proc; nvidia-smi --help-query-gpu.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "numpy")
PINGS, SEND_BYTES = 21, 2**22


def of_package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU; none where there is no driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()


def code(config: str) -> dict[str, str]:
    """{file: first digits of its SHA-256} of what this repository trains with, and of the config."""
    files = [*ROOT.glob("*/*.py"), ROOT / config]
    return {os.path.relpath(f, ROOT): hashlib.sha256(f.read_bytes()).hexdigest()[:8] for f in files if f.is_file()}


def interfaces() -> dict[str, int]:
    """{name: MTU} of the network interfaces that are up, without the loopback."""
    found = {}
    for path in sorted(Path("/sys/class/net").iterdir()):
        if path.name != "lo" and (path / "operstate").read_text().strip() == "up":
            found[path.name] = int((path / "mtu").read_text())
    return found


def own_address() -> str:
    """What this host's own name resolves to: gloo listens there unless GLOO_SOCKET_IFNAME says otherwise."""
    try:
        return socket.gethostbyname(platform.node())
    except OSError:
        return "nothing"


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def describe(args: argparse.Namespace) -> dict:
    token = args.folder / args.token if args.token else None
    return {
        "versions": {"python": platform.python_version(), **{name: of_package(name) for name in PACKAGES}},
        "gpus": gpus(),
        "code": code(args.describe),
        "disk_bytes": shutil.disk_usage(args.disk).free,
        "shm_bytes": shutil.disk_usage("/dev/shm").total,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "interfaces": interfaces(),
        "own_address": own_address(),
        "port_free": port_is_free(args.port),
        "shared": bool(token and token.exists()),
    }


def serve(port: int, clients: int) -> None:
    """To each client: PINGS times a byte back with this host's clock, then count what it sends until it stops."""
    with socket.create_server(("", port)) as server:
        server.settimeout(30)
        for _ in range(clients):
            connection, _ = server.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for _ in range(PINGS):
                    connection.recv(1)
                    connection.sendall(struct.pack("d", time.time()))
                left = SEND_BYTES
                while left > 0 and (got := len(connection.recv(2**16))):
                    left -= got
                connection.sendall(b"!")


def send(address: str) -> dict:
    """Latency in ms (half a round trip), Mbit/s, and by how many seconds the other host's clock is ahead."""
    host, _, port = address.partition(":")
    for attempt in range(50):  # its server may not listen yet
        try:
            connection = socket.create_connection((host, int(port)), timeout=5)
            break
        except ConnectionRefusedError:
            if attempt == 49:
                raise
            time.sleep(0.1)
    trips, ahead = [], []
    with connection:
        connection.settimeout(None)  # ssh has a time-out of its own
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            start, clock = time.perf_counter(), time.time()
            connection.sendall(b"?")
            there = struct.unpack("d", connection.recv(8, socket.MSG_WAITALL))[0]
            trips.append(time.perf_counter() - start)
            ahead.append(there - clock - trips[-1] / 2)
        start = time.perf_counter()
        connection.sendall(bytes(SEND_BYTES))
        connection.recv(1)
        mbit = 8e-6 * SEND_BYTES / (time.perf_counter() - start)
    return {"latency_ms": 500 * median(trips), "mbit": mbit, "clock_ahead_s": median(ahead)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--describe", metavar="CONFIG", help="say all about this host; the config counts as code")
    parser.add_argument("--folder", type=Path, default=ROOT, help="a folder that all hosts should share")
    parser.add_argument("--token", default=None, help="a file that another host has just written there")
    parser.add_argument("--disk", type=Path, default=Path("/tmp"), help="a folder on the disk that has to have room")
    parser.add_argument("--port", type=int, default=29500, help="the port of the job's first rank")
    parser.add_argument("--serve", type=int, metavar="PORT", help="wait for senders on this port")
    parser.add_argument("--clients", type=int, default=1, help="how many senders to wait for")
    parser.add_argument("--send", metavar="HOST:PORT", help="measure the way to a host that serves")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.describe:
        print(json.dumps(describe(args)))
    elif args.serve:
        serve(args.serve, args.clients)
    elif args.send:
        print(json.dumps(send(args.send)))
    else:
        sys.exit("error: one of --describe CONFIG, --serve PORT, --send HOST:PORT")


if __name__ == "__main__":
    main()
