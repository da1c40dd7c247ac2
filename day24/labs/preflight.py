"""Day 24: is this cluster fit for the job? Ask every host, measure every pair, and say what differs - before the job.

    python day24/labs/preflight.py --hostfile runs/lab/hostfile
    python day24/labs/preflight.py --hostfile hosts --folder /shared/runs --disk /scratch --min_disk_gb 500

Run it on the first host. Expect two tables, then "fit", or a finding a line and exit code 1. Seconds, and no GPU time.
What NCCL makes of the network day 20's bandwidth lab measures. Source: day24/notes.md; DeepSpeed issues 4907, 5093.
"""

import argparse
import json
import os
import shlex
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.errors import UserError, clear_errors
from day24.reach import ask, ask_all, hosts_of
from day24.watch import differences


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hostfile", type=Path, required=True, help="the job's hostfile")
    parser.add_argument("--deepspeed_config", default="day24/ds_config.json", help="DeepSpeed JSON config")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="the folder that all hosts should share")
    parser.add_argument("--disk", type=Path, default=Path("/tmp"), help="a folder on each host's own disk")
    parser.add_argument("--port", type=int, default=29500, help="the port of the job's first rank")
    parser.add_argument("--min_disk_gb", type=float, default=1, help="free on each host's disk")
    parser.add_argument("--min_shm_gb", type=float, default=0.1, help="size of /dev/shm: data loaders and NCCL use it")
    parser.add_argument("--max_clock_s", type=float, default=1, help="how far a clock may be off the first host's")
    parser.add_argument("--spread", type=float, default=2, help="a pair this much slower than the median is a finding")
    return parser.parse_args()


def describe_hosts(args: argparse.Namespace, hosts: list[str]) -> tuple[dict[str, dict], list[str]]:
    """What each host says about itself, and a finding for each that says nothing."""
    token = f"preflight_{uuid.uuid4().hex[:8]}"
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / token).touch()
    words = [sys.executable, HERE / "about.py", "--describe", args.deepspeed_config, "--token", token]
    words += ["--folder", args.folder.resolve(), "--disk", args.disk, "--port", args.port]
    command = f"cd {shlex.quote(os.getcwd())} && {shlex.join(map(str, words))}"
    try:
        answers = ask_all(dict.fromkeys(hosts, command))
    finally:
        (args.folder / token).unlink()
    said = {host: json.loads(answer.text) for host, answer in answers.items() if not answer.problem}
    return said, [f"{host}: no answer: {answer.problem}" for host, answer in answers.items() if answer.problem]


def look_at_hosts(args: argparse.Namespace, said: dict[str, dict], slots: dict[str, int], env: dict) -> list[str]:
    """What differs between hosts, and what each has too little of."""
    first, findings = next(iter(said)), []
    for what in ("versions", "code"):
        found = differences({host: facts[what] for host, facts in said.items()})
        findings += found[:3] + ([f"and {len(found) - 3} more files"] if len(found) > 3 else [])
    findings += differences({host: {"GPUs": "; ".join(facts["gpus"]) or "none"} for host, facts in said.items()})
    interface = env.get("NCCL_SOCKET_IFNAME") or env.get("GLOO_SOCKET_IFNAME")
    for host, facts in said.items():
        if 0 < len(facts["gpus"]) < slots[host]:
            findings.append(f"{host}: slots={slots[host]} in the hostfile, {len(facts['gpus'])} GPUs")
        if facts["disk_bytes"] < args.min_disk_gb * 1e9:
            findings.append(
                f"{host}: {facts['disk_bytes'] / 1e9:.2f} GB free in {args.disk}, want {args.min_disk_gb:g}"
            )
        if facts["shm_bytes"] < args.min_shm_gb * 1e9:
            findings.append(f"{host}: /dev/shm has {facts['shm_bytes'] / 1e9:.3f} GB, want {args.min_shm_gb:g}")
        if not facts["shared"]:
            findings.append(f"{host}: {args.folder} is not the folder of {first}")
        if host == first and not facts["port_free"]:
            findings.append(f"{host}: port {args.port} is taken: --master_port, or end who has it")
        if interface and interface not in facts["interfaces"]:
            findings.append(f"{host}: no interface {interface!r} is up, there are {sorted(facts['interfaces'])}")
        if not interface and facts["own_address"].startswith("127."):
            name = f"{host}: its own name is {facts['own_address']}, and no GLOO_SOCKET_IFNAME in the environment file"
            findings.append(f"{name}: gloo would listen on the loopback")
    names = [interface] if interface else sorted(set.intersection(*(set(f["interfaces"]) for f in said.values())))
    mtus = {host: {f"MTU of {n}": str(f["interfaces"].get(n, "-")) for n in names} for host, f in said.items()}
    return findings + differences(mtus)


