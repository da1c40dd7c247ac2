"""Day 13: each seeded fault and each sick curve is seen by its tool in its time; the book says what DeepSpeed says."""

import ast
import json
import math
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import time

import pytest
import torch

from common.errors import UserError
from day13 import desync, exercise, flight, solution, symptoms
from day13.bisection import differences, mixed, smallest
from day13.faults import CAUSES, FIRST_STEP, NUM_FAULTS, ORDER, victim
from day13.nonfinite import watch_modules
from day13.signals import apart_from, first_signals
from tests.house import altered_solution
from tests.launch import SMALL_CORPUS, error_line, run_command, run_day, run_ranks, run_warm
from tests.render import ROOT

SMALL = ["--corpus", SMALL_CORPUS]


# --- the symptom book -------------------------------------------------------------------------------------------------


BOOK = symptoms.load()


def test_the_book_has_its_bars_and_every_field_in_both_languages():
    assert len(BOOK) >= 40 and sum(bool(entry["by"]) for entry in BOOK) >= 25
    assert len({entry["id"] for entry in BOOK}) == len({entry["message"] for entry in BOOK}) == len(BOOK)
    for entry in BOOK:
        assert entry["group"] in symptoms.GROUPS and entry["days"] and (entry["by"] or entry["reports"]), entry["id"]
        assert all(entry[part] for part in ("message", "cause", "cure", "cause_zh", "cure_zh")), entry["id"]
        assert re.search(r"[\u4e00-\u9fff]", entry["cause_zh"]), entry["id"]
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", report) for report in entry["reports"]), entry["id"]
        for path in re.findall(r"`((?:day\d\d|config)/[\w/]+\.\w+)`", " ".join(entry[p] for p in ("cause", "cure"))):
            assert (ROOT / path).exists(), path


def test_every_day_leads_to_its_entries():
    """Each page's pitfalls end with a generated line that links the day's entries; the book has an anchor for each."""
    for page in sorted(ROOT.glob("day[0-9][0-9]/notes*.md")):
        day, language = page.parent.name, "zh" if ".zh." in page.name else "en"
        if day != "day13":
            assert f"<!-- symptoms {day} {language} -->" in page.read_text(encoding="utf-8"), page
    anchors = [f'<a id="{entry["id"]}"></a>' for entry in BOOK]
    assert all(symptoms.page(zh).count(anchor) == 1 for zh in (False, True) for anchor in anchors)


@pytest.mark.parametrize(("zh", "name"), [(False, "symptoms.md"), (True, "symptoms.zh.md")])
def test_the_pages_are_what_the_data_makes(zh, name):
    text = (ROOT / "day13" / name).read_text(encoding="utf-8")
    assert symptoms.page(zh) == text, "run `python day13/symptoms.py`"


def test_whoever_is_named_as_proof_exists():
    for by in {entry["by"] for entry in BOOK if entry["by"]}:
        path, _, test = by.partition("::")
        assert (ROOT / path).exists(), by
        if path.endswith(".json"):  # a recorded run, on hardware that tests do not have
            said = (ROOT / path).read_text()
            assert all(symptoms.says(entry["message"], said) for entry in BOOK if entry["by"] == by), by
        if test:
            names = {n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)}
            assert test in names, by


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """What labs/reproduce.py heard, in one process group."""
    run_dir = tmp_path_factory.mktemp("reproduce")
    run_ranks("day13/labs/reproduce.py", "--run_dir", run_dir, ranks=2)
    return json.loads((run_dir / "reproduce.json").read_text())["said"]


@pytest.mark.launch
def test_deepspeed_says_what_the_book_says(reproduced):
    claimed = {entry["id"] for entry in BOOK if entry["by"] == "day13/labs/reproduce.py"}
    assert {name for name, one in reproduced.items() if one["in_the_book"]} == claimed == set(reproduced)
    assert len(claimed) >= 25
    for entry in BOOK:
        if entry["id"] in claimed:  # found again from what was really said, among the first two
            found = [one["id"] for _, one in symptoms.search(reproduced[entry["id"]]["said"], count=2)]
            assert entry["id"] in found, (entry["id"], found)


