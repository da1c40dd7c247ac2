"""bench/: each instrument against a figure that a hand computes."""

import ctypes
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import link, world
from bench.held import bytes_by_kind
from bench.memory import is_out_of_memory, limit_memory, peak_bytes, saved_for_backward
from bench.table import Table, cell
from bench.timing import ratio, slowest_median, take_turns
from bench.trace import longest_ms, ms_by_kind, union_ms
from bench.traffic import ring_share
from bench.world import default_ranks, free_port, launch_command
from common.errors import UserError
from tests.launch import run_ranks
from tests.render import ROOT

CPU = torch.device("cpu")
MIB = 2**20


def event(name, start_ms, ms):
    return {"name": name, "ts": 1e3 * start_ms, "dur": 1e3 * ms}


# ---- traces ---------------------------------------------------------------------------------------------------------

EVENTS = [event("gemm", 0, 4), event("AllReduce", 2, 4), event("gemm", 3, 1), event("copy", 10, 2)]


def test_union_ms_counts_what_overlaps_once():
    assert union_ms(EVENTS) == union_ms(reversed(EVENTS)) == 6 + 2
    assert union_ms([]) == 0


def test_ms_by_kind_takes_the_first_kind_whose_word_is_in_the_name():
    assert ms_by_kind(EVENTS, {"matrix": ("gemm", "reduce"), "messages": ("reduce",)}) == {
        "matrix": 4 + 4 + 1, "messages": 0, "other": 2,
    }  # fmt: skip
    assert list(longest_ms(EVENTS, 2).items()) == [("gemm", 5), ("AllReduce", 4)]


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ring_shares_add_up(ranks):
    """An all-reduce is a reduce-scatter of the whole and an all-gather of the parts: 2 (N-1)/N of the tensor."""
    assert ring_share("all_reduce", ranks) == 2 * (ranks - 1) / ranks
    apart = ring_share("reduce_scatter_tensor", ranks) + ring_share("all_gather_into_tensor", ranks) / ranks
    assert apart == pytest.approx(ring_share("all_reduce", ranks))
    with pytest.raises(ValueError, match="no formula for the bytes of all_to_all"):
        ring_share("all_to_all", ranks)


