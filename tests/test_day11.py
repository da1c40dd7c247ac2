"""Day 11: each precision trains like fp32 within its band, skipped steps change nothing, the traps are still there."""

import json

import pytest
import torch

from tests.launch import error_line, run_day, run_ranks
from tests.render import ROOT

NUM_PARAMS, RANKS = 937_472, 2
HALF = ["bf16", "fp16", "bf16_states"]  # those with 16-bit weights, at ZeRO-1
# Largest difference of the losses to fp32's over 8 steps of 2 x 128 tokens. Measured: fp16 1.6e-4, autocast to fp16
# 2.0e-4 and to bf16 5.4e-4, bf16 7.2e-4, bf16 states 1.5e-3. Twice that and a bit, for other processors; the traps are
# at 4e-2 and more.
BANDS = {"bf16": 2e-3, "fp16": 5e-4, "autocast_bf16": 2e-3, "autocast_fp16": 5e-4, "bf16_states": 4e-3}
TRAPS = ["bf16_zero0", "fp16_zero0", "autocast_fp16_zero1"]
FIXED = "this trap of deepspeed 0.19.8 seems to be fixed in this version: say so in day11/notes.md, in TRAPS of"
FIXED += " day11/labs/compare.py, in day11/labs/look.py and in config/check.py, and turn this test round"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """{case: row} of compare.py: the precisions, then the traps, in one process group."""
    run_dir = tmp_path_factory.mktemp("compare")
    flags = ["--cases", "fp32", *BANDS, *TRAPS, "--global_batch", 2, "--lr", 1e-3, "--steps", 8, "--run_dir", run_dir]
    run_ranks("day11/labs/compare.py", *flags, ranks=RANKS)
    for plot in ("loss", "difference", "memory", "speed"):
        assert (run_dir / f"{plot}.png").exists()
    return {row["case"]: row for row in json.loads((run_dir / "compare.json").read_text())["table"]}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """{scene: {"steps", "skipped", "updates", "error"}} of overflow.py."""
    run_dir = tmp_path_factory.mktemp("overflow")
    run = run_ranks("day11/labs/overflow.py", "--run_dir", run_dir, ranks=RANKS)
    played = json.loads((run_dir / "overflow.json").read_text())["scenes"]
    assert all(f"\n{scene}: " in run.stdout for scene in played)
    return played


def difference(row: dict, other: dict) -> float:
    return max(abs(a - b) for a, b in zip(row["losses"], other["losses"], strict=True))


@pytest.mark.launch
@pytest.mark.parametrize("case", BANDS)
def test_every_precision_stays_within_its_band_of_fp32(compared, case):
    fp32, row = compared["fp32"], compared[case]
    assert fp32["losses"][-1] < fp32["losses"][0] - 0.5
    assert 0 < difference(row, fp32) <= BANDS[case]  # 0 would be fp32 again
    assert abs(row["held_out_loss"] - fp32["held_out_loss"]) <= BANDS[case]
    assert row["skipped_steps"] == 0


@pytest.mark.launch
def test_what_is_kept_in_which_precision(compared):
    def precisions(case):
        return [compared[case]["precision"][kind] for kind in ("parameters", "gradients", "masters", "moments")]

    assert precisions("fp32") == ["fp32", "fp32", "–", "fp32"]
    assert precisions("bf16") == ["bf16", "bf16", "fp32", "fp32"]
    assert precisions("fp16") == ["fp16", "fp16", "fp32", "fp32"]
    assert precisions("bf16_states") == ["bf16"] * 4
    for case in ("autocast_bf16", "autocast_fp16"):  # only what the forward pass makes has 16 bits
        assert precisions(case) == precisions("fp32")
        assert compared[case]["saved_bytes"][case.removeprefix("autocast_")] > 1e6
        assert compared["fp32"]["saved_bytes"][case.removeprefix("autocast_")] == 0