def test_search_finds_other_words_and_says_when_it_does_not(capsys, monkeypatch):
    score, entry = symptoms.search("mat1 and mat2 must have the same dtype, but got Half and Float")[0]
    assert entry["id"] == "bf16_inputs" and 0.3 < score < 1
    assert (
        symptoms.search("ValueError: expected module 3, but got module 7. Invalidate trace cache")[0][1]["id"]
        == "zero3_trace"
    )
    lab = run_warm("day13/labs/symptom.py", "RuntimeError: 'weight' must be 2-D", check=False)
    assert lab.code == 0 and "cause: under ZeRO-3 a module is used outside of an engine" in lab.stdout
    lost = run_warm("day13/labs/symptom.py", "the cat sat", check=False)
    assert error_line(lost).startswith("not in the book")


# --- the flight recorder ----------------------------------------------------------------------------------------------


def calls(*lines: int, op: str = "gloo:all_reduce", sizes: str = "[[4]]", start: int = 1) -> dict[int, flight.Call]:
    """Calls from these lines of a file, numbered from `start`."""
    return {at: flight.Call(op, sizes, (("a.py", line, "f"),)) for at, line in enumerate(lines, start=start)}


@pytest.mark.parametrize(
    ("ranks", "guilty"),
    [
        ({0: calls(10, 20, 30), 1: calls(10, 20, 30)}, []),
        ({0: calls(10, 20), 1: calls(10)}, [(0, 20)]),  # an extra one at the end
        ({0: calls(10, 99, 20), 1: calls(10, 20)}, [(0, 99)]),  # met another of the same shape: seen only later
        ({0: calls(10, 20, 10, 20, 10), 1: calls(10, 20, 99, 10, 20, 10)}, [(1, 99)]),  # in a loop
        ({0: calls(10, 20), 1: calls(10, 20), 2: calls(10, 99, 20)}, [(2, 99)]),
        ({0: calls(20, 30, start=2), 1: calls(10, 20, 99, 30)}, [(1, 99)]),  # rank 0's buffer has lost the first
    ],
)
def test_the_stray_call_is_named(ranks, guilty):
    assert [(rank, call.frames[0][1]) for rank, call in flight.part(ranks)] == guilty


def test_a_call_with_two_shapes_names_both_ranks():
    one, other = calls(10), calls(10, sizes="[[8]]")
    assert [rank for rank, _ in flight.part({0: one, 1: other})] == [0, 1]


def test_where_lines_differ_and_calls_do_not_nobody_is_named():
    """A broadcast that source and receivers write in two branches is no fault."""
    assert flight.part({0: calls(10, 11, 20), 1: calls(10, 12, 20)}) == []


def test_dumps_are_read_and_a_folder_without_gets_one_sentence(tmp_path):
    frames = [{"filename": "/x/site-packages/torch/c10d.py", "line": 1, "name": "all_reduce"}]
    frames += [{"filename": str(ROOT / "mine.py"), "line": 7, "name": "step"}]
    entry = {"process_group": ("0", "default_pg"), "profiling_name": "gloo:all_reduce", "input_sizes": [[4]]}
    entries = [entry | {"collective_seq_id": number, "frames": frames} for number in (1, 2)]
    (tmp_path / "rank_0").write_bytes(pickle.dumps({"entries": entries}))
    assert "one rank alone left a dump" in flight.verdict(tmp_path)
    (tmp_path / "rank_1").write_bytes(pickle.dumps({"entries": entries[:1]}))
    assert (
        flight.verdict(tmp_path) == "flight recorder: rank 0 alone called gloo:all_reduce [[4]] at mine.py:7 in step()"
    )
    run = run_warm("day13/flight.py", tmp_path / "nosuch", check=False)
    assert "has no rank_0, rank_1" in error_line(run)


# --- the six faults ---------------------------------------------------------------------------------------------------


def patient(name: str, run_dir, *flags: object, **env: str):
    """The patient with the fault `name`; (run, seconds)."""
    start = time.monotonic()
    fault = ["--fault", ORDER.index(name) + 1, "--run_dir", run_dir, *SMALL]
    run = run_ranks("day13/labs/patient.py", *fault, *flags, ranks=2, check=False, timeout=120, **env)
    return run, time.monotonic() - start


def line_number(text: str) -> int:
    lines = (ROOT / "day13/labs/patient.py").read_text().splitlines()
    return next(at for at, line in enumerate(lines, start=1) if line.strip().startswith(text))


