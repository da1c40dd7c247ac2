"""Day 17: a checkpoint is whole or not there; what is damaged is not trusted; signals, disks and prunes leave it so."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from common.errors import UserError
from day17 import checkpoints as ckpt
from day17.saving import refuse_what_is_not_finite
from tests.house import altered_solution
from tests.launch import ROOT, SMALL_CORPUS, error_line, run_day, run_ranks, run_warm, start_ranks

FLAGS = ["--corpus", SMALL_CORPUS, "--log_every", 2]
LEFT = "zero_pp_rank_3_mp_rank_00_optim_states.pt"  # what a run on four ranks wrote before it was killed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 8 steps that saved every 2, where another had been killed: (what it printed, its checkpoints)."""
    run_dir = tmp_path_factory.mktemp("day17")
    root = run_dir / "checkpoints"
    (root / "partial_step000002").mkdir(parents=True)
    (root / "partial_step000002" / LEFT).write_bytes(b"half")
    run = run_day("day17/train.py", "--steps", 8, "--save_every", 2, "--keep_last", 4, *FLAGS, "--run_dir", run_dir)
    return run, root


@pytest.mark.launch
def test_saves_every_n_steps_and_keeps_the_last_and_the_best(saved):
    run, root = saved
    assert "zero stage 2 | saves every 2 steps" in run.stdout
    assert re.findall(r"^saved (step\d+): [\d,]+ bytes, stood [\d.]+ s", run.stdout, re.M) == [
        f"step{step:06d}" for step in (2, 4, 6, 8)
    ]
    kept = re.findall(r"kept (.*)$", run.stdout, re.M)[-1]
    assert kept.split() == [folder.name for folder in ckpt.checkpoints(root)] == [f"step{n:06d}" for n in (8, 6, 4, 2)]
    assert (root / "latest").read_text() == "step000008" and not list(root.glob("partial_*"))
    listing = run_warm("day17/checkpoints.py", root).stdout
    assert listing.count("good: 5 files") == 4 and "2 ranks, stage 2" in listing
    assert json.loads((root.parent / "finished.json").read_text()) == {"step": 8}


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
def test_numbers_out_of_range_get_one_sentence(tmp_path):  # --keep_last 0 would remove the checkpoint just saved
    assert error_line(run_ranks("day17/train.py", "--dropout", 1, check=False)).startswith("--dropout 1.0: the part")
    for flag, value in (("--save_every", 0), ("--keep_last", -1)):
        run = run_ranks("day17/train.py", flag, value, "--run_dir", tmp_path, check=False)
        assert f"{flag} {value}" in error_line(run) and "both must be at least 1" in error_line(run)


@pytest.mark.launch
def test_what_an_earlier_kill_left_does_not_get_into_a_checkpoint(saved):
    assert LEFT not in ckpt.read_manifest(saved[1] / "step000002")["files"]


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


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path):
    for step, loss in ((1, 6.12), (2, 5.70), (3, math.nan), (4, -math.inf)):
        publish_one(tmp_path, step, loss)
        kept = ckpt.prune(tmp_path, keep_last=1)
    assert kept == ["step000004", "step000002"]
    assert ckpt.problem_with(tmp_path / "step000004") == "its held-out loss is -inf"
    found, rejected = ckpt.newest_good(tmp_path)
    assert found.name == "step000002" and rejected == ["step000004 (its held-out loss is -inf)"]


@pytest.mark.launch
def test_a_run_whose_loss_is_nan_ends_with_a_sentence_and_saves_nothing_of_it(tmp_path):
    config = json.loads((ROOT / "day17/ds_config.json").read_text())
    config["optimizer"]["params"]["lr"] = 1e30  # the schedule's first step is one of 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--steps", 9, "--save_every", 1, "--keep_last", 1, "--corpus", SMALL_CORPUS, "--log_every", 99]
    flags += ["--deepspeed_config", tmp_path / "config.json"]
    run = run_ranks("day17/train.py", *flags, "--run_dir", tmp_path, ranks=2, check=False)
    found = re.match(r"the held-out loss is nan at step (\d+): not saved, ", error_line(run))
    good = int(found[1]) - 1
    assert good and [folder.name for folder in ckpt.checkpoints(tmp_path / "checkpoints")] == [f"step{good:06d}"]
    assert ckpt.problem_with(tmp_path / f"checkpoints/step{good:06d}") is None
    assert not (tmp_path / "finished.json").exists()


