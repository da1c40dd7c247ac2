"""Day 28: one command from text to an answered request, killed anywhere; what answers cost; the milestones."""

import json
import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.world import command_of, kill_all, process_tree
from common.errors import UserError
from day17.checkpoints import problem_with
from day28 import exercise, solution
from day28.labs import cost
from day28.labs.cost import ceiling, hours_per_million, machines_for
from tests.launch import DEEPSPEED, ROOT, free_port, run_day, run_ranks

NEEDS = "day 28's packages are not here: pip install -r day28/requirements.txt"
for package in ("fastapi", "openai", "limits"):
    pytest.importorskip(package, reason=NEEDS)

SMALL = ["data.sources=[data/moby_dick.jsonl.xz]", "data.workers=1", "train.eval_every=2", "evaluate.items=8"]
SMALL += ["evaluate.max_blocks=4", "evaluate.sample_tokens=4"]


@pytest.mark.launch
def test_one_command_goes_all_the_way_and_does_nothing_twice(tmp_path):
    command = ["day28/train.py", "--run_dir", tmp_path / "run", "--steps", 2, "--log_every", 1, *SMALL]
    first = run_day(*command)
    assert len(first.losses) == 2 and "done already" not in first.stdout
    assert "the logits of the run's model" in first.stdout and "one request was answered, drained" in first.stdout
    assert re.search(r"^chat: 'The whale' -> '.+'$", first.stdout, re.M)
    assert problem_with(tmp_path / "run/export") is None
    again = run_ranks(*command, ranks=2)
    stages = re.findall(r"^(\w+): done already", again.stdout, re.M)
    assert stages == ["prepare", "train", "evaluate", "export", "serve"]
    said = [re.search(r"^chat: .*$", launch.stdout, re.M)[0] for launch in (first, again)]
    assert said[0] == said[1]  # kept, not asked again


@pytest.mark.launch
def test_another_learning_rate_goes_on_from_a_checkpoint_in_a_folder_of_its_own(tmp_path):
    """What the runbook says at LossDiverging; in the old folder it is refused."""
    old, lower = tmp_path / "old", tmp_path / "lower"
    command = ["capstone/train.py", "--config", "capstone/configs/tiny.yaml", *SMALL, "train.log_every=1"]
    command += ["train.steps=4", "checkpoint.save_every=2", "monitor.tensorboard=false"]
    run_ranks(*command, f"run_dir={old}", ranks=2)
    slower = "deepspeed.optimizer.params.lr=1e-3"
    again = ["capstone/train.py", "--config", old / "config.yaml", slower]
    refused = run_ranks(*again, ranks=2, check=False)
    assert refused.code and "with other deepspeed.optimizer: name another run_dir" in refused.stderr
    shutil.copytree(old / "checkpoints/step000002", lower / "checkpoints/step000002")
    run = run_ranks(*again, f"run_dir={lower}", f"data.folder={old / 'data'}", ranks=2)
    assert "resume: step000002" in run.stdout and sorted(run.losses) == [3, 4]
    rates = []
    for folder in (old, lower):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rates.append(next(row["learning_rate"] for row in rows if row["step"] == 4 and "loss" in row))
    assert rates[1] == pytest.approx(rates[0] / 2)  # half of the config's 2e-3, at the same point of the schedule