ANSWERS = [getattr(solution, f"fault_{number}")() for number in range(1, NUM_FAULTS + 1)]
ANSWER = dict(zip(ORDER, ANSWERS, strict=True))


def place(name: str) -> str:
    return f"day13/labs/patient.py:{line_number(ANSWER[name].line)}"


def test_the_answers_are_those_that_are_dealt():
    for number, answer in enumerate(ANSWERS, start=1):
        assert answer.rank == victim(number) and answer.cause == CAUSES[ORDER[number - 1]]
    assert {answer.rank for answer in ANSWERS} == {0, 1}


@pytest.mark.launch
def test_the_stray_collective_is_named_by_rank_file_and_line(tmp_path):
    run, seconds = patient("extra", tmp_path, "--hang_after", 2)
    assert run.code != 0 and seconds < 60  # the time-out would be 120
    assert (
        f"flight recorder: rank {ANSWER['extra'].rank} alone called gloo:all_reduce [[]] at {place('extra')}"
        in run.stdout
    )
    assert run.stdout.count("flight recorder:") == 1  # by one rank
    again = run_warm("day13/flight.py", tmp_path / "flight")  # the dumps tell the same afterwards
    assert place("extra") in again.stdout
    theirs = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", tmp_path / "flight", "-p", "rank_"]
    assert "KeyError: ('0', 0)" in run_command(*theirs, check=False).stderr  # when not: say so in the notes


@pytest.mark.launch
def test_a_rank_that_waits_elsewhere_is_named_by_its_stack(tmp_path):
    run, seconds = patient("token", tmp_path, "--hang_after", 2)
    rank = ANSWER["token"].rank
    assert run.code != 0 and seconds < 60
    assert re.search(
        rf"^rank {rank}: no step for 2 s, stands at {place('token')} in wait_for_token\(\)", run.stdout, re.M
    )
    assert re.search(rf"^rank {1 - rank}: .* in train_step\(\): engine.backward\(loss\)", run.stdout, re.M)


@pytest.mark.launch
def test_a_nan_loss_is_named_by_the_hooks(tmp_path):
    run, _ = patient("masked", tmp_path, "--modules", "--steps", 4)
    found = re.findall(r"^rank (\d), step (\d): (.*)$", run.stdout, re.M)
    assert found[0][:2] == (str(ANSWER["masked"].rank), str(FIRST_STEP))
    assert "forward of the model itself (GPT2LMHeadModel)" in found[0][2] and "1 nan of 1" in found[0][2]


@pytest.mark.launch
def test_a_nan_gradient_is_named_by_the_hooks_and_its_line_by_anomaly_mode(tmp_path):
    run, _ = patient("distance", tmp_path, "--modules", "--steps", 4)
    found = re.findall(r"^rank (\d), step (\d): (.*)$", run.stdout, re.M)
    assert found[0][:2] == (str(ANSWER["distance"].rank), str(FIRST_STEP))
    assert "backward" in found[0][2] and "nan" in found[0][2]
    assert not re.search(r"loss nan", run.stdout)  # nothing to see in the loss
    run, _ = patient("distance", tmp_path, "--anomaly", "--hang_after", 2)
    assert "returned nan values in its 0th output" in run.stdout
    assert f'labs/patient.py", line {line_number(ANSWER["distance"].line)}, in penalty' in run.stderr


@pytest.mark.launch
def test_a_rank_with_another_learning_rate_is_named_by_comparing(tmp_path):
    run, _ = patient("plateau", tmp_path, "--compare_every", 1, "--steps", 4)
    found = re.findall(r"^step (\d): (.*)$", run.stdout, re.M)
    assert found[0][0] == str(FIRST_STEP) and len(found) == 2  # nothing before, one line in each step after
    assert "learning rate differs: rank 0 [0.0002" in found[0][1] and "rank 1 [0.0001" in found[0][1]