def test_weights_are_looked_at_where_no_loss_was_measured():
    engine = SimpleNamespace(module=torch.nn.Linear(2, 2))
    refuse_what_is_not_finite(engine, 7, None)
    engine.module.weight.data[1, 1] = math.inf
    with pytest.raises(UserError, match="weights that are NaN or infinite at step 7: not saved"):
        refuse_what_is_not_finite(engine, 7, None)
    engine.module.weight.ds_tensor = torch.zeros(2)  # under ZeRO-3: this rank's part
    refuse_what_is_not_finite(engine, 7, None)


# On two ranks, whatever fails on one of them: each rank writes what it was told, or "nothing".
FAILURES = """
import pickle, sys, os
from pathlib import Path
sys.path.insert(0, ROOT)
import deepspeed, torch
from bench.world import join_world
from common.errors import UserError
from day17 import checkpoints as ckpt
from day17.saving import BackgroundWriter, save

join_world()
root, rank, write = Path(sys.argv[1]), ckpt.rank_and_world()[0], torch.save
optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer, "zero_optimization": {"stage": 2}}
model = torch.nn.Linear(4, 4)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

def told(name, action):
    said = "nothing"
    try:
        action()
    except UserError as error:
        said = str(error)
    (root / f"{name}_{rank}").write_text(said)

def fail(error, mine):
    if mine:
        raise error

def block(error, folder):
    with ckpt.all_or_none("trying", folder):
        fail(error, rank == 1)

def write_only(bad_rank, bad_file, error):
    def call(state, path, *args, **kwargs):
        fail(error, rank == bad_rank and bad_file in str(path))
        return write(state, path, *args, **kwargs)
    torch.save = call

for error in (pickle.PicklingError("lambda"), ValueError("bad"), MemoryError(), KeyError("x"), OSError(28, "full")):
    told(type(error).__name__, lambda: block(error, root))
told("folder", lambda: block(OSError(28, "full"), root / "not/there"))
step = 0
for bad_rank, bad_file in ((0, "model_states"), (0, "optim_states"), (1, "optim_states"), (1, "random_rank")):
    write_only(bad_rank, bad_file, pickle.PicklingError("lambda"))
    told(f"{bad_file}{bad_rank}", lambda: save(engine, root, step := 1, 1, None))
engine.checkpoint_engine = BackgroundWriter(engine._config)

def in_the_background(name):
    engine.save_checkpoint(str(root), tag=f"partial_{name}", save_latest=False)
    engine.checkpoint_engine.wait(root)
    ckpt.publish(root / f"partial_{name}", name, step=2)

write_only(1, "optim_states", RuntimeError("disk"))
told("background", lambda: in_the_background("step000002"))
write_only(None, "", None)
told("healthy", lambda: in_the_background("step000003"))
"""


@pytest.mark.launch
def test_a_failure_of_any_kind_on_one_rank_is_one_sentence_on_all(tmp_path):
    (tmp_path / "failures.py").write_text(FAILURES.replace("ROOT", repr(str(ROOT))))
    run_ranks(str(tmp_path / "failures.py"), tmp_path, ranks=2)
    said = {path.name[:-2]: path.read_text() for path in tmp_path.glob("*_0")}
    assert said == {path.name[:-2]: path.read_text() for path in tmp_path.glob("*_1")}
    for name in ("PicklingError", "ValueError", "MemoryError", "KeyError", "OSError"):
        assert said[name].startswith(f"trying failed on rank 1: {name}: ") and "bytes free in" in said[name]
    assert "bytes free in" in said["folder"] and "not/there" in said["folder"]
    for name in ("model_states0", "optim_states0", "optim_states1", "random_rank1"):
        assert said[name].startswith(f"saving step000001 failed on rank {name[-1]}: PicklingError: lambda"), said[name]
    assert said["background"].startswith("writing in the background failed on rank 1: RuntimeError: disk")
    assert said["healthy"] == "nothing"
    assert [folder.name for folder in ckpt.checkpoints(tmp_path)] == ["step000003"]
    assert ckpt.problem_with(tmp_path / "step000003") is None


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


