"""Day 17: a checkpoint is whole or not there; what is damaged is not trusted; signals, disks and prunes leave it so."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from day17 import checkpoints as ckpt
from tests.launch import ROOT, _rank, error_line, free_port, run_day, run_ranks

FLAGS = ["--corpus", "moby_dick", "--log_every", 2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 8 steps that saved every 2: (what it printed, its folder of checkpoints)."""
    run_dir = tmp_path_factory.mktemp("day17")
    run = run_day("day17/train.py", "--steps", 8, "--save_every", 2, *FLAGS, "--run_dir", run_dir)
    return run, run_dir / "checkpoints"


@pytest.mark.launch
def test_saves_every_n_steps_and_keeps_the_last_and_the_best(saved):
    run, root = saved
    assert "zero stage 2 | saves every 2 steps" in run.stdout
    assert re.findall(r"^saved (step\d+): [\d,]+ bytes, stood [\d.]+ s", run.stdout, re.M) == [
        f"step{step:06d}" for step in (2, 4, 6, 8)
    ]
    assert [folder.name for folder in ckpt.checkpoints(root)] == ["step000008", "step000006"]  # the last is the best
    assert (root / "latest").read_text() == "step000008" and not list(root.glob("partial_*"))
    listing = subprocess.run([sys.executable, "day17/checkpoints.py", root], cwd=ROOT, capture_output=True, text=True)
    assert listing.stdout.count("good: 5 files") == 2 and "2 ranks, stage 2" in listing.stdout


@pytest.mark.launch
def test_bytes_are_those_of_the_arithmetic(saved):
    files = ckpt.read_manifest(saved[1] / "step000008")["files"]
    assert set(files) == {
        "mp_rank_00_model_states.pt",
        *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)),
        *(f"random_rank_{rank}.pt" for rank in (0, 1)),
    }
    total = sum(entry["bytes"] for entry in files.values())  # fp32: weights 4; weights of the optimizer 4, moments 8
    assert total == pytest.approx(16 * 937_472, rel=0.01)


def broken(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-1])
    else:  # one bit
        path.write_bytes(content[:-7] + bytes([content[-7] ^ 4]) + content[-6:])


@pytest.mark.launch
@pytest.mark.parametrize("how", ["deleted", "truncated", "bit-flipped"])
def test_damage_to_any_file_is_found(saved, how, tmp_path):
    good = saved[1] / "step000008"
    assert ckpt.problem_with(good) is None
    names = [path.name for path in good.iterdir()]
    assert len(names) == 6
    for name in names:
        root = tmp_path / name
        for step in ("step000006", "step000008"):
            shutil.copytree(saved[1] / step, root / step)
        broken(root / "step000008" / name, how)
        found, rejected = ckpt.newest_good(root)
        assert found.name == "step000006" and rejected[0].startswith(f"step000008 ({name if how != 'deleted' else ''}")
        assert name in rejected[0]


@pytest.mark.launch
def test_a_file_that_nobody_published_is_not_loaded(saved, tmp_path):
    shutil.copytree(saved[1] / "step000008", tmp_path / "step000008")
    (tmp_path / "step000008/zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(b"")
    assert "is not in the manifest" in ckpt.problem_with(tmp_path / "step000008")


@pytest.mark.launch
def test_a_used_folder_gets_one_sentence(saved):
    run = run_ranks("day17/train.py", "--run_dir", saved[1].parent, *FLAGS, ranks=1, check=False)
    assert "has checkpoints: take another --run_dir" in error_line(run)


@pytest.mark.launch
def test_numbers_out_of_range_get_one_sentence(tmp_path):
    for script in ("day17/train.py", "day18/train.py"):  # --keep_last 0 would remove the checkpoint just saved
        assert error_line(run_ranks(script, "--dropout", 1, check=False)).startswith("--dropout 1.0: the part of the")
        for flag, value in (("--save_every", 0), ("--keep_last", -1)):
            run = run_ranks(script, flag, value, "--run_dir", tmp_path, check=False)
            assert f"{flag} {value}" in error_line(run) and "both must be at least 1" in error_line(run)


@pytest.mark.launch
def test_what_an_earlier_kill_left_does_not_get_into_a_checkpoint(tmp_path):
    # of a run on four ranks
    left = tmp_path / "checkpoints/partial_step000002/zero_pp_rank_3_mp_rank_00_optim_states.pt"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    run_ranks("day17/train.py", "--steps", 2, *FLAGS, "--run_dir", tmp_path)
    assert left.name not in ckpt.read_manifest(tmp_path / "checkpoints/step000002")["files"]


def publish_one(root: Path, step: int, held_out_loss: float | None, content: bytes = b"weights") -> None:
    partial = root / f"partial_step{step:06d}"
    partial.mkdir(parents=True)
    (partial / "file").write_bytes(content)
    ckpt.publish(partial, f"step{step:06d}", step=step, held_out_loss=held_out_loss)


def test_keep_last_and_best(tmp_path):
    for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0), (4, None), (5, 4.5)):
        publish_one(tmp_path, step, loss)
        kept = ckpt.prune(tmp_path, keep_last=2)
    assert kept == ["step000005", "step000004", "step000002"]  # step 2 is the best
    assert (tmp_path / "latest").read_text() == "step000005"


