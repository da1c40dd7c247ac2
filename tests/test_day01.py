"""Day 01: the environment report, the four collectives, and the plain PyTorch baseline."""

import re

import pytest

from tests.launch import error_line, run_day, run_plain, run_ranks


@pytest.mark.launch
def test_check_env_reports_versions_devices_and_readiness():
    run = run_plain("day01/labs/check_env.py")
    rows = dict(re.findall(r"^(\S.{20}\S?) +.*?(OK|-|MISSING)\b", run.stdout, re.M))
    names = {name.strip() for name in rows}
    assert {"Python", "torch", "deepspeed", "accelerator", "communication backend", "g++", "ninja"} <= names
    assert "deepspeed              0.19.8" in run.stdout and run.stdout.rstrip().endswith("ready to train")


@pytest.mark.launch
def test_check_env_says_what_to_do_when_deepspeed_is_not_there(tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise ImportError('No module named deepspeed')")
    run = run_plain("day01/labs/check_env.py", check=False, PYTHONPATH=str(tmp_path))
    assert run.code == 1 and re.search(r"^deepspeed .*MISSING +pip install -r requirements.txt", run.stdout, re.M)
    assert "not ready: deepspeed missing" in run.stderr


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_do_what_the_notes_say(ranks):
    run = run_day if ranks == 2 else run_ranks
    out = run("day01/labs/hello_distributed.py", "--numel", 2 * ranks, ranks=ranks).stdout
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


@pytest.mark.launch
def test_hello_refuses_a_size_that_cannot_be_cut():
    run = run_ranks("day01/labs/hello_distributed.py", "--numel", 5, ranks=2, check=False)
    assert run.code != 0 and "--numel 5 cannot be cut into 2 equal parts" in error_line(run)


@pytest.mark.launch
def test_plain_training_lowers_the_held_out_loss(tmp_path):
    run = run_plain("day01/train.py", "--steps", 40, "--corpus", "moby_dick", "--log_every", 20, "--run_dir", tmp_path)
    assert run.held_out[0] == pytest.approx(8.34, abs=0.05)  # ln 4096 = 8.32: every token equally likely
    assert run.held_out[40] < 7.0
    assert "parameters on cpu | batch 16" in run.stdout and (tmp_path / "loss.png").exists()
    assert re.search("sample: ['\"]The whale", run.stdout)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", 0], "--steps 0 and --log_every 50: both must be at least 1"),
        (["--batch_size", 0], "got batch_size=0 -> a batch has at least one sequence"),
    ],
)
def test_bad_flags_get_one_sentence(flags, sentence, tmp_path):
    run = run_plain("day01/train.py", "--corpus", "moby_dick", "--run_dir", tmp_path, *flags, check=False)
    assert run.code == 1 and sentence in error_line(run) and "Traceback" not in run.stderr