@pytest.mark.launch
def test_bytes_are_those_of_the_arithmetic(compared):
    for case, row in compared.items():
        for kind, computed in row["computed_bytes"].items():  # Adam's step counters are the rest
            assert row["held_bytes"][kind] == pytest.approx(computed, rel=1e-4, abs=200), (case, kind)
        assert row["held_bytes"]["other"] < 100_000, (case, row["held"]["other"])  # nothing large was overlooked
    a_parameter = {case: row["between_steps_bytes"] / NUM_PARAMS for case, row in compared.items()}
    assert a_parameter["fp32"] == pytest.approx(4 + 8, rel=1e-3)
    assert a_parameter["bf16"] == pytest.approx(2 + 12 / RANKS, rel=1e-3)
    assert a_parameter["bf16_states"] == pytest.approx(2 + 6 / RANKS, rel=1e-3)
    # 16-bit weights: what backward needs has half the size, except the loss and the logits that it upcasts
    saved = {case: sum(compared[case]["saved_bytes"].values()) for case in ("fp32", *HALF)}
    assert all(0.5 < saved[case] / saved["fp32"] < 0.75 for case in HALF)


@pytest.mark.launch
def test_fp16_scales_its_loss(compared):
    scales = {case: row["loss_scale"] for case, row in compared.items()}
    assert scales["fp16"] == scales["autocast_fp16"] == 2.0**16
    assert [scales[case] for case in ("fp32", "bf16", "autocast_bf16", "bf16_states")] == [None] * 4


@pytest.mark.launch
@pytest.mark.parametrize("trap", TRAPS)
def test_trap(compared, trap):
    """bf16 without ZeRO: Adam's count starts at 1. fp16 without ZeRO: gradients are divided by a scale that the loss
    never got. Autocast to fp16 with ZeRO: gradients are clipped before the scale is taken off. Measured: 4e-2 and more.
    """
    assert difference(compared[trap], compared["fp32"]) > 2e-2, f"{trap}: {FIXED}"


AUTOCAST = """
import deepspeed, json, torch
from common.cpu import start_without_compiler
start_without_compiler()
deepspeed.init_distributed()
deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True

def start(stage, **section):
    model = torch.nn.Linear(8, 8)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, **section}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

def overflow(engine):
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 8, device=engine.device)).sum() * float("inf"))
        engine.step()
    scaler = engine.torch_autocast_z0_gradscaler or engine.optimizer.torch_autocast_gradscaler
    return scaler.get_scale()

half = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
found = {"zero0": overflow(start(0, **half)), "zero1": overflow(start(1, **half))}
found["next"] = start(1, fp16={"enabled": True}).optimizer.torch_autocast_gradscaler is not None
print(json.dumps(found))
"""


@pytest.mark.launch
def test_traps_of_autocast_to_float16(tmp_path):
    (tmp_path / "autocast.py").write_text(AUTOCAST)
    found = json.loads(run_ranks(tmp_path / "autocast.py").stdout.splitlines()[-1])
    assert found["zero0"] == 2**16 / 2**3  # as it should be: each overflow halves the scale
    assert found["zero1"] == 2**16, f"autocast to float16 with ZeRO never lowers its scale: {FIXED}"
    assert found["next"], f"engine.destroy() leaves autocast on, and the next fp16 engine scales twice: {FIXED}"


@pytest.mark.launch
def test_a_skipped_step_changes_no_bit(scenes):
    steps = [step for scene in scenes.values() for step in scene["steps"]]
    assert sum(not step["applied"] for step in steps) >= 15
    for step in steps:
        assert step["unchanged"] == (not step["applied"]), step
    for scene in scenes.values():
        assert scene["updates"] == sum(step["applied"] for step in scene["steps"])  # Adam's own count
        assert scene["skipped"] == sum(not step["applied"] for step in scene["steps"])


