"""Day 24: a lab of several hosts that leaves nothing; jobs on it equal to one host's; faults named and resumed from."""

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

from common.errors import UserError
from day24 import goodput, hosts
from day24.reach import hosts_of
from day24.watch import differences, fingerprint
from tests.house import altered_solution
from tests.launch import ROOT, SMALL_CORPUS, free_port, run_plain, run_ranks

NO_LAB = hosts.why_no_lab()
needs_lab = pytest.mark.skipif(NO_LAB is not None, reason=str(NO_LAB))
FLAGS = ["--steps", 4, "--save_every", 4, "--log_every", 1, "--corpus", SMALL_CORPUS]


def left_over(folder: Path) -> list[str]:
    """Namespaces, processes and mounts of a lab in `folder`."""
    found = [line for line in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.splitlines()]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if f"{folder}/" in words and "pytest" not in words:
            found.append(words)
    return found + ([str(folder)] if folder.exists() else [])


@pytest.mark.launch
@needs_lab
def test_two_hosts_over_ssh_train_like_one_and_leave_nothing(tmp_path):
    folder = tmp_path / "lab"
    ours = {f"ds28-{os.getpid()}-{name}" for name in ("A", "B", "switch")}
    with hosts.open_lab(folder) as lab:
        words = ["deepspeed", "-q", "--hostfile", lab.hostfile, "--master_addr", lab["A"].address]
        words += ["--master_port", free_port(), "day24/train.py", *FLAGS, "--run_dir", tmp_path / "two"]
        done = lab["A"].run(*words, cwd=ROOT)
    assert "hosts host-a: rank 0 | host-b: rank 1 | same code and config | time-out 60 s" in done.stdout
    losses = {int(step): float(loss) for step, loss in re.findall(r"step +(\d+) \| loss ([\d.]+)", done.stdout)}
    run = run_ranks("day24/train.py", *FLAGS, "--run_dir", tmp_path / "one", ranks=2)
    assert list(losses) == [1, 2, 3, 4] and losses == pytest.approx(run.losses, abs=1e-6)
    beats = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("two/heartbeats/*.json"))]
    assert [(beat["host"], beat["rank"], beat["phase"]) for beat in beats] == [
        ("host-a", 0, "done"),
        ("host-b", 1, "done"),
    ]
    assert not [line for line in left_over(folder) if "ds28-" not in line or line.split()[0] in ours]


@needs_lab
def test_the_lab_stands_again_after_a_kill_and_a_second_one_is_refused(tmp_path):
    folder = tmp_path / "lab"
    command = [sys.executable, "day24/hosts.py", "--folder", folder, "--hosts", 3, "sh", "-c", "echo up; sleep 60"]
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = iter(process.stdout.readline, "")
    assert any(line == "up\n" for line in lines)
    with pytest.raises(UserError, match="a lab stands in"), hosts.open_lab(folder):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    ends = time.monotonic() + 5  # the hosts' first processes end with it, and all others with them
    while time.monotonic() < ends and any("sshd" in line for line in left_over(folder)):
        time.sleep(0.1)
    assert not any("sshd" in line or "sleep 60" in line for line in left_over(folder))
    with hosts.open_lab(folder) as lab:
        assert lab["A"].run("ssh", "host-b", "hostname").stdout == "host-b\n"
        assert f"ds28-{process.pid}" not in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert not folder.exists()


def test_what_a_machine_lacks_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(hosts, "why_no_link", lambda: None)
    monkeypatch.setattr(hosts.shutil, "which", lambda program, path=None: None if program == "pdsh" else program)
    with (
        pytest.raises(UserError, match="needs the program 'pdsh': apt-get install pdsh"),
        hosts.open_lab(tmp_path / "lab"),
    ):
        pass
    assert not (tmp_path / "lab").exists()


# --- before a job ---


def preflight(lab, *flags):
    words = [sys.executable, "day24/labs/preflight.py", "--hostfile", lab.hostfile, "--min_disk_gb", 0.03]
    words += ["--disk", lab.folder / "disk", "--folder", lab.folder / "shared", "--port", 29500, *flags]
    done = lab["A"].run(*words, check=False, cwd=ROOT)
    return done.returncode, re.findall(r"^finding: (.*)$", done.stdout, re.M), done.stdout


