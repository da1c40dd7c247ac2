"""Day 26: one command trains, resumes, says done; kills, signals and other ranks change nothing; it can be watched."""

import argparse
import inspect
import json
import math
import random
import re
import shutil
import socket
import time
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from deepspeed import DeepSpeedEngine
from filelock import FileLock
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from bench.world import free_port
from capstone import data
from capstone.config import ROOT, deepspeed_section, load_config
from capstone.evaluate import load_model
from capstone.model import as_transformers, build, parameter_groups
from capstone.monitor import COUNTERS, METRICS, Exporter
from capstone.training import Finite, changed, facts_of
from common.errors import UserError
from common.run_log import read_rows
from day17 import checkpoints as ckpt
from day26 import exercise, solution
from day26.labs import kill_test
from tests.launch import error_line, run_day, run_ranks, run_warm, start_ranks

STEPS = 12
SETTINGS = [*kill_test.SMALL, "train.eval_every=2", f"deepspeed.scheduler.params.total_num_steps={STEPS}"]


def flags(run: Path, *more: object) -> list[str]:
    return ["--steps", str(STEPS), "--run_dir", str(run), *SETTINGS, *map(str, more)]


def wait_for(what, processes, seconds: float = 120):
    ends = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < ends, "it never came"
        assert any(process.is_alive() for process in processes), "the run ended before"
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def peace(tmp_path_factory):
    """A run that nobody disturbs, with data of its own that other runs may copy."""
    folder = tmp_path_factory.mktemp("day26") / "peace"
    run = run_day("day26/train.py", *flags(folder), ranks=2)
    return folder, run


def begin(peace, folder: Path) -> Path:
    """A new run's folder that has the data already, and nothing else."""
    shutil.copytree(peace[0] / "data", folder / "data")
    return folder


# --- one command ---


@pytest.mark.launch
def test_one_command_goes_all_the_way_and_leaves_what_it_says(peace):
    folder, run = peace
    assert "resume: no checkpoint in" in run.stdout and "prepare: " in run.stdout
    assert f"zero stage 1 | batch 16 = 8 micro x 1 accumulation x 2 ranks | step 0 of {STEPS} | cpu" in run.stdout
    assert list(run.losses) == list(range(1, STEPS + 1)) and run.losses[STEPS] < run.losses[1] - 0.5
    config = load_config(folder / "config.yaml")
    assert config.train.steps == STEPS and config.run_path == folder
    facts = json.loads((folder / "model/training.json").read_text())
    assert facts["data"] and facts["deepspeed"] == config.deepspeed and facts["ranks"] == 2
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == 937_472
    assert json.loads((folder / "evaluation.json").read_text())["held_out"]["nats_per_token"] > 1
    assert len(ckpt.checkpoints(folder / "checkpoints")) == 2 and not list(folder.rglob("partial_*"))


BLIND = """# day26/train.py; to rank 1 the model and the report are not there.  "--local_rank"
import os, runpy, sys
from pathlib import Path
sys.path.insert(0, {root!r})
exists = Path.exists
hidden = ("model", "evaluation.json") if os.environ["RANK"] == "1" else ()
Path.exists = lambda path, **more: path.name not in hidden and exists(path, **more)
runpy.run_path({root!r} + "/day26/train.py", run_name="__main__")
"""


@pytest.mark.launch
def test_the_same_command_again_says_done_and_touches_nothing(peace, tmp_path):
    """Though rank 1, on a machine of its own, does not see yet what is there: rank 0's word counts."""
    folder, _ = peace
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "blind.py").write_text(BLIND.format(root=str(ROOT)))
    again = run_ranks(tmp_path / "blind.py", *flags(folder), ranks=2, timeout=60)
    for word in ("prepare: done already", "train: done already", "evaluate: done already", "done: "):
        assert word in again.stdout
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert [path.name for path in before if before[path] != after.get(path)] == ["config.yaml"]
    other = run_ranks("day26/train.py", *flags(folder, "deepspeed.optimizer.params.lr=1e-3"), ranks=2, check=False)
    assert other.code == 1 and "holds a run with other deepspeed.optimizer: name another run_dir" in error_line(other)


