"""Day 27: the tuner's search and its trials, and each alert: unit-tested by promtool, and set off by a real fault."""

import json
import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from filelock import FileLock

from bench.world import free_port
from capstone import tune
from capstone.config import load_config
from capstone.tune import GIB, Problem, Settings, Trials, search
from common.errors import UserError
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
    assert by_name["StepStalled"]["expr"].endswith("> 10.0") and by_name["CheckpointTooOld"]["expr"].endswith("> 60.0")
    assert "[120000ms]" in by_name["LossDiverging"]["expr"] and by_name["LossDiverging"]["for"] == "6000ms"
    assert by_name["MemoryNearLimit"]["expr"].endswith("> 0.92"), "a share is no duration"
    for rule, plain in zip(rules, RULES, strict=True):
        within = prometheus.seconds(plain["annotations"]["within"]) / 30 + (6 if rule["alert"] == "RankLost" else 0)
        assert prometheus.seconds(rule["annotations"]["within"]) == pytest.approx(within)
    assert by_name["RankLost"]["for"] == "8000ms", "discovery keeps its own clock: 2 s would be a false alarm"
    assert set(EXPECTED.values()) == set(NAMES), "a fault for every alert"


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
    assert len(shown) == 2 and asked - {"training_mfu_ratio"} <= shown[0], "MFU has no value on CPU"
    assert {"training_last_step_timestamp_seconds", "training_memory_bytes"} <= shown[
        1
    ] and "training_loss" not in shown[1]
    assert not (tmp_path / "run/prometheus_targets.json").exists(), "after a clean end nobody is missed"


FAULTS = [["no_checkpoint@0", "memory@8", "slow@20-33", "stall@38-51", "kill@66"]]
FAULTS += [["overflow@10-24", "diverge@26-40", "nan@42"]]


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.serial
@pytest.mark.parametrize("faults", FAULTS, ids=["systems", "numbers"])
@measure_again
def test_each_fault_sets_off_its_alert_in_time_and_no_other(tmp_path, faults):
    assert {fault.partition("@")[0] for part in FAULTS for fault in part} == set(EXPECTED)
    folder = tmp_path / f"go{len(list(tmp_path.iterdir()))}"  # a busy machine is a true ThroughputDrop: go again
    run = run_warm("day27/labs/watch.py", "--run_dir", folder, "--fault", *faults, check=False, timeout=600)
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
    tuned = json.loads((ROOT / "day27/results/tuned_2cpu.json").read_text())
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