@pytest.mark.launch
@pytest.mark.serial
@needs_lab
def test_preflight_finds_a_planted_difference_of_each_kind(tmp_path):
    with hosts.open_lab(tmp_path / "lab", rate="200mbit") as lab:
        code, findings, said = preflight(lab)
        assert (code, findings) == (0, []) and "fit: 2 hosts, 2 ranks, 2 ways between them" in said
        host, disk = lab["B"], f"{lab.folder}/disk"
        host.kill()
        host.start(memory="2m", PATH=f"{disk}:{hosts.PATH}")
        smi = f"printf '#!/bin/sh\\necho NVIDIA H200, 143771 MiB, 570.1\\n' > {disk}/nvidia-smi; chmod +x {disk}/*"
        host.run("sh", "-c", f"{smi}; ip link set eth0 mtu 1400")
        host.fill_disk()
        host.shift_clock(90)
        host.slow("20mbit")
        (lab.folder / "empty").write_text("{}")
        host.overlay(ROOT / "day24/ds_config.json", lab.folder / "empty")
        metadata = next(Path(hosts.sysconfig.get_path("purelib")).glob("torch-*.dist-info/METADATA"))
        (lab.folder / "metadata").write_text(
            re.sub(r"\nVersion: .*", "\nVersion: 2.0.1", metadata.read_text(), count=1)
        )
        host.overlay(metadata, lab.folder / "metadata")
        host.run("mount", "-t", "tmpfs", "other", lab.folder / "shared")
        taken = "import socket, time; s = socket.create_server(('', 29500)); time.sleep(60)"
        blocker = lab["A"].popen(sys.executable, "-S", "-c", taken)
        lab.environment.write_text("DS_ACCELERATOR=cpu")  # and nothing of an interface
        code, findings, said = preflight(lab)
        blocker.kill()
        host.stop_sshd()
        _, unreachable, _ = preflight(lab)
    assert code == 1
    for kind in (
        r"host-b has MTU of eth0 1400, host-a has 1500",
        r"host-b has torch 2\.0\.1, host-a has \d",
        r"host-b has day24/ds_config\.json \w+, host-a has \w+",
        r"host-b has GPUs NVIDIA H200, 143771 MiB, 570\.1, host-a has none",
        r"host-b: 0\.00 GB free in \S+disk, want 0\.03",
        r"host-b: /dev/shm has 0\.002 GB, want 0\.1",
        r"host-b: \S+shared is not the folder of host-a",
        r"host-a: port 29500 is taken: --master_port",
        r"host-b: its own name is 127\.0\.1\.1, and no GLOO_SOCKET_IFNAME",
        r"host-b to host-a: \d+ Mbit/s, usual are \d+",
        r"host-b: its clock is \+90\.\d s off that of host-a",
    ):
        assert [finding for finding in findings if re.match(kind, finding)], (kind, findings)
    assert any("host-b: no answer: " in finding and "refused" in finding for finding in unreachable)


def test_latency_and_mtu_are_judged_too():
    names = runpy.run_path(str(ROOT / "day24/labs/preflight.py"))
    args = SimpleNamespace(spread=2, max_clock_s=1, folder="runs", disk="/tmp", port=1, min_disk_gb=0, min_shm_gb=0)
    way = {"mbit": 900.0, "latency_ms": 0.1, "clock_ahead_s": 0.0}
    pairs = {(a, b): dict(way) for a in "abc" for b in "abc" if a != b}
    assert names["look_at_pairs"](args, pairs, "a") == []
    pairs["a", "b"]["latency_ms"] = 5.0
    assert names["look_at_pairs"](args, pairs, "a") == ["a to b: latency 5.0 ms, usual are 0.1"]
    facts = {"versions": {}, "code": {}, "gpus": ["H200"] * 2, "disk_bytes": 1, "shm_bytes": 1, "shared": True}
    facts |= {"port_free": True, "own_address": "10.0.0.1"}
    said = {host: {**facts, "interfaces": {"eth0": mtu, host: 9000}} for host, mtu in (("a", 1500), ("b", 1400))}
    for env in ({"NCCL_SOCKET_IFNAME": "eth0"}, {}):  # without a name: of all that both have
        assert names["look_at_hosts"](args, said, {"a": 2, "b": 2}, env) == ["b has MTU of eth0 1400, a has 1500"]
    said["b"]["interfaces"] = {"eth1": 1500}
    missing, _ = names["look_at_hosts"](args, said, {"a": 2, "b": 2}, {"NCCL_SOCKET_IFNAME": "eth0"})
    assert missing == "b: no interface 'eth0' is up, there are ['eth1']"
    fewer, *_ = names["look_at_hosts"](args, said, {"a": 2, "b": 8}, {})
    assert fewer == "b: slots=8 in the hostfile, 2 GPUs"