def test_a_kill_between_any_two_operations_leaves_a_whole_newest(tmp_path, monkeypatch):
    """Every os-level step of publish and prune in turn is the last one."""

    class Killed(BaseException):
        pass

    calls = [(Path, "rename"), (Path, "replace"), (os, "fsync"), (Path, "write_text"), (shutil, "rmtree")]
    real, cuts = {owner_name: getattr(*owner_name) for owner_name in calls}, 0
    while True:
        root, done, left = tmp_path / str(cuts), False, [cuts]
        for step in (1, 2):
            publish_one(root, step, None, bytes([step]))

        def counting(owner_name, left=left):
            def call(*args, **kwargs):
                if left[0] == 0:
                    if owner_name[1] == "rmtree":  # it deletes one file after the other
                        next(Path(args[0]).rglob("file"), Path("/nonexistent")).unlink(missing_ok=True)
                    raise Killed
                left[0] -= 1
                return real[owner_name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner_name in calls:
                patch.setattr(*owner_name, counting(owner_name))
            try:
                publish_one(root, 3, None, bytes([3]))
                ckpt.prune(root, keep_last=1)
                done = True
            except Killed:
                pass
        found, rejected = ckpt.newest_good(root)
        assert not rejected and found.name in (("step000003",) if done else ("step000002", "step000003"))
        assert all(ckpt.problem_with(folder) is None for folder in ckpt.checkpoints(root))  # old ones are whole or gone
        assert (found / "file").read_bytes() == bytes([int(found.name[-1])])
        assert (root / (root / "latest").read_text() / "file").exists()
        ckpt.clear_up(root, found)
        assert not list(root.glob("partial_*")) + list(root.glob("removed_*"))
        if done:
            break
        cuts += 1
    assert cuts > 10


def test_newer_damaged_checkpoints_are_set_aside_and_do_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        publish_one(tmp_path, step, None)
    for step in (2, 3):
        (tmp_path / f"step00000{step}/file").write_bytes(b"damaged")
    found, rejected = ckpt.newest_good(tmp_path)
    assert found.name == "step000001" and len(rejected) == 2
    ckpt.clear_up(tmp_path, found)
    publish_one(tmp_path, 2, None)
    assert ckpt.prune(tmp_path, keep_last=2) == ["step000002", "step000001"]
    assert {path.name for path in tmp_path.glob("damaged_*")} == {"damaged_step000002", "damaged_step000003"}


def test_data_order_is_the_same_on_any_ranks_and_from_any_start(monkeypatch):
    def dealt(world: int, start: int, steps: int) -> list[set]:
        ranks = []
        for rank in range(world):
            monkeypatch.setattr(ckpt, "rank_and_world", lambda rank=rank: (rank, world))
            order = iter(ckpt.GlobalOrder(10, 12 // world, seed=0, start=start))
            ranks.append([[next(order) for _ in range(12 // world)] for _ in range(steps)])
        return [sorted(number for rank in ranks for number in rank[step]) for step in range(steps)]

    assert dealt(1, 0, 5) == dealt(2, 0, 5) == dealt(4, 0, 5)
    assert dealt(2, 24, 3) == dealt(1, 0, 5)[2:]
    epoch = iter(ckpt.GlobalOrder(10, 1, seed=0))
    monkeypatch.setattr(ckpt, "rank_and_world", lambda: (0, 1))
    numbers = [next(epoch) for _ in range(20)]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10)) and numbers[:10] != numbers[10:]


def test_random_state_comes_back_and_is_safe_to_load(tmp_path):
    import random

    import numpy as np

    device = torch.device("cpu")
    torch.save(ckpt.random_state(device), tmp_path / "state.pt")
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    ckpt.set_random_state(torch.load(tmp_path / "state.pt", weights_only=True), device)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


def start_ranks(script: str, *flags: object, ranks: int = 2, folder: Path) -> list:
    """Processes of a run that goes on: `run_ranks` waits, these can be killed."""
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(["deepspeed", "transformers", "datasets", "matplotlib.pyplot"])
    env = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments, out = [str(script), *map(str, flags)], (folder / "stdout", folder / "stderr")
    processes = [
        warm.Process(target=_rank, args=(arguments, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, *out))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_a_signal_to_one_rank_saves_on_all_and_ends(number, tmp_path):
    flags = ["--steps", 5000, "--save_every", 5000, "--run_dir", tmp_path, *FLAGS]
    processes = start_ranks("day17/train.py", *flags, folder=tmp_path)
    ends = time.monotonic() + 120
    while "step    4" not in ((tmp_path / "stdout").read_text() if (tmp_path / "stdout").exists() else ""):
        assert time.monotonic() < ends and all(process.is_alive() for process in processes)
        time.sleep(0.05)
    os.kill(processes[1].pid, number)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found, _ = ckpt.newest_good(tmp_path / "checkpoints")
    step = int(found.name[4:])
    assert f"stopped by {number.name} after step {step}, which is saved" in (tmp_path / "stdout").read_text()


def test_ranks_on_gpus_agree_through_gloo_where_no_host_waits_for_a_gpu(monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl" if group is None else "gloo")
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)
        stop = ckpt.StopSignals()
        assert stop.agreed() is None and stop.group is not dist.group.WORLD
        stop.seen, group = signal.SIGUSR1.value, stop.group
        assert stop.agreed() == "SIGUSR1" and stop.group is group
    finally:
        dist.destroy_process_group()


@pytest.mark.launch
def test_a_full_disk_ends_training_with_a_sentence_and_leaves_the_last_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]  # two checkpoints of 15 MB fit, no third
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = run_ranks(
            "day17/train.py", "--steps", 9, "--save_every", 2, *FLAGS, "--run_dir", disk, ranks=2, check=False
        )
        assert run.code == 1
        sentence = error_line(run)
        assert sentence.startswith("saving step000006 failed on rank") and "bytes free in" in sentence
        assert "the checkpoints before it are untouched" in sentence
        found, rejected = ckpt.newest_good(disk / "checkpoints")
        assert found.name == "step000004" and not rejected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.launch
def test_compare_measures_what_works_and_says_what_does_not(tmp_path):
    cases = ["zero2", "background", "zero3", "frozen_left_out", "writer_no_parallel", "datastates"]
    run_ranks("day17/labs/compare.py", "--model", "tiny", "--cases", *cases, "--run_dir", tmp_path, ranks=2)
    rows = {row["way"]: row for row in json.loads((tmp_path / "compare.json").read_text())["table"]}
    num_params = 937_472
    assert rows["zero2"]["bytes"] == pytest.approx(16 * num_params, rel=0.01)  # weights twice, two moments
    assert rows["background"]["bytes"] == pytest.approx(rows["zero2"]["bytes"], rel=0.01)
    assert rows["background"]["stood_ms"] < rows["background"]["whole_ms"]
    assert rows["zero3"]["bytes"] == pytest.approx(12 * num_params, rel=0.02)  # fp32: the weights are there once
    assert rows["frozen_left_out"]["bytes"] < 0.4 * rows["zero3"]["bytes"]
    assert "has no attribute 'dp_rank'" in rows["writer_no_parallel"]["result"]
    assert rows["datastates"]["result"].startswith("RuntimeError: Please install DataStates")
