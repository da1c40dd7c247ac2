"""Day 05: each rank owns 1/N of the optimizer states, as the engine says and as its tensors show."""

import json
import re

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from tests.launch import SMALL_CORPUS, error_line, run_answer, run_day, run_ranks
from tests.render import ROOT

NUM_PARAMS = 937_472
CORPUS = ("--corpus", SMALL_CORPUS)


def held(run_dir) -> tuple[dict, dict]:
    """(bytes held, bytes computed) that train.py wrote down."""
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return row["held_bytes"], row["computed_bytes"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("day05")
    return run_day("day05/train.py", "--steps", 10, *CORPUS, "--run_dir", run_dir), run_dir


@pytest.mark.launch
def test_each_rank_says_which_slice_it_owns(trained):
    run, _ = trained
    assert "zero stage 1 | DeepSpeedZeroOptimizer | weights torch.float32" in run.stdout
    slices = re.findall(r"rank (\d) owns elements ([\d,]+) to ([\d,]+) of 937,472: (\S+) to (\S+)", run.stdout)
    assert [(first, last) for _, first, last, _, _ in slices] == [("0", "468,736"), ("468,736", "937,472")]
    assert slices[0][3] == "transformer.wte.weight" and slices[1][4] == "transformer.ln_f.bias"
    assert run.held_out[10] < run.held_out[0] - 0.5


@pytest.mark.launch
def test_half_of_the_optimizer_states_is_held_on_two_ranks(trained):
    measured, computed = held(trained[1])
    assert measured["optimizer"] == pytest.approx((4 + 8) * NUM_PARAMS / 2, rel=0.001)
    for kind, count in computed.items():
        assert measured[kind] == pytest.approx(count, rel=0.03 if count else 0)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("config", "ranks", "parameters", "optimizer"),
    [("_bf16", 4, 2, 12 / 4), ("_zero0", 2, 4, 8)],  # bytes a parameter of the model
)
def test_bytes_follow_stage_precision_and_ranks(config, ranks, parameters, optimizer, tmp_path):
    flags = ["--deepspeed_config", f"day05/ds_config{config}.json", "--steps", 1, *CORPUS, "--run_dir", tmp_path]
    run_ranks("day05/train.py", *flags, ranks=ranks)
    measured, computed = held(tmp_path)
    assert measured["parameters"] / NUM_PARAMS == pytest.approx(parameters, rel=0.001)
    assert measured["optimizer"] / NUM_PARAMS == pytest.approx(optimizer, rel=0.001)
    assert measured["optimizer"] == pytest.approx(computed["optimizer"], rel=0.03)


@pytest.mark.launch
def test_a_bucket_larger_than_the_model_is_pointed_out(tmp_path):
    assert DeepSpeedZeroConfig().reduce_bucket_size == 500_000_000  # so it is for whoever says nothing
    config = json.loads((ROOT / "day05/ds_config.json").read_text())
    config["zero_optimization"]["reduce_bucket_size"] = 1_000_000
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--deepspeed_config", tmp_path / "config.json", "--steps", 1, *CORPUS, "--run_dir", tmp_path]
    run = run_ranks("day05/train.py", *flags)
    assert "note: a bucket of 1,000,000 elements, larger than the model, is held in full" in run.stdout


@pytest.mark.launch
def test_stage_3_gets_one_sentence(tmp_path):
    flags = ["--deepspeed_config", "day07/ds_config.json", *CORPUS, "--run_dir", tmp_path]
    run = run_ranks("day05/train.py", *flags, check=False)
    assert error_line(run) == "zero stage 3 in day07/ds_config.json: this day takes 0 to 2, stage 3 is day 07"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("def slice_of(psi, rank, ranks): return 0, psi", "TODO 1, slice_of(10, 0, 4) is (0, 10)"),
        ("ShardedAdamW.__init__ = lambda self, weights, lr: None", "TODO 2, self.adamw is no torch.optim.AdamW"),
        ("ShardedAdamW.step = lambda self, gradient: None", "rank 0 has first moments of 0 elements, want 505"),
    ],
)
def test_wrong_answers_get_one_sentence(change, sentence, tmp_path):
    run = run_answer("day05", change, tmp_path, ranks=2)
    assert run.code != 0 and f"not yet: {sentence}" in error_line(run) and "Traceback" not in run.stderr