@pytest.mark.launch
def test_first_scale_too_high_falls_until_the_gradients_fit_and_rises_again(scenes):
    steps = scenes["first scale too high"]["steps"]
    skipped = next(index for index, step in enumerate(steps) if step["applied"])
    assert skipped >= 3
    assert steps[0]["next_scale"] == steps[0]["scale"] == 2**21 and steps[0]["next_hysteresis"] == 1  # used up first
    for before, step in zip(steps, steps[1:skipped], strict=False):
        assert step["next_scale"] == before["next_scale"] / 2
    window = 3  # good steps after the first, which does not count
    assert steps[skipped + window - 1]["next_scale"] == steps[skipped]["scale"]
    assert steps[skipped + window]["next_scale"] == 2 * steps[skipped]["scale"]
    assert steps[skipped + window]["next_hysteresis"] == 2
    assert scenes["cure: a lower first scale"]["skipped"] == 0


@pytest.mark.launch
def test_hysteresis_forgives_overflows(scenes):
    ends = {name: scene["steps"][-1]["next_scale"] for name, scene in scenes.items()}
    assert ends["bad batches, hysteresis 1"] == 2**16 / 2**3  # each of the three bad batches halves
    assert ends["bad batches, hysteresis 2"] == 2**16 / 2**2  # one is forgiven, in all
    assert ends["cure: consecutive_hysteresis"] == 2**16  # each is forgiven, as good steps lie between them
    for name in ("bad batches, hysteresis 1", "bad batches, hysteresis 2", "cure: consecutive_hysteresis"):
        assert [step["step"] for step in scenes[name]["steps"] if not step["applied"]] == [3, 5, 7]


@pytest.mark.launch
def test_the_end_and_its_cure(scenes):
    end = scenes["the end: activations beyond 65504"]
    message = "Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."
    assert end["error"] == message and end["updates"] == 0
    assert [step["next_scale"] for step in end["steps"]] == [4, 2, 1]
    cured = scenes["cure: bf16, same weights"]
    assert cured["skipped"] == 0 and cured["steps"][-1]["loss"] < cured["steps"][0]["loss"]
    hopeless = scenes["no cure: a nan in the weights, bf16"]  # bf16 has no minimum to stop at
    assert hopeless["error"] is None and hopeless["updates"] == 0


@pytest.mark.launch
def test_gradients_vanish_without_a_loss_scale(tmp_path):
    flags = ["--scales", 1, 65536, "--micro_batch", 2, "--steps", 80, "--run_dir", tmp_path]
    run_ranks("day11/labs/underflow.py", *flags, ranks=RANKS)
    unscaled, scaled = json.loads((tmp_path / "underflow.json").read_text())["table"]
    # Measured after 100 steps: 3.7 % of the logits' gradients vanished; the weights' were 0.5 % off, not 0.09 %.
    assert unscaled["logits_zero"] > 0.01 and scaled["logits_zero"] == 0.0
    assert unscaled["weights_zero"] > 2 * scaled["weights_zero"]
    assert unscaled["weights_off"] > 2 * scaled["weights_off"] and scaled["not_finite"] == 0


@pytest.mark.launch
def test_updates_are_lost_without_fp32_masters(tmp_path):
    run_ranks("day11/labs/missing_bits.py", "--steps", 12, "--rates", 1e-3, 1e-5, "--run_dir", tmp_path, ranks=RANKS)
    result = json.loads((tmp_path / "missing_bits.json").read_text())
    assert result["steps"][0] == {"weight": 1.0, "below": 1 - 2**-8, "half_step": 2**-9}
    moved = {(row["rate"], row["masters"]): row for row in result["moved"]}
    # ln_f's weights start as 1.0, and an update of 0.001 is less than half a step: none of them ever moves
    assert moved[1e-3, "bfloat16"]["norm_moved"] == 0.0 and moved[1e-3, "float32"]["norm_moved"] > 0.25
    assert moved[1e-5, "bfloat16"]["moved"] < moved[1e-5, "float32"]["moved"] / 2  # 18 % and 65 % were measured
    fast, slow = result["decay"]
    assert fast["bf16"] < 1e-6 and slow["fp32"] == pytest.approx(0.999**1000, rel=1e-3)
    assert slow["bf16"] == 1.0  # a factor of 0.999 is rounded away: the second moment never decays