@pytest.mark.launch
def test_the_ladder_on_gloo(tmp_path):
    """Time-out, and TORCH_DISTRIBUTED_DEBUG=DETAIL, say what the notes say."""
    run, seconds = patient("token", tmp_path, "--hang_after", 0, "--timeout", 4)  # one rank alone is in a collective
    assert "Timed out waiting 4000ms for recv operation to complete" in run.stderr + run.stdout and seconds < 60
    run, _ = patient("short", tmp_path, "--hang_after", 0, "--timeout", 4)
    assert run.code != 0 and "Received data size doesn't match expected size" in run.stderr
    assert "Connection reset by peer" in run.stderr or "Connection closed by peer" in run.stderr
    run, _ = patient("short", tmp_path, "--timeout", 5, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert "Detected mismatch between collectives on ranks" in run.stdout
    shapes = re.search(
        r"Rank (\d) is running.*?TensorShape=\[(\d), 128\].*?but Rank (\d).*?TensorShape=\[(\d), 128\]", run.stdout
    )
    assert {shapes[1]: shapes[2], shapes[3]: shapes[4]}[str(ANSWER["short"].rank)] == "1"
    assert place("short") in run.stdout


# Case of labs/hang.py -> what stands in the line that the recorder names.
GUILTY = {
    "uneven_train": "engine.backward(",
    "uneven_eval": "engine(torch.randn",
    "layer_left_out": "engine.backward(",
    "save_on_rank_0": "engine.save_checkpoint(",
    "evaluate_on_rank_0": "engine(torch.randn",
}


@pytest.mark.launch
def test_hangs_name_the_line(tmp_path, monkeypatch):
    """Each case on warm ranks; then the lab itself, which would start them anew, makes its table of what they said."""
    said = {}
    for case in GUILTY:
        flags = ["--cases", case, "--hang_after", 2, "--run_dir", tmp_path]
        run = run_ranks("day13/labs/hang.py", *flags, ranks=2, check=False, timeout=60)
        said[case] = subprocess.CompletedProcess([], run.code, run.stdout, run.stderr)
    monkeypatch.setattr("bench.world.run_ranks", lambda ranks, script, flag, case, *rest: [said[case]])
    monkeypatch.setattr(sys, "argv", ["day13/labs/hang.py", "--run_dir", str(tmp_path)])
    monkeypatch.delenv("RANK", raising=False)
    runpy.run_path(str(ROOT / "day13/labs/hang.py"), run_name="__main__")
    rows = {row["case"]: row for row in json.loads((tmp_path / "hang.json").read_text())["table"]}
    lines = (ROOT / "day13/labs/hang.py").read_text().splitlines()
    for case, guilty in GUILTY.items():
        row = rows[case]
        named = re.findall(r"hang\.py:(\d+)", f"{row['recorder']} {row['rank_0']} {row['rank_1']}")
        assert any(guilty in lines[int(line) - 1] for line in named), (case, said[case].stdout)
        assert row["rank_0"] != "-" or row["rank_1"] != "-"


@pytest.mark.launch
def test_a_killed_rank_ends_with_247(tmp_path):
    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    run = run_day(tmp_path / "killed.py", ranks=1, check=False)
    assert run.code == 247 and "exits with return code = -9" in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"rank": 1 - ANSWERS[0].rank}, "fault 1, the rank is not"),
        ({"line": "engine.step()"}, "fault 1, the line is not 'engine.step()'"),
        ({"cause": ANSWERS[1].cause}, "fault 1, the cause is not"),
        ({"cause": "bad luck"}, "fault 1, 'bad luck' is none of the six causes"),
    ],
)
def test_the_exercise_says_what_is_wrong(answer, sentence):
    wrong = ANSWERS[0]._replace(**answer)
    with pytest.raises(UserError, match=re.escape(f"not yet: {sentence}")):
        exercise.check([lambda: wrong])


def test_no_answer_is_right_for_another_fault():
    for number, name in enumerate(ORDER):
        lines = exercise.guilty_lines(name)
        assert ANSWER[name].line in lines
        assert all(answer.line not in lines for other, answer in enumerate(ANSWERS) if other != number)


# --- signals, sick curves ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """{case: row} of a short run of labs/sick.py."""
    run_dir = tmp_path_factory.mktemp("sick")
    flags = ["--steps", 20, "--fp16_steps", 3, "--micro_batch", 2, "--run_dir", run_dir]
    run_ranks("day13/labs/sick.py", *flags, ranks=2)
    assert (run_dir / "sick.png").stat().st_size > 20_000
    return {row["case"]: row for row in json.loads((run_dir / "sick.json").read_text())["table"]}


