"""Day 04: the checker stands before training, the engine proves the settings, tune.py compares them."""

import json
import re
import sys

import pytest

from day04.labs import tune
from tests.launch import SMALL_CORPUS, error_line, launch_warm, run_answer, run_day, run_ranks
from tests.render import ROOT

CORPUS = ("--corpus", str(SMALL_CORPUS))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """train.py with two values changed and recomputation on."""
    changes = ["zero_optimization.stage=2", "gradient_accumulation_steps=2"]
    flags = ["--steps", 4, *CORPUS, "--log_every", 2, "--recompute", "--run_dir", tmp_path_factory.mktemp("day04")]
    return run_day("day04/train.py", "--set", *changes, *flags)


@pytest.mark.launch
def test_engine_shows_what_was_set(trained):
    shown = dict(re.findall(r"^([a-z][\w ]{23}) (.*)$", trained.stdout, re.M))
    shown = {name.strip(): value for name, value in shown.items()}
    assert shown["batch"] == "32 = 8 micro x 2 accumulation x 2 ranks"
    assert shown["zero stage"] == "2" and shown["recompute"] == "True"
    assert shown["optimizer"] == "AdamW in DeepSpeedZeroOptimizer" and shown["schedule"] == "WarmupCosineLR"
    assert shown["buckets"] == "reduce 5,000,000 | allgather 5,000,000 elements"
    assert trained.held_out[4] < trained.held_out[0]


@pytest.mark.launch
def test_training_stops_before_a_config_that_would_train_something_else():
    run = run_ranks("day04/train.py", "--set", "stage=2", check=False)
    assert run.code != 0 and "stage: Unknown key" in run.stdout
    assert "would not train what it says" in error_line(run)


@pytest.mark.launch
def test_any_template_trains(tmp_path):
    flags = ["--steps", 3, *CORPUS, "--log_every", 1, "--run_dir", tmp_path]
    run = run_ranks("day04/train.py", "--deepspeed_config", "config/cpu_fp32.json", *flags, ranks=2)
    assert "batch                    8 = 4 micro x 1 accumulation x 2 ranks" in run.stdout
    assert run.losses[3] < run.losses[1]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--set", "zero_optimization.stage"], "is not of the form section.key=value"),
        (["--set", "gradient_clipping.norm=1"], "gradient_clipping is 1 in the config, not a section with keys"),
        (["--deepspeed_config", "no/such.json"], "no config file 'no/such.json'"),
    ],
)
def test_bad_flags_get_one_sentence(flags, sentence):
    assert sentence in error_line(run_ranks("day04/train.py", *flags, check=False))


@pytest.mark.launch
def test_a_key_written_twice_is_refused_as_deepspeed_does(tmp_path):
    config = tmp_path / "twice.json"
    config.write_text('{"train_micro_batch_size_per_gpu": 8, "train_micro_batch_size_per_gpu": 4}')
    run = run_ranks("day04/train.py", "--deepspeed_config", config, check=False)
    assert "holds the key 'train_micro_batch_size_per_gpu' twice: DeepSpeed refuses that, keep one" in error_line(run)


@pytest.mark.launch
def test_tune_compares_variants_and_keeps_going_after_a_failure(tmp_path, monkeypatch):
    variants = ["zero_optimization.stage=0", "zero_optimization.stage=7"]
    flags = ["--variants", *variants, "--ranks", "2", "--steps", "5", *CORPUS, "--run_dir", str(tmp_path)]
    monkeypatch.setattr(tune, "launch", launch_warm)
    monkeypatch.setattr(sys, "argv", ["tune.py", *flags])
    tune.main()
    unchanged, stage0, stage7 = json.loads((tmp_path / "tune.json").read_text())["table"]
    assert unchanged["relative"] == 1.0 and stage0["relative"] > 0
    # bytes a parameter, fp32, two ranks: ZeRO-0 4 + 8; ZeRO-1 4 + (4 + 8) / 2 = 10, buckets freed between steps
    assert stage0["held_gib"] * 2**30 / 937_472 == pytest.approx(12, rel=0.01)
    assert unchanged["held_gib"] * 2**30 / 937_472 == pytest.approx(10, rel=0.01)
    assert "error" in stage7 and (tmp_path / "speed.png").exists()


@pytest.mark.launch
def test_offload_takes_pytorchs_adam_when_the_json_names_it(tmp_path):
    """No compiled CPUAdam, and no zero_force_ds_cpu_optimizer: that key is about optimizer objects alone."""
    changes = ['zero_optimization.offload_optimizer={"device": "cpu"}']
    flags = ["--steps", 1, *CORPUS, "--run_dir", tmp_path]
    run = run_ranks("day04/train.py", "--set", *changes, *flags)
    assert re.search(r"^optimizer +AdamW in ", run.stdout, re.M)
    assert re.search(r"^offload +optimizer \S*cpu", run.stdout, re.M)
    for language in ("", ".zh"):
        (row,) = re.findall(
            r"^\|.*`zero_optimization.offload_optimizer.device`.*$",
            (ROOT / f"day04/notes{language}.md").read_text(),
            re.M,
        )
        assert "`torch_adam`" in row


@pytest.mark.launch
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ('CONFIGS["zero"] = BASE', "zero: accepted in silence, but the engine has 0 and 2 was meant"),
        ('CONFIGS["section"] = BASE | {"zero_optimization": {"stage": "one"}}', "section: DeepSpeed refuses it ("),
        ('CONFIGS["batch"] = None', "batch: DeepSpeed refuses it ("),
    ],
)
def test_wrong_answers_get_one_sentence(change, sentence, tmp_path):
    run = run_answer("day04", change, tmp_path)
    assert run.code != 0 and f"1 of 5 configs are wrong. {sentence}" in error_line(run)
    assert "Traceback" not in run.stderr
