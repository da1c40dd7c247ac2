"""Day 03: the JSON decides, the script proves it, and compare.py sets configs side by side."""

import json
import re

import pytest

from tests.launch import free_port, run_plain, run_ranks
from tests.render import ROOT


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """compare.py over three configs, as a reader runs it: (what it printed, compare.json, its folder)."""
    run_dir = tmp_path_factory.mktemp("compare")
    configs = [f"day03/ds_config{name}.json" for name in ("", "_cosine", "_sgd")]
    flags = ["--configs", *configs, "--steps", 30, "--log_every", 5, "--run_dir", run_dir, "--port", free_port()]
    run = run_plain("day03/labs/compare.py", *flags)
    return run, json.loads((run_dir / "compare.json").read_text()), run_dir


@pytest.mark.launch
def test_compare_writes_table_and_plots(compared):
    run, result, run_dir = compared
    assert [row["config"] for row in result["table"]] == [f"ds_config{n}.json" for n in ("", "_cosine", "_sgd")]
    for row in result["table"]:
        assert f"{row['held_out_loss']:8.4f}" in run.stdout
        assert row["held_out_loss"] < 8.3 and row["tokens_per_s"] > 0 and row["peak_gib"] > 0
    assert (run_dir / "loss.png").exists() and (run_dir / "speed.png").exists()


@pytest.mark.launch
def test_adamw_beats_sgd_and_holds_one_state_more(compared):
    adamw, _, sgd = compared[1]["table"]
    assert adamw["held_out_loss"] < sgd["held_out_loss"] - 0.1  # 0.24 was measured after these 30 steps
    # bytes a parameter between steps, fp32: weights 4 + AdamW's two moments 8, or SGD's momentum 4
    num_params = 937_472
    assert adamw["held_gib"] * 2**30 / num_params == pytest.approx(12, rel=0.01)
    assert sgd["held_gib"] * 2**30 / num_params == pytest.approx(8, rel=0.01)


@pytest.mark.launch
def test_schedule_follows_the_json(compared):
    rows = {row["step"]: row["lr"] for row in compared[1]["table"][1]["rows"] if "lr" in row}
    # the rate logged after step s is the one for step s+1; schedules start one step late: see the notes
    assert rows[1] == 0.0
    for step in (5, 10, 15, 20, 25, 30):
        assert rows[step] == pytest.approx(0.002 * (step - 1) / 30, rel=1e-6)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("config", "proof"),
    [
        ("linear", r"zero stage 0 \| AdamW \| schedule WarmupDecayLR \| weights torch.float32 \| autocast None"),
        ("bf16", r"zero stage 1 \| AdamW \| schedule NoneType \| weights torch.bfloat16 \| autocast None"),
        ("autocast", r"zero stage 0 \| AdamW \| schedule NoneType \| weights torch.float32 \| autocast torch.bfloat16"),
    ],
)
def test_engine_proves_what_the_json_asked_for(config, proof, tmp_path):
    flags = ["--deepspeed_config", f"day03/ds_config_{config}.json", "--run_dir", tmp_path]
    run = run_ranks("day03/train.py", "--steps", 3, "--corpus", "moby_dick", "--log_every", 1, *flags, ranks=2)
    assert re.search(proof, run.stdout), run.stdout
    assert run.held_out[3] < run.held_out[0]
    held_gib = float(re.search(r"held between steps: ([\d.]+) GiB", run.stdout)[1])
    # bf16 at ZeRO-1 on 2 ranks: weights 2 + (fp32 weights 4 + two moments 8) / 2 ranks = 8 bytes a parameter
    assert held_gib * 2**30 / 937_472 == pytest.approx(8 if config == "bf16" else 12, rel=0.02)


def test_every_config_is_complete():
    for path in ROOT.glob("day03/*.json"):
        config = json.loads(path.read_text())
        assert {"train_micro_batch_size_per_gpu", "gradient_clipping", "optimizer", "zero_optimization"} <= set(config)


@pytest.mark.launch
def test_compare_refuses_two_configs_of_one_name():
    run = run_plain("day03/labs/compare.py", "--configs", "day02/ds_config.json", "day03/ds_config.json", check=False)
    assert run.code == 1 and "two configs are called ds_config: " in run.stderr and "Traceback" not in run.stderr


@pytest.mark.launch
def test_a_run_shorter_than_log_every_has_a_speed(tmp_path):
    flags = ["--configs", "day03/ds_config.json", "--steps", 2, "--run_dir", tmp_path, "--port", free_port()]
    run_plain("day03/labs/compare.py", *flags)
    assert json.loads((tmp_path / "compare.json").read_text())["table"][0]["tokens_per_s"] > 0


@pytest.mark.launch
def test_compare_names_the_config_that_fails(tmp_path):
    (tmp_path / "bad.json").write_text('{"train_micro_batch_size_per_gpu": 8,')
    run = run_plain("day03/labs/compare.py", "--configs", tmp_path / "bad.json", "--run_dir", tmp_path, check=False)
    assert run.code == 1 and "bad.json failed: " in run.stderr and "not valid JSON" in run.stderr