def environment() -> dict[str, str]:
    """What the launcher hands to all hosts: .deepspeed_env, as DeepSpeed reads it. UserError for a line it dies of."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in (Path.home() / name, Path(name)):
        if path.is_file():
            lines = path.read_text().splitlines()
            for number, line in enumerate(lines, 1):
                if "=" not in line:
                    raise UserError(f"{path} line {number}: {line!r} is not NAME=value: the launcher fails on it")
            return dict(line.split("=", 1) for line in lines)
    return {}


def measure_pairs(hosts: list[str], port: int) -> dict[tuple[str, str], dict]:
    """{(from, to): latency, bandwidth, clock}: round k is every host to the k-th after it, all at once."""
    about, count, pairs = f"{sys.executable} {HERE / 'about.py'}", len(hosts), {}
    for k in range(1, count):
        with ThreadPoolExecutor(2 * count) as pool:
            for host in hosts:
                pool.submit(ask, host, f"{about} --serve {port + k}", b"", 60)
            ways = [(hosts[i], hosts[(i + k) % count]) for i in range(count)]
            sent = {way: pool.submit(ask, way[0], f"{about} --send {way[1]}:{port + k}", b"", 90) for way in ways}
        for way, future in sent.items():
            answer = future.result()
            pairs[way] = {"problem": answer.problem} if answer.problem else json.loads(answer.text)
    return pairs


def look_at_pairs(args: argparse.Namespace, pairs: dict[tuple[str, str], dict], first: str) -> list[str]:
    findings = [f"{a} to {b}: {found['problem']}" for (a, b), found in pairs.items() if "problem" in found]
    good = {way: found for way, found in pairs.items() if "problem" not in found}
    usual = {key: median([found[key] for found in good.values()] or [0]) for key in ("mbit", "latency_ms")}
    best = max([found["mbit"] for found in good.values()], default=0)
    usual["mbit"] = best if len(good) == 2 else usual["mbit"]  # of two, the slower one is no median
    for (a, b), found in good.items():
        if found["mbit"] * args.spread < usual["mbit"]:
            findings.append(f"{a} to {b}: {found['mbit']:,.0f} Mbit/s, usual are {usual['mbit']:,.0f}")
        if found["latency_ms"] > args.spread * usual["latency_ms"] + 1:
            findings.append(f"{a} to {b}: latency {found['latency_ms']:.1f} ms, usual are {usual['latency_ms']:.1f}")
        if a == first and abs(found["clock_ahead_s"]) > args.max_clock_s:
            findings.append(f"{b}: its clock is {found['clock_ahead_s']:+.1f} s off that of {first}")
    return findings


def main() -> None:
    args = parse_args()
    slots = hosts_of(args.hostfile)
    if not (HERE.parent / args.deepspeed_config).is_file():
        raise UserError(f"--deepspeed_config {args.deepspeed_config}: there is no such file in {HERE.parent}")
    said, findings = describe_hosts(args, list(slots))
    env = environment()
    if said:
        findings += look_at_hosts(args, said, slots, env)
    for host, facts in said.items():
        versions = " ".join(f"{name} {number}" for name, number in facts["versions"].items())
        sizes = f"disk {facts['disk_bytes'] / 1e9:.1f} GB | shm {facts['shm_bytes'] / 1e9:.2f} GB"
        print(f"{host}: {versions} | {len(facts['gpus'])} GPUs | {len(facts['code'])} files | {sizes}")
    pairs = measure_pairs(list(said), args.port + 100) if len(said) > 1 else {}
    findings += look_at_pairs(args, pairs, next(iter(said), ""))
    for (a, b), found in pairs.items():
        if "problem" not in found:
            print(f"{a} -> {b}: {found['mbit']:,.0f} Mbit/s | {found['latency_ms']:.2f} ms")
    for finding in findings:
        print(f"finding: {finding}")
    if findings:
        raise UserError(f"not fit: {len(findings)} findings on {len(slots)} hosts, see above")
    print(f"fit: {len(said)} hosts, {sum(slots.values())} ranks, {len(pairs)} ways between them")


if __name__ == "__main__":
    with clear_errors():
        main()