@pytest.mark.long
def test_killed_while_it_exports_or_serves_the_same_command_ends_with_the_same_model(tmp_path):
    """SIGKILL for the launcher and all below it, at four moments after training; nothing stays behind."""
    folder = tmp_path / "run"
    command = [DEEPSPEED, "--num_accelerators", "2", "--master_port", str(free_port()), "day28/train.py"]
    command += ["--run_dir", str(folder), "--steps", "2", "--log_every", "1", *SMALL]
    run_ranks("day28/train.py", *command[6:], ranks=2)
    for moment in ("partial_export", "export/manifest.json", "a server", "chat.json"):
        for stage in ("export", "chat.json") if moment != "a server" else ("chat.json",):
            path = folder / stage
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)

        def reached(moment=moment, process=process) -> bool:
            if moment == "a server":
                return any("capstone.serve" in command_of(one) for one in process_tree(process.pid))
            return (folder / moment).exists()

        ends = time.monotonic() + 120
        while process.poll() is None and not reached() and time.monotonic() < ends:
            time.sleep(0.01)
        victims = process_tree(process.pid)
        kill_all(victims)
        process.wait()
        psutil.wait_procs(victims, 10)
    again = run_ranks("day28/train.py", *command[6:], ranks=2)
    assert "train: done already" in again.stdout and problem_with(folder / "export") is None
    before, after = (AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in ("model", "export"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(folder.glob("partial_*")) and json.loads((folder / "chat.json").read_text())["answer"]


@pytest.mark.parametrize(
    ("number", "answer", "sentence"),
    [
        (0, lambda key, left, body, _: len(json.loads(body)) * 200 if key == "right" else 401, "with JSONDecodeError"),
        (1, lambda values, share: values[len(values)], "ended with IndexError"),
        (2, lambda *_: None, "ended with TypeError"),
    ],
)
def test_the_exercise_says_what_is_wrong(number, answer, sentence, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["exercise.py"])
    answers = [solution.status_of, solution.percentile, solution.cost_of_a_million]
    answers[number] = answer
    with pytest.raises(UserError, match="^not yet: ") as caught:
        exercise.check(*answers)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("page", ["notes.md", "notes.zh.md"])
def test_the_milestones_of_the_summary_are_tests(page):
    text = (ROOT / "day28" / page).read_text()
    milestones = re.findall(r"`(tests/test_day\d\d\.py)`: (test_\w+)", text)
    assert len(milestones) == 20 and [file for file, _ in milestones] == sorted(file for file, _ in milestones)
    for file, name in milestones:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), f"{file} has no {name}"


def test_costs_follow_the_arithmetic(tmp_path, monkeypatch):
    assert hours_per_million(1000, 1) == pytest.approx(1e6 / 1000 / 3600)
    assert hours_per_million(1000, 0.25) == 4 * hours_per_million(1000, 1)
    shares = (0.5, 10, 0.4, 0), (0.8, 16, 0.9, 0), (0.9, 18, 0.9, 3), (0.95, 19, 3, 0), (1.2, 24, 0.8, 0)
    rows = [dict(zip(("utilisation", "offered_per_s", "p99_s", "errors"), share, strict=True)) for share in shares]
    assert ceiling(rows, 1) is rows[1]  # above it some were refused, or late; beyond 1 the queue never ends
    assert machines_for(33, rows[1]) == 4  # three at 16 a second, and a spare one
    with pytest.raises(UserError, match="--max_p99_s 0.1: the best that was measured is 0.40 s"):
        ceiling(rows, 0.1)
    with pytest.raises(UserError, match="measured at 100 % and more alone"):
        ceiling(rows[-1:], 1)
    (tmp_path / "load.json").write_text(
        json.dumps({"hardware": "x", "capacity_per_s": 20, "tokens_per_answer": 5, "table": rows})
    )
    for path, flags, sentence in (
        (ROOT / "day28/results/train_2cpu.json", [], "train_2cpu.json was not written by day28/labs/load.py"),
        (tmp_path / "load.json", ["--price", "-1"], "--price -1: want more than 0"),
        (tmp_path / "load.json", ["--peak_requests_per_s", "0"], "--peak_requests_per_s 0: want more than 0"),
        (tmp_path / "load.json", ["--utilisation", "0.85"], "--utilisation 0.85: above 0.8, the highest measured one"),
    ):
        monkeypatch.setattr(sys, "argv", ["cost.py", str(path), *flags])
        with pytest.raises(UserError, match=re.escape(sentence)):
            cost.main()
    monkeypatch.setattr(sys, "argv", ["cost.py", str(tmp_path / "load.json"), "--run_dir", str(tmp_path)])
    cost.main()
    found = json.loads((tmp_path / "cost.json").read_text())
    assert (found["ceiling"], found["machines"]) == (0.8, 8)  # seven at 16 a second make 100
    assert found["table"][0]["hours_per_million"] == pytest.approx(hours_per_million(20 * 5, 0.3))