@pytest.mark.launch
def test_train_proves_its_precision(tmp_path):
    run = run_day("day11/train.py", "--steps", 6, "--corpus", "moby_dick", "--run_dir", tmp_path)
    proof = "zero stage 1 | DeepSpeedZeroOptimizer | weights torch.bfloat16 | autocast None | loss scale None"
    assert proof in run.stdout and "skipped steps: 0 of 6" in run.stdout
    assert run.held_out[6] < run.held_out[0]


@pytest.mark.launch
def test_look_shows_bytes_beside_the_arithmetic():
    configs = ["day11/ds_config_bf16_states.json", "day11/ds_config_autocast_bf16.json"]
    run = run_ranks("day11/labs/look.py", "--configs", *configs)  # one rank: everything is whole
    half, whole = f"{2 * NUM_PARAMS:,}", f"{4 * NUM_PARAMS:,}"
    for kind, size in (("parameters", half), ("gradients", half), ("masters", half), ("moments", whole)):
        assert f"    {kind:10} {f'bf16 {size}':30} | computed {size}" in run.stdout, run.stdout
    assert f"    parameters {f'fp32 {whole}':30} | computed {whole}" in run.stdout
    assert "ds_config_autocast_bf16.json | zero stage 0" in run.stdout


@pytest.mark.launch
def test_fp16_is_refused_where_deepspeed_finds_no_fp16_arithmetic(tmp_path):
    flags = ["--deepspeed_config", "day11/ds_config_fp16.json", "--steps", 1, "--corpus", "moby_dick"]
    run = run_ranks("day11/train.py", *flags, "--run_dir", tmp_path, check=False)
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported():
        assert run.code == 0 and "weights torch.float16 | autocast None | loss scale 65536.0" in run.stdout
    else:
        assert error_line(run).startswith("Type fp16 is not supported on your device -> use bf16")


@pytest.mark.launch
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bf16": {"enabled": True}}, "fp16 and bf16 are both on"),
        ({"fp16": {"enabled": True, "loss_scale": -2}}, "-2 is out of range (must be >= 0)"),
        ({"zero_optimization": {"stage": 0}}, "they arrive that much too small"),
        ({"fp16": {}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "Adam's step count starts at 1"),
        ({"fp16": {}, "torch_autocast": {"enabled": True, "dtype": "torch.float16"}}, "float16 autocast with ZeRO"),
    ],
    ids=["both", "negative", "zero0", "bf16_zero0", "autocast_zero1"],
)
def test_bad_configs_get_one_sentence(changes, sentence, tmp_path):
    config = json.loads((ROOT / "day11/ds_config_fp16.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = run_ranks("day11/train.py", "--deepspeed_config", tmp_path / "config.json", check=False)
    assert run.code == 1 and sentence in error_line(run)


@pytest.mark.launch
def test_a_batch_that_does_not_divide_gets_one_sentence(tmp_path):
    run = run_ranks("day11/labs/compare.py", "--global_batch", 3, "--run_dir", tmp_path, ranks=RANKS, check=False)
    assert error_line(run) == "--global_batch 3 does not divide by 2 ranks"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: speed and memory of 16 bits are the GPU's subject"
)
def test_on_a_gpu_16_bits_are_faster_and_peak_lower(tmp_path):
    flags = ["--model", "gpt2", "--global_batch", 4, "--steps", 12, "--cases", "fp32", "bf16", "fp16", "autocast_bf16"]
    run_ranks("day11/labs/compare.py", *flags, "--run_dir", tmp_path)
    fp32, *others = json.loads((tmp_path / "compare.json").read_text())["table"]
    for row in others:
        assert row["tokens_per_s"] > 1.3 * fp32["tokens_per_s"], row["case"]  # day 03 measured 2.4 times
        assert row["peak_bytes"] < fp32["peak_bytes"] and difference(row, fp32) < 0.1, row["case"]


@pytest.mark.launch
def test_a_learning_rate_below_zero_gets_one_sentence():
    run = run_ranks("day11/labs/missing_bits.py", "--rates", 1e-3, -1, check=False)
    assert error_line(run) == "--rates -1.0: a learning rate is larger than 0"