def test_what_differs_between_hosts_is_one_sentence_each():
    facts = {"host-a": {"torch": "2.13.0", "a.py": "1"}, "host-b": {"torch": "2.12.0", "a.py": "1", "b.py": "2"}}
    want = ["host-b has b.py 2, host-a has none", "host-b has torch 2.12.0, host-a has 2.13.0"]
    assert differences(facts) == want and differences({"host-a": {"x": "1"}}) == []
    compared = fingerprint(ROOT / "day24/ds_config.json")  # what train.py compares: config, versions, its own modules
    assert {"day24/ds_config.json", "torch", "deepspeed", "day24/watch.py", "day17/checkpoints.py"} <= set(compared)


@pytest.mark.parametrize("bad", ["host-a:1\n", "host-a\n", "host-a slots=1\nhost-a slots=1\n", ""])
def test_a_bad_hostfile_gets_one_sentence(bad, tmp_path):
    (tmp_path / "hostfile").write_text(bad)
    with pytest.raises(UserError, match="a line reads: host-a slots=8"):
        hosts_of(tmp_path / "hostfile")
    with pytest.raises(UserError, match="no hostfile"):  # DeepSpeed warns, and trains on this machine alone
        hosts_of(tmp_path / "mistyped")


def test_the_launcher_reads_hosts_as_the_notes_say(tmp_path):
    """A hostfile that is not there trains on this machine alone (issue 4907); what is picked from one that is."""
    assert not fetch_hostfile(str(tmp_path / "mistyped"))
    pool = {"host-a": 2, "host-b": 2}
    assert parse_inclusion_exclusion(pool, "host-a@host-b:0,1", "") == {"host-a": [0, 1], "host-b": [0, 1]}
    assert parse_inclusion_exclusion(pool, "", "host-b:1") == {"host-a": [0, 1], "host-b": [0]}


def test_the_recorded_launchers_train_the_same_on_two_hosts():
    first, *rows = json.loads((ROOT / "day24/results/launchers_2cpu.json").read_text())["table"]
    ways = ["pdsh", "no_ssh", "torchrun", "rendezvous", "accelerate", "srun", "sbatch"]
    assert [row["case"] for row in rows] == ways
    for row in rows:
        assert (row["loss"], row["placed"]) == (first["loss"], "host-a: rank 0 | host-b: rank 1"), row


def test_the_recorded_steps_over_a_link_are_within_a_fifth_of_the_prediction():
    rows = json.loads((ROOT / "day24/results/wire_2cpu.json").read_text())["table"]
    assert len({row["case"] for row in rows}) == 5 and {row["rate"] for row in rows} == {"100mbit", "1gbit"}
    for row in rows:
        assert row["sent"] == pytest.approx(row["formula"], rel=0.02)
        assert 0.8 <= row["measured_ms"] / row["predicted_ms"] <= 1.2, row


# --- Slurm: the batch script hands each host its number ---


def test_the_batch_script_starts_torchrun_with_the_number_of_each_host(tmp_path):
    programs = {
        "scontrol": "printf 'node17\\nnode18\\n'",
        "srun": 'while [[ $1 == --* ]]; do shift; done; for n in 0 1; do SLURM_NODEID=$n "$@"; done',
        "torchrun": 'echo "$@"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node[17-18]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "123456",
        "SLURM_GPUS_ON_NODE": "8",
    }
    env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "day24/job.sbatch", "--steps", "7"], env=env, capture_output=True, text=True)
    want = "--nnodes 2 --node_rank {} --nproc_per_node 8 --master_addr node17 --master_port 23456 day24/train.py"
    assert done.stdout.splitlines() == [f"{want.format(n)} --run_dir runs/day24/slurm --steps 7" for n in (0, 1)]
    directives = re.findall(r"^#SBATCH --(\S+)", (ROOT / "day24/job.sbatch").read_text(), re.M)
    assert {"nodes=2", "ntasks-per-node=1", "signal=TERM@300", "requeue", "open-mode=append"} <= set(directives)


# --- on paper ---


def test_the_published_run_comes_out_of_its_rate():
    mtbf = goodput.mtbf_s(16_384)
    assert mtbf / 3600 == pytest.approx(54 * 24 / 419) and goodput.mtbf_s(1) / 86400 / 365 == pytest.approx(
        5.79, abs=0.01
    )
    interval = goodput.best_interval_s(20, mtbf)
    runs = [goodput.simulate(seed, 54 * 86400, interval, 20, 300, mtbf) for seed in range(100)]
    failures = [count for count, _ in runs]
    assert sum(failures) / 100 == pytest.approx(419, abs=4 * math.sqrt(419 / 100))  # Poisson: four standard errors
    mean = sum(part for _, part in runs) / 100
    assert mean == pytest.approx(goodput.goodput(interval, 20, 300, mtbf), abs=0.003)
    assert mean > 0.9  # what was published of its effective training time


