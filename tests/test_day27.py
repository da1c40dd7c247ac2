"""Day 27: the tuner's search and its trials, and each alert: unit-tested by promtool, and set off by a real fault."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from filelock import FileLock

from bench.world import free_port
from capstone import monitor, tune
from capstone.config import load_config
from capstone.tune import GIB, Problem, Settings, Trials, search
from common.errors import UserError
from common.run_log import read_rows
from day27 import exercise, prometheus, solution
from day27.faults import EXPECTED
from day27.labs import watch
from tests.launch import ROOT, measure_again, run_command, run_day, run_warm

ALERTS = ROOT / "capstone/alerts"
RULES = yaml.safe_load((ALERTS / "rules.yml").read_text())["groups"][0]["rules"]
NAMES = [rule["alert"] for rule in RULES]


# ---- alerts: the rules, without a run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool():
    """promtool and amtool, fetched once from Debian where they are not on the PATH."""
    try:
        prometheus.find_tool("promtool")
    except UserError as error:
        pytest.skip(str(error))
    return lambda name, *words: subprocess.run(
        [prometheus.find_tool(name), *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )


def test_prometheus_and_alertmanager_take_the_files(tool):
    for words in (("check", "config", ALERTS / "prometheus.yml"), ("test", "rules", ALERTS / "rules_test.yml")):
        run = tool("promtool", *words)
        assert run.returncode == 0, run.stdout + run.stderr
    config = f"--config.file={ALERTS / 'alertmanager.yml'}"
    assert tool("amtool", "check-config", ALERTS / "alertmanager.yml").returncode == 0
    for severity, receiver in (("page", "pager"), ("ticket", "tickets")):
        route = tool("amtool", "config", "routes", "test", config, f"severity={severity}", "alertname=X", "run=y")
        assert route.stdout.strip() == receiver
    assert {rule["labels"]["severity"] for rule in RULES} == {"page", "ticket"}
    inhibit = yaml.safe_load((ALERTS / "alertmanager.yml").read_text())["inhibit_rules"]
    assert set(re.findall(r"[A-Z]\w+", str([rule["target_matchers"] for rule in inhibit]))) <= set(NAMES)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not():
    checks = [
        c for case in yaml.safe_load((ALERTS / "rules_test.yml").read_text())["tests"] for c in case["alert_rule_test"]
    ]
    for name in NAMES:
        assert {bool(check["exp_alerts"]) for check in checks if check["alertname"] == name} == {True, False}


@pytest.mark.parametrize("change", ["never", "always", "at once"])
def test_a_rule_that_is_wrong_fails_its_unit_test(tool, tmp_path, change):
    rules = yaml.safe_load((ALERTS / "rules.yml").read_text())
    wrong = [rule for rule in rules["groups"][0]["rules"] if change != "at once" or "for" in rule]
    for rule in wrong:
        if change == "never":
            rule["expr"] = f"({rule['expr']}) and vector(1) < 0"
        elif change == "always":
            rule["expr"] = re.search(r"training_\w+|up\{[^}]*\}", rule["expr"])[0] + " > -Inf"
        rule["for"] = "0s" if change != "never" else rule.get("for", "0s")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    shutil.copy(ALERTS / "rules_test.yml", tmp_path)
    run = tool("promtool", "test", "rules", tmp_path / "rules_test.yml")
    failed = set(re.findall(r"alertname: ?(\w+), time", run.stdout + run.stderr))
    assert run.returncode == 1 and failed == {rule["alert"] for rule in wrong}, run.stdout + run.stderr


# Their log lines, one every 15 s and one a minute, as larger models would have them: fine-tuning is noisy.
HEALTHY = ["day22/results/train_2cpu.json", "day22/results/train_hf_2cpu.json", "day22/results/train_freeze_2cpu.json"]
HEALTHY += ["day22/results/train_8b_2xh100.json", "day22/results/train_8b_2xh200.json"]
HEALTHY += ["day25/results/train_2cpu.json", "day26/results/train_2cpu.json", "day27/results/rows_2cpu.jsonl"]
SHOWN = {"loss": "training_loss", "grad_norm": "training_grad_norm", "tokens_per_s": "training_tokens_per_second"}
SHOWN |= {"memory_gib": "training_memory_bytes", "limit": "training_memory_limit_bytes", "step": "training_step"}


def test_healthy_runs_of_other_days_set_off_no_alert(tool, tmp_path):
    cases = []
    for file in HEALTHY:
        text = (ROOT / file).read_text()
        rows = [json.loads(line) for line in text.splitlines()] if file.endswith("l") else json.loads(text)["rows"]
        rows = [row | {"limit": max(1.5, 1.05 * row["memory_gib"])} for row in rows if "loss" in row]
        for times in (1, 4):
            series = [
                {"series": f'{metric}{{run="{file}"}}', "values": " ".join(f"{row[key]}x{times - 1}" for row in rows)}
                for key, metric in SHOWN.items() if key in rows[0]
            ]  # fmt: skip
            checks = [
                {"alertname": name, "eval_time": f"{15 * scrape}s", "exp_alerts": []}
                for name in NAMES for scrape in range(0, len(rows) * times, 2)
            ]  # fmt: skip
            cases.append({"name": file, "interval": "15s", "input_series": series, "alert_rule_test": checks})
    shutil.copy(ALERTS / "rules.yml", tmp_path)
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "30s", "tests": cases}
    (tmp_path / "healthy.yml").write_text(yaml.safe_dump(test))
    run = tool("promtool", "test", "rules", tmp_path / "healthy.yml")
    assert run.returncode == 0, run.stdout + run.stderr


# ---- what the alerts look at: a monitor with the engine of one rank --------------------------------------------------


def one_rank(tmp_path, monkeypatch, step: int = 0, skipped: int = 0):
    """A monitor as a start at `step` makes it, on a device with 80 bytes, and its engine."""
    overrides = [f"run_dir={tmp_path}", "train.log_every=4", "train.steps=8", f"monitor.port={free_port()}"]
    engine = SimpleNamespace(
        device=torch.device("cpu"), dp_world_size=1, global_rank=0, skipped_steps=skipped, global_samples=0,
        optimizer=None, monitor=SimpleNamespace(tb_monitor=None, write_events=lambda events: None),
        zero_optimization_stage=lambda: 0, get_lr=lambda: [0.1],
    )  # fmt: skip
    device = SimpleNamespace(device_name=lambda: "cuda", total_memory=lambda: 80, memory_allocated=lambda: 9)
    device.memory_reserved = lambda: 79
    device.memory_stats = lambda: {"num_alloc_retries": device.retries}
    device.retries = 0
    monkeypatch.setattr(monitor, "get_accelerator", lambda: device)
    monkeypatch.setattr(monitor, "peak_flops", lambda device: None)
    return monitor.Monitor(load_config(overrides=overrides), engine, step, 100, 1.0), engine, device


def shown(log) -> dict[str, float]:
    """Everything that the endpoint says: {sample: value}, labels left out."""
    return {sample.name: sample.value for family in log.exporter.registry.collect() for sample in family.samples}


def targets(tmp_path) -> dict:
    return json.loads((tmp_path / "prometheus_targets.json").read_text())[0]


def test_counters_begin_at_0_in_every_process_and_starts_are_kept(tmp_path, monkeypatch):
    log, engine, _ = one_rank(tmp_path, monkeypatch)
    for step in range(1, 7):
        engine.skipped_steps += 1
        log.step(step, torch.tensor(1.0), 100, grad_norm=1.0)
    first = shown(log)
    log.exporter.close()  # and it crashes, two steps after a checkpoint
    log, engine, _ = one_rank(tmp_path, monkeypatch, step=4, skipped=4)
    again = shown(log)
    assert (first["training_tokens_total"], first["training_overflow_steps_total"]) == (600, 6)
    assert (again["training_tokens_total"], again["training_overflow_steps_total"]) == (0, 0), "400 is no new start"
    assert again["training_tokens_created"] > first["training_tokens_created"]
    assert (first["training_starts"], again["training_starts"]) == (1, 2)
    rows = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 4]
    log.exporter.close()


def test_loss_is_the_mean_of_an_interval_and_memory_what_is_held_between_steps(tmp_path, monkeypatch):
    log, _, device = one_rank(tmp_path, monkeypatch)
    assert "training_memory_bytes" not in shown(log), "before the first step there are no optimizer states"
    for step, loss in enumerate([9.0, 1.0, 2.0, 6.0], 1):
        device.retries += 2
        log.step(step, torch.tensor(loss), 100, grad_norm=1.0)
    values, rows = shown(log), read_rows(tmp_path)
    assert values["training_loss"] == 3.0 and [row["loss"] for row in rows] == [9.0, 6.0], "the log line is one step's"
    assert values["training_memory_bytes"] == 9 and values["training_memory_limit_bytes"] == 80
    assert values["training_allocator_retries_total"] == 8
    assert values["training_step_seconds"] == pytest.approx(100 / rows[-1]["tokens_per_s"])
    log.exporter.close()


def test_a_run_is_listed_from_its_first_start_until_its_last_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["monitor", f"run_dir={tmp_path}"])
    monitor.main()
    nowhere = {"targets": ["localhost:0"], "labels": {"job": "training", "run": str(tmp_path)}}
    assert targets(tmp_path) == nowhere | {"labels": nowhere["labels"] | {"state": "expected"}}
    with pytest.raises(UserError, match="is on Prometheus's list already"):
        monitor.main()
    log, *_ = one_rank(tmp_path, monkeypatch)
    assert targets(tmp_path)["labels"] == nowhere["labels"] and targets(tmp_path)["targets"] != ["localhost:0"]
    log.step(1, torch.tensor(1.0), 100, grad_norm=1.0)
    log.close()  # a signal has ended it
    assert targets(tmp_path) == nowhere | {"labels": nowhere["labels"] | {"state": "stopped"}}
    log, *_ = one_rank(tmp_path, monkeypatch, step=7)
    log.step(8, torch.tensor(1.0), 100, grad_norm=1.0)
    log.close()
    assert not (tmp_path / "prometheus_targets.json").exists()
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="has ended well"):
        monitor.main()


V1 = "memory/memory.limit_in_bytes"


@pytest.mark.parametrize(
    ("groups", "files", "least"),
    [
        ("0::/\n", {"memory.max": "500\n"}, 500),  # a container, version 2
        ("0::/job/step\n", {"job/memory.max": "300\n", "job/step/memory.max": "max\n", "memory.max": "900"}, 300),
        ("3:cpu:/\n4:memory:/job\n", {V1: "900", "memory/job/memory.limit_in_bytes": "70"}, 70),
        ("4:memory:/docker/unseen\n0::/\n", {V1: "900"}, 900),  # a container, version 1
        ("0::/\n", {}, math.inf),
    ],
)  # fmt: skip
def test_control_groups_limit_monitor_and_tuner_alike(tmp_path, monkeypatch, groups, files, least):
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    assert monitor.container_limit(tmp_path / "tree", tmp_path / "groups") == least
    asked = []
    monkeypatch.setattr(monitor, "container_limit", lambda: least)
    monkeypatch.setattr(monitor.psutil, "virtual_memory", lambda: namedtuple("Memory", "total")(1000))
    monkeypatch.setattr(tune, "Problem", lambda config, ranks, limit: asked.append(limit) or exit())
    with pytest.raises(SystemExit):
        tune.tune(SimpleNamespace(ranks=2, limit_gib=None), None, tmp_path)
    assert asked == [int(0.95 * (min(least, 1000) // 2))]


def test_dashboard_shows_what_the_alerts_look_at_and_its_queries_parse(tool, tmp_path):
    board = json.loads((ALERTS / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    rules = [{"record": f"q{i}", "expr": query.replace("$run", ".*")} for i, query in enumerate(queries)]
    (tmp_path / "q.yml").write_text(yaml.safe_dump({"groups": [{"name": "q", "rules": rules}]}))
    run = tool("promtool", "check", "rules", tmp_path / "q.yml")
    assert run.returncode == 0, run.stdout + run.stderr
    assert metrics_in(str([rule["expr"] for rule in RULES])) <= metrics_in(str(queries))


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\btraining_\w+", text))


def test_a_faster_clock_divides_every_duration():
    assert (
        prometheus.seconds("1h30m") == 5400
        and prometheus.faster("5m", 30) == "10000ms"
        and prometheus.faster("15s", 30) == "500ms"
    )
    rules = prometheus.scale_rules(yaml.safe_load((ALERTS / "rules.yml").read_text()), 30)["groups"][0]["rules"]
    by_name = {rule["alert"]: rule for rule in rules}
    stalled = "> clamp_min(10 * quantile_over_time(0.5, training_step_seconds[120000ms]), 10.0) or"
    assert stalled in by_name["StepStalled"]["expr"] and by_name["CheckpointTooOld"]["expr"].endswith("> 60.0")
    assert "and training_loss offset 10000ms)[120000ms:2000ms])" in by_name["LossDiverging"]["expr"]
    assert by_name["LossDiverging"]["for"] == "6000ms"
    assert "> 0.1 * training_memory_limit_bytes" in by_name["MemoryGrowing"]["expr"], "a share is no duration"
    for rule, plain in zip(rules, RULES, strict=True):
        within = prometheus.seconds(plain["annotations"]["within"]) / 30
        within += 8 * (rule["alert"] in ("RankLost", "CrashLoop", "RunAbsent"))
        assert prometheus.seconds(rule["annotations"]["within"]) == pytest.approx(within)
    assert by_name["RankLost"]["for"] == "8000ms", "discovery keeps its own clock: 2 s would be a false alarm"
    assert set(EXPECTED.values()) == set(NAMES) - {"AllocatorRetries", "LowGoodput"}, "a fault for every other alert"


@pytest.mark.parametrize("page", ["notes.md", "notes.zh.md"])
def test_notes_name_every_alert_with_its_times(page):
    text = (ROOT / "day27" / page).read_text()
    for rule in RULES:
        times = f"{rule.get('for', '–')} | {rule['annotations']['within']} | {rule['labels']['severity']} |"
        assert re.search(rf"^\| {rule['alert']} \|.*\| {re.escape(times)}$", text, re.M), rule["alert"]


@pytest.mark.parametrize("page", ["notes.md", "notes.zh.md"])
def test_notes_say_where_nobody_looks_for_nan(page):
    """Shown by test_day26.py: at ZeRO-0 one bad batch ends the run, at stage 1 it is a skipped step."""
    text = (ROOT / "day27" / page).read_text()
    rows = re.findall(r"^\|.*checkpoint.stop_at_nan.*", text, re.M)
    assert len(rows) == 1 and "ZeRO-0" in rows[0] and "fp32" in rows[0] and "autocast" in rows[0]
    assert "ZeRO checks in every precision" not in text


@pytest.mark.parametrize(
    ("number", "answer", "sentence"),
    [
        (0, lambda *_: min([]), "ended with ValueError"),
        (1, lambda is_true, wait: None, "0010 with for_evaluations=0 fires at 2, you have None"),
        (2, lambda trials: max(trials, key=lambda trial: trial["tokens_per_s"]), "ended with KeyError: 'tokens_per_s'"),
    ],
)
def test_the_exercise_says_what_is_wrong(number, answer, sentence, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["exercise.py"])
    answers = [solution.is_wrong, solution.first_firing, solution.fastest]
    answers[number] = answer
    with pytest.raises(UserError, match="^not yet: ") as caught:
        exercise.check(*answers)
    assert sentence in str(caught.value)


class FakePrometheus:
    """What `table` asks of Prometheus: three alerts fired."""

    rules = {"groups": [{"rules": RULES}]}

    def first_fired(self, start):
        return {"LossNaN": 1119.0, "RankLost": 1400.0, "StepStalled": 1090.0, "OverflowStreak": 1200.0, "Else": 1.0}


def test_alerts_that_are_late_early_missing_or_false_are_told(tmp_path):
    begun = ({"fault": fault, "step": 1, "time": 1100.0} for fault in ("nan", "kill", "stall", "memory"))
    (tmp_path / "faults.jsonl").write_text("".join(json.dumps(fault) + "\n" for fault in begun))
    rows, false_alarms = watch.table(FakePrometheus(), tmp_path / "faults.jsonl", 0)
    assert [row["verdict"] for row in rows] == ["in time", "late", "early", "missing"]
    assert false_alarms == ["Else"], "OverflowStreak follows from NaN, Else from nothing"


@pytest.mark.launch
def test_watched_training_shows_what_rules_and_dashboard_ask_for(tmp_path):
    data = ["data.sources=[data/moby_dick.jsonl.xz]", f"data.folder={tmp_path / 'data'}"]
    flags = ["--steps", 12, "--log_every", 6, "--port", free_port(2), "--run_dir", tmp_path / "run"]
    run = run_day("day27/train.py", *data, "train.eval_every=6", *flags)
    assert run.losses[12] < run.losses[1] and "faults: none" in run.stdout
    shown = [
        set(re.findall(r"^  (training_\w+)", part, re.M)) for part in run.stdout.split("as Prometheus would read")[1:]
    ]
    asked = metrics_in((ALERTS / "rules.yml").read_text()) | metrics_in((ALERTS / "grafana.json").read_text())
    elsewhere = {"training_mfu_ratio", "training_allocator_retries_total"}
    assert len(shown) == 2 and asked - elsewhere <= shown[0], "these two have no value on CPU"
    assert {"training_last_step_timestamp_seconds", "training_memory_bytes"} <= shown[
        1
    ] and "training_loss" not in shown[1]
    assert not (tmp_path / "run/prometheus_targets.json").exists(), "after a clean end nobody is missed"


FAULTS = [["no_checkpoint@0", "slow@20-33", "memory@34", "stall@38-51", "kill@66"]]
FAULTS += [["steep@20-34", "diverge@40-58", "overflow@62-76", "nan@80"], ["crash@8"], ["stop@5"]]


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.serial
@pytest.mark.parametrize("faults", FAULTS, ids=["systems", "numbers", "crash", "stop"])
@measure_again
def test_each_fault_sets_off_its_alert_in_time_and_no_other(tmp_path, faults):
    assert {fault.partition("@")[0] for part in FAULTS for fault in part} == set(EXPECTED)
    folder = tmp_path / f"go{len(list(tmp_path.iterdir()))}"  # a busy machine is a true ThroughputDrop: go again
    more = ["--speedup", 10] if faults == ["crash@8"] else []  # four starts want more than an hour / 30
    run = run_warm("day27/labs/watch.py", "--run_dir", folder, *more, "--fault", *faults, check=False, timeout=600)
    found = json.loads((folder / "watch.json").read_text())
    assert run.code == 0, run.stdout + run.stderr
    assert [row["verdict"] for row in found["table"]] == ["in time"] * len(faults) and not found["false_alarms"]


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.serial
@measure_again
def test_a_healthy_run_sets_off_no_alert(tmp_path):
    folder = tmp_path / f"go{len(list(tmp_path.iterdir()))}"  # a busy machine is a true ThroughputDrop: go again
    run = run_warm("day27/labs/watch.py", "--run_dir", folder, "--seconds", 90, check=False, timeout=600)
    found = json.loads((folder / "watch.json").read_text())
    assert run.code == 0 and not found["false_alarms"], run.stdout + run.stderr
    assert found["train_exit_code"] == 0, "it ended well, asked by SIGTERM"
    assert found["steps"] > 200 and found["scrapes"] > 200, "with an evaluation and checkpoints, and really watched"


# ---- the tuner -------------------------------------------------------------------------------------------------------


@pytest.fixture
def problem():
    return Problem(load_config(overrides=["train.global_batch=128"]), ranks=2, limit=2 * GIB)


def grid(problem, **values):
    all_of_them = {"micro_batch": [1, 2, 4, 8, 16, 32], "stage": [0, 1, 2, 3], "offload": ["none", "cpu"]}
    return problem.grid(**{**all_of_them, "recompute": [False, True], "bucket": [5 * 10**5, 5 * 10**7], **values})


def test_every_point_keeps_the_global_batch_and_makes_sense(problem):
    points = grid(problem, micro_batch=[3, 8, 64])  # 128 sequences do not divide by 3 x 2
    assert {point.micro_batch for point in points} == {8, 64} and problem.as_it_is in points and len(points) == 52
    for point in points:
        section = problem.section(point)
        assert section["train_micro_batch_size_per_gpu"] * section["gradient_accumulation_steps"] * 2 == 128
        zero = section["zero_optimization"]
        assert zero["stage"] == point.stage and ("offload_optimizer" in zero) == (point.offload == "cpu")
        assert point.stage == 0 or zero["reduce_bucket_size"] == point.bucket
        load_config(
            overrides=["train.global_batch=128", f"deepspeed={json.dumps(section)}"], ranks=2
        )  # raises when DeepSpeed would not take it
    assert problem.predicted(points[0]._replace(recompute=True)) < problem.predicted(points[0])


def speed_model(point: Settings) -> float:
    """Tokens/s of an imagined machine: the larger batch helps, less and less; all that saves memory costs."""
    cost = 1 + 4 / point.micro_batch + 0.1 * point.stage + 0.3 * point.recompute + 0.5 * (point.offload == "cpu")
    return 1e5 / (cost + 0.2 * (point.bucket == 5 * 10**5 and point.stage > 0))


def memory_model(point: Settings) -> float:
    return point.micro_batch * (0.25 if point.recompute else 1) + 24 / (1 + point.stage) - 4 * (point.offload == "cpu")


@pytest.mark.parametrize("room", [6, 12, 24, 40, 60])
def test_search_comes_within_5_percent_of_the_optimum_with_a_part_of_the_trials(problem, room):
    points, seen = grid(problem), []

    def trial(point):
        assert point not in seen, "the same trial twice"
        seen.append(point)
        fits = memory_model(point) <= room
        return {"status": "ok", "tokens_per_s": speed_model(point)} if fits else {"status": "no memory"}

    best = search(sorted(points, key=memory_model), problem.as_it_is, trial)
    optimum = max(speed_model(point) for point in points if memory_model(point) <= room)
    assert speed_model(best) >= 0.95 * optimum and len(seen) < len(points) / 2
    for point in seen:  # what has run out of memory is not asked for more
        smaller = [p for p in seen[: seen.index(point)] if p._replace(micro_batch=point.micro_batch) == point]
        assert not any(p.micro_batch < point.micro_batch and memory_model(p) > room for p in smaller)


def test_search_says_when_nothing_runs(problem):
    assert search(grid(problem), problem.as_it_is, lambda point: {"status": "failed"}) is None


def fake_program(tmp_path, monkeypatch, script: str) -> None:
    (tmp_path / "python").write_text(f"#!/bin/bash\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(tune.sys, "executable", str(tmp_path / "python"))


@pytest.mark.parametrize(
    "script, status, why",
    [
        ('echo \'row {"tokens_per_s": 5.0, "peak_bytes": 7}\'', "ok", None),
        ("echo 'no memory: RuntimeError: tried to allocate'; exit 1", "no memory", "RuntimeError: tried to allocate"),
        ("echo terminate: std::bad_alloc; exit 250", "no memory", "bad_alloc"),
        ("echo 'ValueError: no such stage'; exit 3", "failed", "exit code 3: ValueError: no such stage"),
        ("kill -9 $$", "failed", "exit code -9 (killed: by the system for want of memory, perhaps): no message"),
        ("sleep 97531 & sleep 97531", "hung", "not done after 1 s"),
    ],
    ids=["ok", "no memory", "bad_alloc", "exit", "killed", "hang"],
)
def test_whatever_a_trial_does_is_a_result(problem, tmp_path, monkeypatch, capsys, script, status, why):
    fake_program(tmp_path, monkeypatch, script)
    row = Trials(problem, tmp_path, steps=2, timeout_s=1 if status == "hung" else 60)(problem.as_it_is)
    assert row["status"] == status and row.get("why") == why
    assert status in capsys.readouterr().out or status == "ok"
    left = [process for process in psutil.process_iter(["cmdline"]) if "97531" in (process.info["cmdline"] or [])]
    assert not left, "a trial that hung goes on"


def test_killed_between_and_within_writing_the_tuner_repeats_nothing_that_is_whole(problem, tmp_path, monkeypatch):
    fake_program(tmp_path, monkeypatch, 'echo x >>"$0.calls"; echo \'row {"tokens_per_s": 5.0, "peak_bytes": 7}\'')
    points, path = grid(problem)[:3], tmp_path / "trials.jsonl"
    for point in points:
        Trials(problem, tmp_path, 2, 9)(point)
    whole = path.read_text()
    path.write_text(whole[:-20])  # the third was being written
    trials = Trials(problem, tmp_path, 2, 9)
    assert len(trials.done) == 2
    for point in points:
        trials(point)
    assert trials.new == 1 and (tmp_path / "python.calls").read_text().count("x") == 4
    assert [json.loads(line)["settings"] for line in path.read_text().splitlines()] == [p._asdict() for p in points]
    trials(points[0], turn=1)
    other = Problem(problem.config, 2, 1 * GIB)
    assert trials.new == 2 and Trials(other, tmp_path, 2, 9)(points[0]) and path.read_text().count("\n") == 5


def test_recorded_search_found_the_optimum():
    tuned = json.loads((ROOT / "day27/results/grid_2cpu.json").read_text())
    assert tuned["share_of_optimum"] >= 0.95 and tuned["wrongly_pruned"] == 0
    assert tuned["search_trials"] < tuned["points"] and {row["status"] for row in tuned["table"]} >= {"ok", "no memory"}


@pytest.mark.launch
def test_tuner_really_runs_and_its_winner_is_a_config(tmp_path, monkeypatch, capsys):
    command = ["tune", "train.global_batch=32", "--out", tmp_path]
    command += ["--micro_batch", 8, 16, "--stage", 1, "--offload", "none", "--recompute", "no", "--bucket", 500_000]
    command += ["--limit_gib", 0.2, "--steps", 1, "--turns", 0]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    tune.main()
    first = capsys.readouterr().out
    assert "micro-batch 16, ZeRO-1, bucket 500,000 | no memory" in first and "2 trials now" in first
    rows = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok", "no memory"] and rows[0]["stage"] == 1
    assert 0 < rows[0]["peak_bytes"] < 0.2 * GIB and "can't allocate memory" in rows[1]["why"]
    best = load_config(tmp_path / "best.yaml", ranks=2)
    assert best.deepspeed["train_micro_batch_size_per_gpu"] == 8
    assert "| micro-batch 16, ZeRO-1, bucket 500,000 | no memory" in (tmp_path / "report.md").read_text()
    tune.main()
    assert "0 trials now" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.launch
def test_killed_in_a_trial_the_tuner_leaves_nothing_running_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "capstone.tune", "train.global_batch=32", "--out", tmp_path, "--turns", 0]
    command += ["--micro_batch", 4, 8, "--stage", 1, "--offload", "none", "--recompute", "no", "--bucket", 500_000]
    job, path = subprocess.Popen([str(word) for word in command], cwd=ROOT), tmp_path / "trials.jsonl"
    until(lambda: path.exists() and path.read_text().endswith("\n") and len(trial_processes(tmp_path)) >= 3)
    job.kill()
    job.wait()
    until(lambda: not trial_processes(tmp_path))
    first = path.read_text()
    assert first.count("\n") == 1
    assert "1 trials now" in run_command(*command).stdout
    assert path.read_text().startswith(first) and path.read_text().count("\n") == 2


def trial_processes(folder) -> list[int]:
    """Launcher and ranks of a trial whose files are in `folder`."""
    every = psutil.process_iter(["cmdline"])
    words = {process.pid: process.info["cmdline"] or [] for process in every}
    return [pid for pid, line in words.items() if "capstone.trial" in line and str(folder / "trial.json") in line]


def until(true, seconds: float = 90) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.2)


def test_bad_input_gets_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "watched/run").mkdir(parents=True)
    for program, words, sentence in (
        (tune, ["--limit_gib", "-1"], "--limit_gib -1.0 is no limit"),
        (tune, ["--limit_gib", "nan"], "--limit_gib nan is no limit"),
        (tune, ["--steps", "0"], "--steps 0: take 1 or more"),
        (tune, ["--micro_batch", "8", "0"], "--micro_batch 0: take 1 or more"),
        (tune, ["--turns", "-1"], "--turns -1"),
        (tune, ["--limit_gib", "0.000001", "--out", str(tmp_path)], "so nothing was tried"),
        (watch, ["--fault", "nonsense@3"], "--fault nonsense@3: want NAME@SECONDS"),
        (watch, ["--fault", "nan@1.2.3"], "--fault nan@1.2.3: want NAME@SECONDS"),
        (watch, ["--fault", "slow@40-20"], "--fault slow@40-20 ends before it begins"),
        (watch, ["--fault", "nan@4", "nan@9"], "--fault nan@9: nan stands there twice"),
        (watch, ["--speedup", "0"], "--speedup 0.0: take more than 0"),
        (watch, ["--run_dir", str(tmp_path / "watched")], "holds a watched run: name another --run_dir"),
    ):
        monkeypatch.setattr(sys, "argv", [program.__name__, *words])
        with pytest.raises(UserError, match=re.escape(sentence)):
            program.main()
    lock = FileLock(tmp_path / "lock")
    with lock, pytest.raises(UserError, match="another tuner works in"):
        monkeypatch.setattr(sys, "argv", ["tune", "--out", str(tmp_path)])
        tune.main()