# Case -> the signal that must be first, and how many steps after its beginning at the latest.
EARLY = {
    "lr_too_high": ("update/weight ratio high", 4),  # the rate climbs: at its fourth step it is 50 times too high
    "no_warmup": ("update/weight ratio high", 0),
    "bad_batch": ("gradient norm jumps", 0),
    "overflow": ("step skipped", 0),
    "data_repeated": ("batch read before", 0),
    "frozen_layer": ("a weight does not move", 2),  # the schedule's first rate is 0
    "ranks_disagree": ("ranks disagree", 0),
}


@pytest.mark.launch
@pytest.mark.parametrize("case", EARLY)
def test_a_sick_curve_is_seen_by_its_signal_in_time(curves, case):
    row, (signal, patience) = curves[case], EARLY[case]
    assert signal in row["signals"], row["signals"]
    assert row["begins"] <= row["signals"][signal] <= row["begins"] + patience
    assert row["signal_step"] == row["signals"][signal]  # no other one is earlier: no false alarm either
    assert row["loss_apart_step"] is None or row["loss_apart_step"] >= row["signal_step"]


@pytest.mark.launch
def test_a_healthy_curve_has_no_signal_and_learns(curves):
    row = curves["healthy"]
    assert row["signals"] == {} and row["signal"] == "none"
    assert row["rows"][-1]["loss"] < row["rows"][0]["loss"] - 0.5
    assert all(r["skipped"] == 0 and r["grad_norm"] > 0 and r["memory_gib"] > 0 for r in row["rows"])


@pytest.mark.launch
def test_ranks_that_disagree_are_told_apart_by_weights(curves):
    rows = curves["ranks_disagree"]["rows"]
    before, after = rows[curves["ranks_disagree"]["begins"] - 2], rows[-1]
    assert before["disagreements"] == [] and "weights differ" in after["disagreements"][0]


def row(step: int, **changes: object) -> dict:
    healthy = {"step": step, "loss": 5.0, "grad_norm": 1.0, "update_ratio": 0.01, "least_ratio": 0.005, "skipped": 0}
    return healthy | {"lr": 1e-3, "batch_seen_at": None, "disagreements": []} | changes


@pytest.mark.parametrize(
    ("changes", "signal"),
    [
        ({"loss": math.nan}, "loss is not finite"),
        ({"loss": 5.6}, "loss jumps"),
        ({"grad_norm": 4.1}, "gradient norm jumps"),
        ({"update_ratio": 0.2}, "update/weight ratio high"),
        ({"least_ratio": 0.0}, "a weight does not move"),
        ({"skipped": 1}, "step skipped"),
        ({"batch_seen_at": 3}, "batch read before"),
        ({"disagreements": ["weight x"]}, "ranks disagree"),
    ],
)
def test_every_rule_sees_its_signal_and_nothing_else(changes, signal):
    rows = [row(step) for step in range(1, 12)]
    assert first_signals(rows) == {}
    assert first_signals([*rows, row(12, **changes)]) == {signal: 12}


def test_a_loss_curve_is_apart_when_its_mean_is():
    healthy = [row(step) for step in range(1, 21)]
    spike = [row(step, loss=5.0 + (step == 10)) for step in range(1, 21)]  # one step is 0.2 in a mean of five
    drift = [row(step, loss=5.0 + 0.05 * max(0, step - 10)) for step in range(1, 21)]
    assert apart_from(healthy, healthy) is None and apart_from(spike, healthy) is None
    assert apart_from(drift, healthy) in (18, 19)  # 0.3 in binary


def test_ranks_are_compared_by_hash():
    one = {"step": "3", "weight a": "x", "weight b": "y", "batch": "p"}
    assert desync.compare([one, one | {"batch": "q"}]) == []
    assert desync.compare([one, one]) == ["ranks 0, 1 read the same batch"]
    found = desync.compare([one, one | {"weight b": "z", "step": "4", "batch": "q"}])
    assert found == ["step differs: rank 0 3, rank 1 4", "1 of 2 weights differ, the first is b"]
    a = torch.arange(6.0)
    assert desync.fingerprint(a) == desync.fingerprint(a.clone()) != desync.fingerprint(a.reshape(2, 3))
    b = a.clone()
    b[3] = torch.nextafter(b[3], torch.tensor(9.0))  # one bit
    assert desync.fingerprint(a) != desync.fingerprint(b)
    assert desync.fingerprint(torch.tensor(1.0, dtype=torch.bfloat16))


