"""Day 01: the environment report, the four collectives, and the plain PyTorch baseline."""

import re
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest

from common.errors import UserError, clear_errors
from tests.launch import SMALL_CORPUS, error_line, run_answer, run_ranks, run_warm
from tests.render import ROOT

NOTES = [(ROOT / f"day01/notes{language}.md").read_text() for language in ("", ".zh")]


@pytest.mark.launch
def test_check_env_reports_versions_devices_and_readiness():
    run = run_warm("day01/labs/check_env.py")
    rows = dict(re.findall(r"^(\S.{20}\S?) +.*?(OK|-|MISSING)\b", run.stdout, re.M))
    names = {name.strip() for name in rows}
    assert {"Python", "torch", "deepspeed", "accelerator", "communication backend", "g++", "ninja"} <= names
    assert "deepspeed              0.19.8" in run.stdout and run.stdout.rstrip().endswith("ready to train")
    assert re.search(r"^communication backend +(gloo|nccl) \(", run.stdout, re.M)


def test_check_env_says_what_to_do_when_deepspeed_is_not_there(monkeypatch, capsys):
    check_env = import_module("day01.labs.check_env")

    def import_all_but_deepspeed(name):
        if name == "deepspeed":
            raise ImportError("No module named deepspeed")
        return import_module(name)

    monkeypatch.setattr(check_env, "importlib", SimpleNamespace(import_module=import_all_but_deepspeed))
    monkeypatch.setattr(sys, "argv", ["check_env.py"])
    with pytest.raises(SystemExit, match="not ready: deepspeed missing"):
        check_env.main()
    shown = capsys.readouterr().out
    assert re.search(r"^deepspeed .*MISSING +pip install -r requirements.txt", shown, re.M)


def test_backends_are_those_that_deepspeed_names():
    accelerators = Path(deepspeed.__file__).parent.glob("accelerator/*_accelerator.py")
    assigned = r"_communication_backend_name = ['\"](\w+)"
    names = {name for path in accelerators for name in re.findall(assigned, path.read_text())}
    assert set(import_module("day01.labs.check_env").BACKENDS) == names


def test_the_notes_name_every_accelerator_of_deepspeed_and_its_backend(monkeypatch):
    from deepspeed.accelerator.real_accelerator import SUPPORTED_ACCELERATOR_LIST

    for page in NOTES:
        (named,) = [part for part in page.split("\n\n") if part.startswith(("**Other accelerators.", "**其他加速卡。"))]
        assert set(SUPPORTED_ACCELERATOR_LIST) | set(import_module("day01.labs.check_env").BACKENDS) - {"ccl"} <= set(
            re.findall(r"`(\w+)`", named)
        )
    monkeypatch.setenv("DS_ACCELERATOR", "npu")
    monkeypatch.setattr("deepspeed.accelerator.real_accelerator.ds_accelerator", None)
    with pytest.raises(ValueError, match="NPU_Accelerator requires torch_npu"):
        deepspeed.accelerator.get_accelerator()


def test_a_mistyped_hostfile_only_warns_and_the_notes_say_so(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(tmp_path / "nosuch")) is None  # and the launcher goes on with this machine alone
    rows = [line for page in NOTES for line in page.splitlines() if "Unable to find hostfile" in line]
    assert len(rows) == 2 and all("`--hostfile`" in row for row in rows)


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_do_what_the_notes_say(ranks):
    out = run_ranks("day01/labs/hello_distributed.py", "--numel", 2 * ranks, ranks=ranks).stdout
    table = r"^(every rank|broadcast|all-reduce|reduce-scatter|all-gather)\b.*\n((?:    rank.*\n)+)"
    shown = {title: re.findall(r"rank \d+: \[(.*)\]", body) for title, body in re.findall(table, out, re.M)}
    rows = {title: [[int(v) for v in row.split(", ")] for row in lines] for title, lines in shown.items()}
    start = rows["every rank"]
    total = [sum(column) for column in zip(*start, strict=True)]
    assert start == [[10 * (rank + 1) + i for i in range(2 * ranks)] for rank in range(ranks)]
    assert rows["broadcast"] == [start[0]] * ranks
    assert rows["all-reduce"] == [total] * ranks == rows["all-gather"]
    assert rows["reduce-scatter"] == [total[2 * rank : 2 * rank + 2] for rank in range(ranks)]
    size = 4 * 2 * ranks
    assert f"2S(N-1)/N = {2 * size * (ranks - 1) / ranks:.0f} bytes" in out
    assert f"rank {ranks - 1} of {ranks} | local rank {ranks - 1} | cpu | gloo" in out
    assert "(ZeRO-2" not in out  # stages 1 and 2 gather weights, and average by all-reduce: day 06 counts it


@pytest.mark.launch
def test_hello_refuses_a_size_that_cannot_be_cut():
    run = run_ranks("day01/labs/hello_distributed.py", "--numel", 5, ranks=2, check=False)
    assert run.code != 0 and "--numel 5 cannot be cut into 2 equal parts" in error_line(run)


@pytest.mark.launch
def test_plain_training_lowers_the_held_out_loss(tmp_path):
    flags = ["--steps", 20, "--corpus", SMALL_CORPUS, "--log_every", 10, "--run_dir", tmp_path]
    run = run_warm("day01/train.py", *flags)
    assert run.held_out[0] == pytest.approx(8.34, abs=0.05)  # ln 4096 = 8.32: every token equally likely
    assert run.held_out[20] < run.held_out[0] - 1
    assert "parameters on cpu | batch 16" in run.stdout and (tmp_path / "loss.png").exists()
    assert re.search("sample: ['\"]The whale", run.stdout)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", 0], "--steps 0 and --log_every 50: both must be at least 1"),
        (["--global_batch", 0], "got batch_size=0 -> a batch has at least one sequence"),
    ],
)
def test_bad_flags_get_one_sentence(flags, sentence, tmp_path):
    run = run_warm("day01/train.py", "--corpus", SMALL_CORPUS, "--run_dir", tmp_path, *flags, check=False)
    assert run.code == 1 and sentence in error_line(run) and "Traceback" not in run.stderr


def test_a_rank_that_fails_alone_says_so_after_a_while(monkeypatch, capsys):
    waited = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit), clear_errors():
        raise UserError("only here")
    assert capsys.readouterr().err == "error: only here\n" and waited == [5]  # local rank 0 has the first word


@pytest.mark.launch
@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("def all_reduce_bytes(n, ranks): return n", "not yet: rank 0 has TODO 1 wrong: got 1000, want 1500"),
        ("def blocks_of_rank(blocks, rank, ranks): pass", "rank 0 has TODO 2 wrong: got None, want [1, 3, 5, 7]"),
        ("def all_reduce(tensor): pass", "rank 0 has TODO 3 wrong: got None, want "),
        ("def all_reduce(tensor): raise NotImplementedError", "not yet: TODO 3, all_reduce() in line "),
        # right on rank 0 alone
        ("def all_reduce(t): dist.reduce(t, dst=0); return t", "not yet: rank 1 has TODO 3 wrong: got "),
    ],
)
def test_wrong_answers_get_one_sentence(answer, sentence, tmp_path):
    if "NotImplemented" in answer:
        answer = "# TODO 3\ndef all_reduce(tensor):\n    raise NotImplementedError"
    run = run_answer("day01", answer, tmp_path, ranks=2)
    assert run.code != 0 and sentence in error_line(run) and "Traceback" not in run.stderr