@pytest.mark.launch
def test_a_signal_to_one_rank_saves_on_all_and_ends(tmp_path):
    flags = ["--steps", 5000, "--save_every", 5000, "--run_dir", tmp_path, *FLAGS]
    processes = start_ranks("day17/train.py", *flags, folder=tmp_path)
    ends = time.monotonic() + 300
    while "step    2" not in (tmp_path / "stdout").read_text():
        assert time.monotonic() < ends and all(process.is_alive() for process in processes)
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    found, _ = ckpt.newest_good(tmp_path / "checkpoints")
    step = int(found.name[4:])
    assert f"stopped by SIGTERM after step {step}, which is saved" in (tmp_path / "stdout").read_text()
    assert not (tmp_path / "finished.json").exists()


def test_ranks_on_gpus_talk_through_gloo_where_no_host_waits_for_a_gpu_or_needs_one(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    gather, through = dist.all_gather_object, []

    def noting(values, value, group=None):
        through.append(group)
        gather(values, value, group)

    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl" if group is None else "gloo")
    monkeypatch.setattr(dist, "all_gather_object", noting)
    try:
        for _ in range(2):  # a second world has a group of its own
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            stop, group = ckpt.StopSignals(), ckpt.host_group()
            assert stop.agreed() is None and group is not dist.group.WORLD and group is ckpt.host_group()
            assert ckpt.from_all_ranks("me") == ["me"] and through[-1] is group
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.agreed() == "SIGUSR1"
            dist.destroy_process_group()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if dist.is_initialized():
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
            "day17/train.py", "--steps", 9, "--save_every", 1, *FLAGS, "--run_dir", disk, ranks=2, check=False
        )
        assert run.code == 1
        sentence = error_line(run)
        assert sentence.startswith("saving step000003 failed on rank") and "bytes free in" in sentence
        assert "the checkpoints before it are untouched" in sentence
        found, rejected = ckpt.newest_good(disk / "checkpoints")
        assert found.name == "step000002" and not rejected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.launch
def test_compare_measures_what_works_and_says_what_does_not(tmp_path):
    cases = ["zero2", "background", "zero3", "frozen_left_out", "writer_no_parallel", "datastates"]
    run_ranks("day17/labs/compare.py", "--model", "tiny", "--cases", *cases, "--run_dir", tmp_path, ranks=2)
    rows = {row["case"]: row for row in json.loads((tmp_path / "compare.json").read_text())["table"]}
    num_params = 937_472
    assert rows["zero2"]["bytes"] == pytest.approx(16 * num_params, rel=0.01)  # weights twice, two moments
    assert rows["background"]["bytes"] == pytest.approx(rows["zero2"]["bytes"], rel=0.01)
    assert rows["background"]["stood_ms"] < rows["background"]["whole_ms"]
    assert rows["zero3"]["bytes"] == pytest.approx(12 * num_params, rel=0.02)  # fp32: the weights are there once
    assert rows["frozen_left_out"]["bytes"] < 0.4 * rows["zero3"]["bytes"]
    assert "has no attribute 'dp_rank'" in rows["writer_no_parallel"]["result"]
    assert rows["datastates"]["result"].startswith("RuntimeError: Please install DataStates")


TRUSTED = 'found.pop("sums", None) == sums(found)'
WRONG = {  # what stands in the answer, what stands there instead -> what the exercise says of it
    "without flush": ('        disk.flush(f"{partial}/{name}")\n', "", "after one save and a power cut"),
    "final name": ('f"partial_step{step:06d}"', 'f"step{step:06d}"', "already under the final name"),
    "raises": (TRUSTED, 'json.loads(found.pop("sums")) == json.loads(sums(found))', "Pass over what it cannot read"),
    "trusts": (TRUSTED, 'found.pop("sums", None)', "with step000010/weights truncated"),
}


@pytest.mark.parametrize("answer", WRONG)
def test_exercise_says_what_is_wrong_with_an_answer(answer, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["exercise.py"])
    monkeypatch.setenv("RANK", "0")
    right, instead, says = WRONG[answer]
    names = altered_solution("day17", right, instead)
    with pytest.raises(UserError, match="^not yet: ") as caught:
        names["check"](names["save"], names["load_newest"])
    assert says in str(caught.value)