# --- nan --------------------------------------------------------------------------------------------------------------


class Logs(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x)


class Roots(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sqrt((x - x.detach()).square())


@pytest.mark.parametrize(
    ("middle", "first"),
    [
        (Logs(), "forward of 1 (Logs): inputs finite, output has"),
        (Roots(), "backward of 1 (Roots): inputs finite, gradient has"),
        (torch.nn.Identity(), None),
    ],
)
def test_hooks_name_the_module_that_makes_the_nan(middle, first):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), middle, torch.nn.Linear(8, 2))
    with watch_modules(model) as found:
        model(torch.randn(3, 4)).square().mean().backward()
    assert found[0].startswith(first) if first else not found, found
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())  # gone afterwards


def test_hooks_blame_a_weight_that_is_nan():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[1].weight.data[0, 0] = torch.inf
    with watch_modules(model) as found:
        model(torch.ones(1, 4))
    assert found[0].startswith("forward of 1 (Linear): its weight is not finite")


@pytest.mark.launch
def test_what_each_stage_shows_of_a_nan(tmp_path):
    run = run_ranks("day13/labs/nan.py", "--turns", 3, "--run_dir", tmp_path, ranks=2)
    table = json.loads((tmp_path / "nan.json").read_text())
    for one in table["table"]:
        direction, last = (
            ("forward", "transformer.h.1.mlp.act") if one["kind"] == "forward" else ("backward", "mlp.act")
        )
        assert one["hooks"].startswith(f"rank 1: {direction} of transformer.h.1.mlp") and last in one["hooks"]
        assert (one["skipped"] == 0) == (one["stage"] == 0)  # stage 0 does not look
        nan_weights = int(one["weights"].split()[0])
        assert (nan_weights > 0) == (one["stage"] == 0)
        assert one["sick"], one["case"]  # and every stage shows it in the full gradients
    assert "SqrtBackward0" in table["anomaly"] or "PowBackward0" in table["anomaly"], table["anomaly"]
    assert "day13/labs/nan.py, line" in table["anomaly"]
    assert "a step takes plain 1.00, hooks" in run.stdout


# --- between two configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guilty", [["d"], ["a", "h"], ["c", "d", "e"]])
def test_the_smallest_difference_is_found(guilty):
    runs = []

    def fails(part: list) -> bool:
        runs.append(part)
        return set(guilty) <= set(part)

    assert smallest(list("abcdefgh"), fails) == guilty
    assert len(runs) == len({tuple(part) for part in runs}) and len(runs) <= 40


def test_configs_that_agree_or_are_bad_both_get_one_sentence():
    with pytest.raises(UserError, match="with all differences together nothing is wrong"):
        smallest(["a"], lambda part: False)
    with pytest.raises(UserError, match="the good config is bad as well"):
        smallest(["a"], lambda part: True)


def test_differences_and_mixtures_of_configs():
    good = {"a": 1, "zero": {"stage": 1, "size": 5}, "gone": {"x": 1}}
    bad = {"a": 1, "zero": {"stage": 2, "size": 5}, "new": {"y": [1, 2]}}
    assert set(differences(good, bad)) == {"zero.stage", "gone.x", "new.y"}
    half = mixed(good, bad, ["zero.stage", "new.y"])
    assert half == {"a": 1, "zero": {"stage": 2, "size": 5}, "gone": {"x": 1}, "new": {"y": [1, 2]}}
    assert mixed(good, bad, list(differences(good, bad)))["gone"] == {} and good["zero"]["stage"] == 1


@pytest.mark.launch
def test_between_finds_the_key_that_was_left_out(tmp_path):
    run = run_ranks("day13/labs/between.py", "--steps", 4, *SMALL, "--run_dir", tmp_path, ranks=2)
    found = json.loads((tmp_path / "between.json").read_text())
    assert found["guilty"] == ["scheduler.params.warmup_type"] and len(found["different"]) >= 6
    assert len(found["tried"]) <= 12, run.stdout
    innocent = [one["apart"] for one in found["tried"] if "scheduler.params.warmup_type" not in one["paths"]]
    assert max(innocent) < 1e-4  # rounding: 1e-6 was measured
    assert [one["apart"] for one in found["tried"] if not one["paths"]] == [0.0]  # the good config again: deterministic


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("train")
    return run_day("day13/train.py", "--steps", 12, "--log_every", 4, *SMALL, "--run_dir", run_dir), run_dir