def test_saved_for_backward_is_what_autograd_needs():
    """A Linear keeps its input, a ReLU its result; weights are no activations, and a storage counts once."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU())
    with saved_for_backward(model.parameters()) as saved:
        model(torch.randn(4, 8)).sum()
    assert saved == {torch.float32: 4 * 4 * 8 + 4 * 4 * 16}
    model.append(torch.nn.Linear(16, 2).bfloat16())
    with saved_for_backward(model.parameters()) as saved:
        model[2](model[:2](torch.randn(4, 8)).bfloat16()).sum()
    assert saved == {torch.float32: 4 * 4 * 8 + 4 * 4 * 16, torch.bfloat16: 2 * 4 * 16}


def test_bytes_by_kind_counts_a_storage_for_the_first_kind():
    weight, other = torch.zeros(100), torch.zeros(10)
    found = bytes_by_kind([weight[:50].data, other], parameters=[weight], views=[weight.view(10, 10)])
    assert found == {"parameters": 400, "views": 0, "other": 40}


def _allocate_under_a_limit(said):
    ctypes.CDLL(None).mallopt(-3, 2**25)  # as in a process that has freed large blocks: 9 MiB come from the heap,
    blocks = [torch.ones(9 * MIB // 4) for _ in range(2)]
    del blocks[0]  # and leave a hole, which the next 8 MiB would fill without a new page
    held = limit_memory(64 * MIB, CPU)
    kept = torch.ones(8 * MIB // 4)
    said.put(peak_bytes(CPU, held))
    try:
        torch.ones(128 * MIB // 4)
    except RuntimeError as error:
        said.put(is_out_of_memory(error))
    said.put(len(kept))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process with CUDA does not fork")
def test_limit_memory_lets_no_more_through():
    """64 MiB: an allocation of 8 MiB works and is the peak, one of 128 MiB fails, and the process goes on."""
    fork = multiprocessing.get_context("fork")
    said = fork.SimpleQueue()
    process = fork.Process(target=_allocate_under_a_limit, args=(said,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    peak, out_of_memory, kept = said.get(), said.get(), said.get()
    assert 7 * MIB <= peak < 32 * MIB  # the kernel adds pages up in batches per thread: a few may be missing
    assert out_of_memory is True and kept == 8 * MIB // 4


def test_run_ranks_keeps_any_amount_of_output_and_ends_those_who_wait(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "print('x' * 200_000)\n"  # more than a pipe holds
        "sys.exit('rank 1 is lost') if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    first, second = world.run_ranks(2, script)
    assert second.returncode == 1 and second.stderr.strip() == "rank 1 is lost" and len(second.stdout) > 200_000
    assert first.returncode == -9


# ---- time -----------------------------------------------------------------------------------------------------------


def test_turns_are_fair_and_the_ratio_is_of_each_turn():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    runs = take_turns(steps, 3)
    assert "".join(order) == "abccbaabc"
    assert {name: len(done) for name, done in runs.items()} == {"a": 3, "b": 3, "c": 3}
    slow_start = [(100.0, None), (2.0, None), (4.0, None), (60.0, None)]  # the machine slowed down for both in the end
    twice_as_fast = [(1.0, None), (1.0, None), (2.0, None), (30.0, None)]
    assert ratio(slow_start, twice_as_fast) == 2.0
    assert ratio(slow_start, twice_as_fast, warm_up=0) == 2.0
    with pytest.raises(ValueError):
        ratio(slow_start, twice_as_fast[1:])


def test_slowest_median_leaves_the_first_steps_out():
    assert slowest_median([9.0, 1.0, 3.0, 2.0], CPU, warm_up=1) == 2.0
    assert slowest_median([9.0], CPU, warm_up=1) == 9.0


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_cell():
    row = {"ms": 1234.5, "held_bytes": {"weights": 2_500_000}, "gap": None, "gib": 3 * 2**30}
    assert cell(row, "ms:,.1f") == "1,234.5"
    assert cell(row, "held_bytes.weights:MB") == "2.50"
    assert cell(row, "gib:GiB") == "3.00"
    assert [cell(row, column) for column in ("gap:.2f", "no", "held_bytes.no:MB", "no.no")] == ["-"] * 4


def test_a_table_is_saved_row_by_row(tmp_path, capsys):
    """An interrupted run keeps its rows; out of memory is a row; another error is none."""
    path = tmp_path / "new/compare.json"
    table = Table(path, {"tok/s": "speed:,.0f"}, model="tiny")
    saved = lambda: json.loads(path.read_text())["table"]  # noqa: E731
    with table.row("first", ranks=2) as row:
        row["speed"] = 12345.6
    assert saved() == [{"case": "first", "ranks": 2, "speed": 12345.6}]
    with table.row("large"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    with table.row("larger"):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    with pytest.raises(RuntimeError, match="shapes"), table.row("wrong"):
        raise RuntimeError("shapes cannot be multiplied")
    assert [row.get("error") for row in saved()] == [None, "out of memory", "out of memory"]
    table.save(verdict="first")
    table.bars("speed", "tokens/s", "on one rank")
    table.close()
    written = json.loads(path.read_text())
    assert (written["model"], written["verdict"]) == ("tiny", "first") and written["versions"] and written["command"]
    assert path.with_name("speed.png").stat().st_size > 1000
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["case", "tok/s"] and lines[1].split() == ["first", "12,346"]
    assert lines[2].split() == ["large", "out", "of", "memory"]


# ---- worlds ---------------------------------------------------------------------------------------------------------


def test_ports_are_free():
    port = free_port()
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", port))
        assert free_port() != port


def test_launch_command():
    words = launch_command(2, "day03/train.py", "--steps", 20, port=29501)
    assert words[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert words[3:] == ["--num_accelerators", "2", "--master_port", "29501", "day03/train.py", "--steps", "20"]
    assert default_ranks() == (torch.cuda.device_count() or 2)


@pytest.mark.parametrize(("name", "devices", "ranks"), [("npu", 6, 6), ("cuda", 1, 1), ("cpu", 1, 2)])
def test_ranks_are_the_accelerators_that_deepspeed_counts_of_whatever_make(name, devices, ranks, monkeypatch):
    fake = SimpleNamespace(device_name=lambda: name, device_count=lambda: devices)
    monkeypatch.setattr(world, "get_accelerator", lambda: fake)
    assert default_ranks() == ranks


@pytest.mark.launch
def test_measure_your_own_step(tmp_path):
    """The script in bench/README.md, run as it stands; its bytes are those of the formulas, as are an all-reduce's."""
    script = re.search(r"^```python\n(.*?)^```$", (ROOT / "bench/README.md").read_text(), re.M | re.S)[1]
    path = tmp_path / "my_step.py"
    result = tmp_path / "step.json"
    path.write_text(
        script.replace("runs/mine/step.json", str(result))
        + """
import deepspeed.comm as dist

with count_traffic() as traffic:
    for _ in range(3):
        dist.all_reduce(torch.ones(1000, device=device))
if dist.get_rank() == 0:
    print("three all-reduces:", traffic.sent_bytes())
"""
    )
    run = run_ranks(str(path), ranks=2)
    (row,) = json.loads(result.read_text())["table"]
    parameters = 4 * (512 * 512 + 512)
    assert row["sent_bytes"] == 2 * (2 - 1) / 2 * (4 * parameters + 4)  # gradients, and a number for their norm
    assert row["saved_bytes"] == 5 * 4 * 32 * 512  # the four inputs, and the last ReLU's result
    assert row["ms"] > 0 and row["peak_bytes"] > 0
    assert "ZeRO-0" in run.stdout and f"three all-reduces: {3 * 2 * (2 - 1) / 2 * 4000}" in run.stdout