# --- what a run says of itself ---


def scalars(folder: Path) -> dict[str, list]:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def assert_tensorboard_has_the_log(folder: Path) -> None:
    drawn, rows = scalars(folder), read_rows(folder)
    for name in ("loss", "held_out_loss", "grad_norm"):
        want = [(row["step"] * 16, pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert drawn[f"Train/Samples/{name}"] == want and len(want) >= 6
    assert len(drawn["Train/Samples/lr"]) == STEPS  # DeepSpeed's own


@pytest.mark.launch
def test_tensorboard_has_the_loss(peace):
    assert_tensorboard_has_the_log(peace[0])


ON_ALL = {"training_memory_bytes", "training_memory_limit_bytes", "training_last_step_timestamp_seconds"}
ON_ALL |= {"training_step_seconds"}
ON_RANK_0 = {
    "training_loss", "training_held_out_loss", "training_step", "training_steps_planned", "training_tokens",
    "training_tokens_per_second", "training_grad_norm", "training_loss_scale", "training_overflow_steps",
    "training_learning_rate", "training_last_checkpoint_timestamp_seconds", "training_info", "training_starts",
}  # fmt: skip


def scrape(target: str) -> dict:
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
        return {family.name: family for family in text_string_to_metric_families(page.read().decode())}


@pytest.mark.launch
def test_endpoints_serve_every_name_and_a_signal_saves_and_the_rerun_ends_the_same(peace, tmp_path):
    run, port = begin(peace, tmp_path / "run"), free_port(2)
    targets, out = run / "prometheus_targets.json", tmp_path / "stdout"
    processes = start_ranks("day26/train.py", *flags(run, f"monitor.port={port}"), folder=tmp_path)
    (entry,) = json.loads(wait_for(lambda: targets.exists() and targets.read_text(), processes))
    assert entry["targets"] == [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
    assert entry["labels"] == {"job": "training", "run": str(run)}
    start = time.time()
    wait_for(lambda: "training_held_out_loss" in scrape(entry["targets"][0]), processes)
    first = scrape(entry["targets"][0])
    second = scrape(entry["targets"][1])
    processes[1].terminate()  # SIGTERM, to one rank alone
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    created = {"training_tokens_created", "training_overflow_steps_created"}
    assert set(first) == ON_ALL | ON_RANK_0 | created and set(second) == ON_ALL
    for rank, found in enumerate((first, second)):
        values = {name: found[name].samples[0] for name in ON_ALL}
        assert all(sample.labels == {"rank": str(rank)} for sample in values.values())
        assert 2e8 < values["training_memory_bytes"].value < values["training_memory_limit_bytes"].value
        assert abs(values["training_last_step_timestamp_seconds"].value - start) < 120
    assert {name for name in first if first[name].type == "counter"} == COUNTERS - {"training_allocator_retries"}
    value = {name: first[name].samples[0].value for name in ON_RANK_0}
    step = value["training_step"]
    assert value["training_steps_planned"] == STEPS and value["training_tokens"] == step * 16 * 128
    assert value["training_loss_scale"] == 1 and value["training_overflow_steps"] == 0
    assert first["training_tokens"].samples[0].name == "training_tokens_total"
    losses = {row["step"]: row["loss"] for row in read_rows(run) if "loss" in row}
    assert value["training_loss"] in (losses[step], losses.get(step - 1)) and value["training_grad_norm"] > 0
    assert first["training_info"].samples[0].labels == {
        "run": str(run), "model": "tiny", "zero_stage": "1", "ranks": "2",
    }  # fmt: skip

    stopped = ckpt.newest_good(run / "checkpoints")[0]
    assert f"stopped by SIGTERM after step {int(stopped.name[4:])}, which is saved" in out.read_text()
    assert json.loads(targets.read_text())[0]["labels"]["state"] == "stopped" and not (run / "model").exists()
    again = run_ranks("day26/train.py", *flags(run, f"monitor.port={port}"), ranks=2)
    assert f"resume: {stopped.name}" in again.stdout and not targets.exists()
    assert kill_test.what_came_out(run) == kill_test.what_came_out(peace[0])
    assert_tensorboard_has_the_log(run)


def losses_of(run: Path) -> list[float]:
    rows = {row["step"]: row["loss"] for row in read_rows(run) if "loss" in row}
    assert list(rows) == list(range(1, STEPS + 1))
    return list(rows.values())


def test_a_gauge_appears_with_its_first_value_and_on_its_ranks():
    names = {}
    for rank in (0, 1):
        exporter = Exporter(rank)
        exporter.set("training_loss", None)
        exporter.set("training_memory_bytes", 5)
        exporter.count("training_tokens", 3)
        exporter.set("training_loss", float("nan"))
        names[rank] = {family.name for family in exporter.registry.collect()}
    assert names == {0: {"training_memory_bytes", "training_tokens", "training_loss"}, 1: {"training_memory_bytes"}}
    assert set(METRICS) == ON_ALL | ON_RANK_0 | {"training_mfu_ratio", "training_allocator_retries"}
    notes = (ROOT / "day26/notes.md").read_text(encoding="utf-8")
    assert all(f"`{name}{'_total' if name in COUNTERS else ''}`" in notes for name in METRICS)


@pytest.mark.parametrize("page", ["notes.md", "notes.zh.md"])
def test_what_deepspeed_draws_by_itself_is_what_the_notes_say(page):
    drawn = set(re.findall(r'"Train/Samples/(\w+)"', inspect.getsource(DeepSpeedEngine)))
    assert {name for name in drawn if not name.startswith("elapsed_time")} == {"lr", "loss_scale"}
    (line,) = re.findall(r"^- \*\*TensorBoard\*\*.*", (ROOT / "day26" / page).read_text(), re.M)
    assert "fp16" in line and "loss scale" in line and "wall_clock_breakdown" in line


@pytest.mark.parametrize(
    ("number", "answer", "sentence"),
    [
        (0, (4, 2), "share_out(16, 8, 2) is (4, 2), want (8, 1)"),
        (1, None, "ended with TypeError"),
        (1, [0, 1], "step 1 on 1 ranks reads [0, 1], want 0 to 15"),
        (2, "training_step 40\ntraining_loss NaN\n", 'each line wants the label rank="1"'),
        (2, 'training_step{rank="1"} 40\ntraining_loss{rank="1"} NaN', "the last line wants a newline"),
    ],
)
def test_the_exercise_says_what_is_wrong(number, answer, sentence, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["exercise.py"])
    answers = [solution.share_out, solution.sequences, solution.exposition]
    answers[number] = lambda *arguments: answer
    with pytest.raises(UserError, match="^not yet: ") as caught:
        exercise.check(*answers)
    assert sentence in str(caught.value)


# --- the order of the data ---


def test_the_same_global_batches_on_any_ranks_and_after_any_start(monkeypatch):
    config = load_config()
    blocks = [{"input_ids": torch.tensor(number), "labels": torch.tensor(number)} for number in range(50)]

    def dealt(world: int, start: int, steps: int) -> list[list[int]]:
        section = deepspeed_section(config, world)
        micro, accumulation = section["train_micro_batch_size_per_gpu"], section["gradient_accumulation_steps"]
        assert micro <= 8 and micro * accumulation * world == 16
        ranks = []
        for rank in range(world):
            monkeypatch.setattr(ckpt, "rank_and_world", lambda rank=rank: (rank, world))
            batches = data.train_batches(blocks, micro, 0, sequences=start * 16)
            ranks.append([[next(batches)["input_ids"] for _ in range(accumulation)] for _ in range(steps)])
        return [sorted(torch.cat([torch.cat(rank[step]) for rank in ranks]).tolist()) for step in range(steps)]

    whole = dealt(2, 0, 7)  # more than two epochs
    assert dealt(1, 0, 7) == dealt(4, 0, 7) == dealt(8, 0, 7) == dealt(16, 0, 7) == whole
    assert dealt(4, 3, 4) == dealt(1, 3, 4) == whole[3:]
    assert max(Counter(number for step in whole[:3] for number in step).values()) == 1
    with pytest.raises(UserError, match="train.global_batch 16 cannot be shared out among 3 ranks"):
        deepspeed_section(config, 3)


def test_what_makes_another_run_and_what_does_not():
    def names(*overrides: str, ranks: int = 2, base: tuple = ()) -> list[str]:
        before = facts_of(load_config(overrides=list(base)), "data", 2)
        return changed(before, facts_of(load_config(overrides=[*base, *overrides]), "data", ranks))

    same = ["checkpoint.keep_last=5", "train.log_every=7", "monitor.port=9400", "deepspeed.zero_optimization.stage=3"]
    assert names(*same, "deepspeed.train_micro_batch_size_per_gpu=4", ranks=4) == []
    assert names("train.seed=1", "train.steps=700") == ["train.steps", "train.seed"]
    assert names("deepspeed.optimizer.params.lr=1", "model.code=lean") == ["model.code", "deepspeed.optimizer"]
    assert names(ranks=4, base=("train.global_batch=0",)) == ["global batch"]
    assert changed(facts_of(load_config(), "one", 2), facts_of(load_config(), "other", 2)) == ["data"]


@pytest.mark.launch
@pytest.mark.parametrize(("stage", "stops"), [(0, True), (1, True), (1, False)])
def test_a_loss_that_is_not_finite_stops_all_ranks_and_nothing_is_saved(stage, stops, peace, tmp_path):
    """One batch of one rank: every weight is NaN at ZeRO-0, where nobody looks; ZeRO-1 skips the step in silence."""
    run = begin(peace, tmp_path / "run")
    more = [f"deepspeed.zero_optimization.stage={stage}", "train.log_every=4", "train.eval_every=100", "train.steps=6"]
    more += ["checkpoint.save_every=3", f"checkpoint.stop_at_nan={str(stops).lower()}"]
    out = run_ranks("tests/one_bad_batch.py", *flags(run, *more), ranks=2, check=False)
    kept = [path.name for path in ckpt.checkpoints(run / "checkpoints")]
    if stops:
        norm = "inf" if stage else "nan"  # DeepSpeed calls the norm of a skipped step infinite
        assert f"step 4: loss nan on rank 1, gradient norm {norm}: stopped" in error_line(out) and out.code == 1
        assert kept == ["step000003"] and not (run / "model").exists()
    else:
        assert out.code == 0 and kept[0] == "step000006" and math.isnan(out.losses[4]), out.stderr[-2000:]


@pytest.mark.parametrize("fp16", [False, True])
def test_a_gradient_norm_that_is_not_finite_stops_a_run_whose_loss_still_is(fp16):
    """But for fp16, where the loss scaler finds its factor so. The first such step is named, not the last."""
    norms = iter([1.0, float("inf"), float("nan")])
    engine = SimpleNamespace(device=torch.device("cpu"), fp16_enabled=lambda: fp16)
    engine.get_global_grad_norm = lambda: next(norms)
    finite = Finite(engine, looks=True)
    for step in (7, 8, 9):
        finite.note(step, torch.tensor(2.0), None)
    if fp16:
        finite.check()
    else:
        with pytest.raises(UserError, match="^step 8: loss 2.0 on rank 0, gradient norm inf: stopped"):
            finite.check()


# --- bad input ---


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("monitor.prot=1", "unknown key 'monitor.prot'; do you mean 'monitor.port'?"),
        ("checkpoint.save_ever=1", "unknown key 'checkpoint.save_ever'; do you mean 'checkpoint.save_every'?"),
        ("train.save_every=1", "unknown key 'train.save_every'; do you mean 'checkpoint.save_every'?"),
        ("monitor.port=70000", "monitor.port is 70000: input should be less than or equal to 65000"),
        ("model.code=fast", "model.code is 'fast': input should be 'transformers' or 'lean'"),
    ],
)
def test_new_sections_reject_what_they_do_not_know(override, sentence):
    with pytest.raises(UserError) as caught:
        load_config(overrides=[override])
    assert sentence in str(caught.value)


@pytest.mark.launch
def test_errors_of_a_start_are_one_sentence_each(peace, tmp_path):
    run = begin(peace, tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = run_ranks("day26/train.py", *flags(run, f"monitor.port={port}"), check=False)
    assert busy.code == 1 and f"monitor.port {port}: rank 0 cannot listen at {port}" in error_line(busy)
    plain = run_warm("capstone/train.py", *SETTINGS, check=False)  # started as a file, without a launcher
    assert plain.code == 1 and "started without a launcher" in error_line(plain)


@pytest.mark.long
@pytest.mark.launch
def test_two_starts_on_one_folder_do_not_meet(peace):
    with FileLock(peace[0] / ".lock"):
        second = run_ranks("day26/train.py", *flags(peace[0]), check=False)
    assert second.code == 1 and error_line(second).endswith("is being trained already")


# --- kills ---


class Job:
    """Ranks forked from a warm process, behind the face of a launcher: quicker starts for many kills."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.processes = start_ranks("day26/train.py", *arguments, folder=folder)
        self.pid = self.processes[0].pid

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        if any(codes):  # as the launcher does: one that failed ends them all
            for process in self.processes:
                process.join(3)
                process.kill()
                process.join()
            return next(process.exitcode for process in self.processes if process.exitcode)
        return None if None in codes else 0

    def wait(self, timeout: float = 300) -> int:
        ends = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < ends
            time.sleep(0.02)
        return code

    def tree(self) -> list[psutil.Process]:
        found = []
        for process in self.processes:
            if process.is_alive():
                rank = psutil.Process(process.pid)
                found += [rank, *rank.children(recursive=True)]
        return found


@pytest.fixture
def warm_kills(tmp_path, monkeypatch):
    """kill_test's functions, with jobs of forked ranks for launches; returns the args for them."""
    jobs = []

    def launch(args, run):
        jobs.append(Job(tmp_path, flags(run, *args.more)))
        return jobs[-1]

    def command_of(process):
        pids = [rank.pid for rank in jobs[-1].processes]
        return [f"--local_rank={pids.index(process.pid)}"] if process.pid in pids else []

    monkeypatch.setattr(kill_test, "launch", launch)
    monkeypatch.setattr(kill_test, "process_tree", lambda pid: jobs[-1].tree())
    monkeypatch.setattr(kill_test, "command_of", command_of)
    is_over, begun, _ = kill_test.STAGES["start"]
    monkeypatch.setitem(kill_test.STAGES, "start", (is_over, begun, 0.5))  # forked ranks prepare within 2 s
    return argparse.Namespace(kills=10, ranks=2, more=[f"monitor.port={free_port(2)}"])


@pytest.mark.launch
def test_killed_while_saving_the_run_ends_the_same(peace, tmp_path, warm_kills, monkeypatch):
    run, (is_over, _, longest_s) = begin(peace, tmp_path / "run"), kill_test.STAGES["save"]
    second = (is_over, lambda run, since: (run / "checkpoints/partial_step000006").exists(), longest_s)
    monkeypatch.setitem(kill_test.STAGES, "save", second)  # the first would leave nothing to resume from
    assert kill_test.kill_once(warm_kills, run, "save", 0.01, 1) == "rank 1"
    assert (run / "prometheus_targets.json").exists()  # of the crash: this is how an alert sees it
    assert kill_test.launch(warm_kills, run).wait() == 0, (tmp_path / "stderr").read_text()[-2000:]
    assert not (run / "prometheus_targets.json").exists()
    assert re.search(r"resume: step00000[369], \d+ files verified", (tmp_path / "stdout").read_text())
    assert kill_test.what_came_out(run) == kill_test.what_came_out(peace[0])
    assert_tensorboard_has_the_log(run)


@pytest.mark.long
@pytest.mark.launch
def test_killed_ten_times_in_all_stages_runs_end_the_same(peace, tmp_path, warm_kills):
    table = kill_test.kill_runs(warm_kills, tmp_path, random.Random(26)).rows
    assert len(table) == 10 and {row["stage"] for row in table} == set(kill_test.STAGES), table
    for run in tmp_path.glob("killed_*"):
        assert kill_test.what_came_out(run) == kill_test.what_came_out(peace[0]), run


@pytest.mark.long
@pytest.mark.launch
def test_the_program_that_kills_says_so(tmp_path):
    run = run_warm("day26/labs/kill_test.py", "--kills", 1, "--run_dir", tmp_path)
    assert re.search(r"^kill 1 +1 +start ", run.stdout, re.M)
    assert (
        "1 runs, 1 kills, run to the end: weights the same | data the same | loss curve the same | evaluation the same"
        in run.stdout
    )
    assert set(json.loads((tmp_path / "kill_test.json").read_text())["same"].values()) == {True}


# --- other stages, other ranks, the lean model ---


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize(("stage", "ranks"), [(0, (2, 1)), (1, (2, 1)), (1, (2, 4)), (3, (2, 1))])
def test_stages_agree_and_a_run_goes_on_on_other_ranks(stage, ranks, peace, tmp_path):
    run, more = begin(peace, tmp_path / "run"), [f"deepspeed.zero_optimization.stage={stage}"]
    first = run_ranks("day26/train.py", *flags(run, *more), "--stop_at", 5, ranks=ranks[0])
    assert "stopped by SIGTERM after step 5" in first.stdout and f"zero stage {stage} |" in first.stdout
    then = run_ranks("day26/train.py", *flags(run, *more), ranks=ranks[1])
    assert f"x {ranks[1]} ranks | step 5 of {STEPS}" in then.stdout
    assert ("loading universal_step000005" in then.stdout) == (stage > 0)
    assert not list(run.glob("checkpoints/*universal*"))  # a newer checkpoint has outdated the conversion
    assert losses_of(run) == pytest.approx(losses_of(peace[0]), abs=1e-5)
    norms = [[row["grad_norm"] for row in read_rows(folder) if "grad_norm" in row] for folder in (run, peace[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


CONVERTING = """
import sys
from datetime import timedelta
from pathlib import Path
sys.path.insert(0, {root!r})
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from capstone import checkpoint
from common.errors import clear_errors
from common.ranks import print0
dist.init_process_group("gloo")
_set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)
checkpoint.CONVERT = Path(sys.argv[2])
with clear_errors():
    print0(f"found {{checkpoint.choose(Path(sys.argv[1]), section := {{}}).name}} {{section}}")
dist.destroy_process_group()
"""
SLOW = "import pathlib, sys, time; time.sleep(6); pathlib.Path(sys.argv[1], 'universal_step000001').mkdir()"


@pytest.mark.launch
def test_a_conversion_may_take_longer_than_a_collective(tmp_path):
    """The group's time-out is 3 s, the conversion sleeps 6: the ranks that wait for it are still there."""
    root = tmp_path / "checkpoints"
    (root / "partial").mkdir(parents=True)
    (root / "partial/weights").write_text("of one rank at stage 1")
    ckpt.publish(root / "partial", "step000001", step=1, ranks=1, zero_stage=1)
    (tmp_path / "convert.py").write_text(SLOW)
    (tmp_path / "choose.py").write_text(CONVERTING.format(root=str(ROOT)))
    out = run_ranks(tmp_path / "choose.py", root, tmp_path / "convert.py", ranks=2, timeout=60)
    assert "found universal_step000001 {'checkpoint': {'load_universal': True}}" in out.stdout
    shutil.rmtree(root / "universal_step000001")
    (tmp_path / "convert.py").write_text("raise SystemExit('no such thing')")
    out = run_ranks(tmp_path / "choose.py", root, tmp_path / "convert.py", ranks=2, timeout=60, check=False)
    assert "converting step000001 failed on rank 0: RuntimeError: no such thing" in error_line(out)


SAVING = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import deepspeed, torch
from bench.world import join_world
from capstone.config import load_config
from capstone.model import build, save_model
from common.data import load_tokenizer
from common.ranks import print0
join_world()
tokenizer, most = load_tokenizer("bpe4096"), []
gather = deepspeed.zero.GatheredParameters
def counting(parameters, **more):
    most.append(sum(parameter.ds_numel for parameter in parameters))
    return gather(parameters, **more)
deepspeed.zero.GatheredParameters = counting
for code in ("transformers", "lean"):
    asked = [f"run_dir={{sys.argv[1]}}/{{code}}", f"model.code={{code}}", "deepspeed.zero_optimization.stage=3"]
    config = load_config(overrides=asked)
    config.run_path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = build(config, len(tokenizer), tokenizer.eos_token_id)
    section = {{**config.deepspeed, "zero_optimization": {{"stage": 3}}, "scheduler": {{}}}}
    del section["scheduler"]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=section)
    save_model(config, engine, tokenizer, {{"some": "facts"}})
    total = sum(parameter.ds_numel for parameter in model.parameters())
    print0(f"{{code}}: {{max(most)}} of {{total}}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.launch
def test_under_zero_3_the_model_is_saved_a_parameter_at_a_time(tmp_path):
    (tmp_path / "save.py").write_text(SAVING.format(root=str(ROOT)))
    out = run_ranks(tmp_path / "save.py", tmp_path, ranks=2)
    embedding = 4096 * 128
    for code in ("transformers", "lean"):
        most, total = map(int, re.search(rf"^{code}: (\d+) of (\d+)$", out.stdout, re.M).groups())
        assert most == embedding < 0.6 * total
        config = load_config(overrides=[f"model.code={code}"])
        torch.manual_seed(0)
        want = as_transformers(build(config, 4096, 0), 0).state_dict()
        found = AutoModelForCausalLM.from_pretrained(tmp_path / code / "model").state_dict()
        assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
        assert json.loads((tmp_path / code / "model/training.json").read_text()) == {"some": "facts"}


@pytest.mark.long
@pytest.mark.launch
def test_the_lean_model_trains_and_becomes_a_transformers_folder(peace, tmp_path):
    run = begin(peace, tmp_path / "run")
    out = run_ranks("day26/train.py", *flags(run, "model.code=lean", "deepspeed.zero_optimization.stage=0"), ranks=2)
    assert out.losses[STEPS] < out.losses[1] - 0.5
    measured = json.loads((run / "evaluation.json").read_text())["held_out"]["nats_per_token"]
    assert measured == pytest.approx(out.held_out[STEPS], abs=0.1)  # other blocks, the same model
    config = load_config(run / "config.yaml")
    ours, theirs = (load_model(run / folder, config).state_dict() for folder in ("checkpoints", "model"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.long
@pytest.mark.launch
def test_the_program_that_compares_speeds_trains_the_same_thing_twice(tmp_path):
    run = run_warm("day26/labs/speed.py", "--turns", 1, "--steps", 12, "--log_every", 4, "--run_dir", tmp_path)
    assert "capstone / day 12 = " in run.stdout
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [len(row["turns"][0]) for row in found["table"]] == [2, 2]  # steps 8 and 12; 1 and 4 are warm-up
    logs = [
        [row["loss"] for row in read_rows(tmp_path / f"{name}_1") if "loss" in row] for name in ("day12", "capstone")
    ]
    assert logs[0][0] == pytest.approx(logs[1][0], abs=0.05) and logs[0][-1] < logs[0][0] > logs[1][-1]


def test_what_decays():
    lean, plain = (build(load_config(overrides=[f"model.code={code}"]), 4096, 0) for code in ("lean", "transformers"))
    matrices, scales = parameter_groups(lean)
    assert scales["weight_decay"] == 0 and {tuple(scale.shape) for scale in scales["params"]} == {(128,)}
    assert "weight_decay" not in matrices and len(matrices["params"]) + len(scales["params"]) == len(
        list(lean.parameters())
    )
    assert [len(group["params"]) for group in parameter_groups(plain)] == [len(list(plain.parameters()))]


def test_a_log_that_was_being_written_anew_when_the_kill_came_is_whole(tmp_path):
    from capstone.monitor import Monitor

    monitor = object.__new__(Monitor)
    monitor.config = load_config(overrides=[f"run_dir={tmp_path}"])
    rows = [{"step": step, "loss": 1.0} for step in range(1, 6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 6, "lo')
    assert monitor._kept_rows(4) == rows[:4]
    (tmp_path / "metrics.jsonl").write_text("")  # what RunLog does first
    assert monitor._kept_rows(4) == rows[:4]