@pytest.mark.launch
def test_train_is_watched(trained):
    run, run_dir = trained
    assert "zero stage 1 | 10 matrices watched | monitor True" in run.stdout
    assert run.held_out[12] < run.held_out[0] and "signals: none" in run.stdout
    number = re.search(r"flight recorder: (\d+) collectives in (\d) groups \| ranks agreed 4 of 4 times", run.stdout)
    assert int(number[1]) > 50 and int(number[2]) >= 2
    rows = [
        json.loads(line)["watch"] for line in (run_dir / "metrics.jsonl").read_text().splitlines() if "watch" in line
    ]
    assert [one["step"] for one in rows] == [1, 4, 8, 12]


@pytest.mark.launch
def test_accumulation_gets_one_sentence(tmp_path):
    config = json.loads((ROOT / "day13/ds_config.json").read_text()) | {"gradient_accumulation_steps": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--deepspeed_config", tmp_path / "config.json", *SMALL, "--run_dir", tmp_path]
    assert "one micro-batch a step" in error_line(run_ranks("day13/train.py", *flags, check=False))


@pytest.mark.launch
def test_the_monitor_draws_the_rate_and_what_it_is_handed(trained):
    run, run_dir = trained
    names = {path.stem for path in run_dir.glob("monitor/*/*.csv")}
    own = {name for name in names if name.startswith("Train")}
    assert own == {"Train_Samples_lr"} and "Watch_loss" in names and "Watch_update_ratio" in names
    (loss,) = run_dir.glob("monitor/*/Watch_loss.csv")
    assert len(loss.read_text().splitlines()) == 1 + 4  # a heading and a row for each logged step
    assert f"monitor: {', '.join(sorted(names))}" in run.stdout


@pytest.mark.parametrize("page", ["notes.md", "notes.zh.md"])
def test_the_notes_name_every_signal_every_cause_and_link_the_book(page):
    text = (ROOT / "day13" / page).read_text(encoding="utf-8")
    assert f"(symptoms{'.zh' if 'zh' in page else ''}.md)" in text
    for words in ("TORCH_DISTRIBUTED_DEBUG=DETAIL", "TORCH_FR_BUFFER_SIZE", "py-spy dump --pid", "set_detect_anomaly"):
        assert words in text, words
    for signal in {signal for signal, _ in EARLY.values()}:
        assert signal in text, signal


@pytest.mark.skipif(not shutil.which("py-spy"), reason="py-spy is not installed: pip install py-spy")
def test_py_spy_shows_a_stack():
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    time.sleep(1)
    said = run_command("py-spy", "dump", "--pid", sleeper.pid).stdout
    sleeper.kill()
    assert "MainThread" in said


def test_the_recorded_run_on_nccl_named_the_stray_collective():
    """The line had another number then, perhaps: its text is looked up there."""
    said = "".join(json.loads((ROOT / "day13/results/nccl_read_2xh200.json").read_text())["output"])
    found = re.search(
        r"rank (\d) alone called nccl:all_reduce \[\[\]\] at day13/labs/patient\.py:\d+ in log_step\(\)", said
    )
    assert int(found[1]) == ANSWER["extra"].rank


@pytest.mark.gpu
@pytest.mark.launch
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_stray_collective_is_named_on_nccl(tmp_path):
    run, _ = patient("extra", tmp_path, "--hang_after", 8)
    assert f"rank {ANSWER['extra'].rank} alone called nccl:all_reduce" in run.stdout and place("extra") in run.stdout


def test_an_answer_that_is_altered_fails():
    names = altered_solution("day13", 'Finding(0, "time.sleep(0.05)"', 'Finding(1, "time.sleep(0.05)"')
    with pytest.raises(UserError, match="fault 2, the rank is not 1"):
        names["check"]([names["fault_1"], names["fault_2"]])