ROWS = """
import datetime, json, sys
import torch
import bench.table
from bench.world import join_world

device = join_world()
rank, path, stuck = torch.distributed.get_rank(), sys.argv[-2], sys.argv[-1] == "stuck"
bench.table.PATIENCE = datetime.timedelta(seconds=3)
table = bench.table.Table(path, {"tok/s": "speed:.0f"})
with table.row("fits") as row:
    row["speed"] = 1.0
with table.row("does not fit on rank 1") as row:
    if rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    if stuck:
        torch.distributed.all_reduce(torch.ones(1))
    row["speed"] = 2.0
with table.row("fits again") as row:
    row["speed"] = 3.0
print(f"rank {rank}: {[row.get('error') for row in table.rows]}")
"""


@pytest.mark.launch
def test_out_of_memory_on_one_rank_is_everybodys_row(tmp_path):
    (tmp_path / "rows.py").write_text(ROWS)
    run = run_ranks(tmp_path / "rows.py", tmp_path / "table.json", "free", ranks=2)
    for rank in range(2):
        assert f"rank {rank}: [None, 'out of memory', None]" in run.stdout
    assert [row.get("speed") for row in json.loads((tmp_path / "table.json").read_text())["table"]] == [1.0, 2.0, 3.0]


@pytest.mark.launch
def test_a_rank_without_memory_does_not_leave_the_others_waiting(tmp_path):
    (tmp_path / "rows.py").write_text(ROWS)
    run = run_ranks(tmp_path / "rows.py", tmp_path / "table.json", "stuck", ranks=2, check=False, timeout=60)
    assert run.code != 0 and "no memory: rank 1: MemoryError: out of memory on this rank" in run.stdout
    assert [row["case"] for row in json.loads((tmp_path / "table.json").read_text())["table"]] == ["fits"]


# ---- a link of known speed -------------------------------------------------------------------------------------------

SEND = """
import os, time, torch, torch.distributed as dist
from bench.link import sent_over_link
dist.init_process_group("gloo")
tensor = torch.ones(2**18)
for _ in range(2):
    dist.barrier()
    before, start = sent_over_link(), time.perf_counter()
    dist.all_reduce(tensor)
    took = time.perf_counter() - start
    time.sleep(0.2)
print(sent_over_link() - before, took, os.environ["LOCAL_RANK"])
"""
NO_LINK = link.why_no_link()


def last_line(ended):
    """The words of what the script printed; before it DeepSpeed may say which accelerator it takes."""
    return ended.stdout.splitlines()[-1].split()


@pytest.mark.launch
@pytest.mark.serial
@pytest.mark.skipif(NO_LINK is not None, reason=str(NO_LINK))
def test_a_link_has_its_rate_meters_what_a_host_sends_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "send.py"
    script.write_text(SEND)
    killed = "import os; from bench.link import open_link\nwith open_link(None): os.kill(os.getpid(), 9)"
    process = subprocess.Popen([sys.executable, "-c", killed])
    process.wait()
    left = f"ds28-{process.pid}-"
    assert left in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    with link.open_link("50mbit") as hosts:
        shaped = [last_line(ended) for ended in hosts.run_ranks("AB", script)]
        hosts.set_rate(None)
        ended = [last_line(ended) for ended in hosts.run_ranks("AABB", script)]
        assert [local_rank for _, _, local_rank in ended] == ["0", "1", "0", "1"]
        with pytest.raises(ValueError, match="'ABC': no host 'C' on this link, which has AB"):
            hosts.run_ranks("ABC", script)
    for sent, took, _ in shaped:
        assert int(sent) == pytest.approx(MIB, rel=0.02)
        assert float(took) > 0.8 * MIB / (50e6 / 8)  # a rate limits from one side only
    assert int(ended[0][0]) == pytest.approx(1.5 * MIB, rel=0.02)
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert left not in names and f"ds28-{os.getpid()}-" not in names


def test_what_a_machine_lacks_for_a_link_is_one_sentence(monkeypatch):
    monkeypatch.setattr(link.os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="needs root"), link.open_link("1gbit"):
        pass
    monkeypatch.setattr(link.os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "needs the program 'ip': apt-get install iproute2" in link.why_no_link()