def test_the_best_interval_is_the_best():
    mtbf = goodput.mtbf_s(16_384)
    best = max(range(60, 7200, 10), key=lambda s: goodput.goodput(s, 60, 600, mtbf))
    assert goodput.daly_interval_s(60, mtbf) == pytest.approx(best, rel=0.02)  # Young's first order is 3 % above it
    assert goodput.best_interval_s(60, mtbf) == pytest.approx(best, rel=0.05)
    assert goodput.daly_interval_s(100, 40) == 40  # a save that takes longer than the job lives


# --- the exercise ---

WRONG = {  # what stands in the answer, what stands there instead -> what the exercise says of it
    "colon": ("host-a slots=1", "host-a:1", "TODO 1: Hostfile contains a bad entry: host-a:1"),
    "third": ("host-b slots=1\\n", "host-b slots=1\\nhost-c slots=1\\n", "TODO 1: ranks on"),
    "twice": ("host-a slots=1", "host-b slots=1", "multiple entries for host-b"),
    "blank": ("eth0\\n", "eth0\\n\\n", "TODO 2: the launcher dies of line 2, ''"),
    "export": ("GLOO_SOCKET", "export GLOO_SOCKET", "sets a variable called 'export GLOO_SOCKET_IFNAME'"),
    "docker": ("eth0", "docker0", "TODO 2: gloo would use docker0"),
    "loopback": ("10.77.0.1", "127.0.0.1", "TODO 3: at 127.0.0.1 host-b finds itself"),
    "no hostfile": ('"--hostfile", hostfile, ', "", "TODO 3: "),
}


@pytest.mark.parametrize("answer", WRONG)
def test_exercise_says_what_is_wrong_with_an_answer(answer, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["exercise.py"])
    right, instead, says = WRONG[answer]
    names = altered_solution("day24", right, instead)
    with pytest.raises(UserError, match="^not yet: ") as caught:
        names["check"](names["hostfile"], names["environment"], names["options"])
    assert says in str(caught.value)


# --- the long tests: make test-long ---


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """{fault: what the supervisor said of it, when, and how the run went on} of one run that went through all."""
    run_dir = tmp_path_factory.mktemp("faults")
    run_plain("day24/labs/faults.py", "--run_dir", run_dir, timeout=400)
    result = json.loads((run_dir / "faults.json").read_text())
    return {row["case"]: row for row in result["table"]}, (run_dir / "output.txt").read_text()


SAID = {
    "link cut": r"host-b \(rank 1\) does not answer: .*timed out.* host-a \(rank 0, step \d+, \w+\): RuntimeError",
    "disk full": r"host-b \(rank 1, step \d+, \w+\): OSError: \[Errno 28\] No space left on device",
    "host killed": r"host-b \(rank 1\) does not answer: .*timed out",
    "other config": r"host-b \(rank 1\) has day24/ds_config.json \w+, host-a \(rank 0\) has \w+",
    "wrong clock": r"host-b \(rank 1\): its clock is 3[56]\d\d s ahead",
    "link slow": r"slow: host-b \(rank 1\) \(Mbit/s",
    "sshd gone": r"host-b(?: \(rank 1\))? does not answer: .*refused",
    "one host fewer": r"has 2 ranks, now 1: universal_step\d+",
    "host back": r"host-b is back",
}


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.serial
@needs_lab
@pytest.mark.parametrize("fault", SAID)
def test_a_fault_is_named_in_time_and_the_run_goes_on_with_the_same_weights(faults, fault):
    rows, output = faults
    row = rows[fault]
    assert re.search(SAID[fault], row["said"]), row["said"]
    assert row["noticed_s"] <= row["within_s"], row
    assert row["bitwise"] == "yes", row  # on one rank too: of two gradients the sum is the same in either order
    reached = max(map(int, re.findall(r"step(?: |0{2,4})(\d+)", row["said"])), default=0)
    assert int(row["compared"][4:]) > max(row["step"], reached), row  # saved after the fault, not before it
    assert "supervise: finished after" in output


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.serial
@needs_lab
def test_a_step_over_a_link_takes_as_long_as_its_bytes_say(tmp_path):
    run_plain("day24/labs/wire.py", "--turns", 2, "--run_dir", tmp_path)
    rows = json.loads((tmp_path / "wire.json").read_text())["table"]
    assert len(rows) == 10
    for row in rows:
        assert row["sent"] == pytest.approx(row["formula"], rel=0.02), row
    ratios = sorted(row["measured_ms"] / row["predicted_ms"] for row in rows)
    # All ten in the record; of two turns a busy machine spoils one or two.
    assert sum(0.8 < ratio < 1.2 for ratio in ratios) >= 8, ratios
    assert ratios[0] > 0.65 and ratios[-1] < 1.5, ratios
