"""Day 11: each precision trains like fp32 within its band, skipped steps change nothing, the traps are still there."""

import json
import re

import pytest
import torch

from tests.launch import SMALL_CORPUS, error_line, run_day, run_ranks
from tests.render import ROOT

NUM_PARAMS, RANKS = 937_472, 2
SMALL = ["--corpus", SMALL_CORPUS]
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
    flags = ["--cases", "fp32", *BANDS, *TRAPS, "--global_batch", 2, "--lr", 1e-3, "--steps", 8, *SMALL]
    run_ranks("day11/labs/compare.py", *flags, "--run_dir", run_dir, ranks=RANKS, timeout=900)
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


@pytest.mark.launch
def test_fp16_without_zero_is_slower_and_not_stuck(compared):
    """What day 03's table of pitfalls says of it."""
    fell = {case: row["losses"][0] - row["losses"][-1] for case, row in compared.items()}
    assert 0.05 < fell["fp16_zero0"] < 0.9 * fell["fp16"], fell
    for page, words in (("notes.md", "learns much more slowly"), ("notes.zh.md", "慢得多")):
        rows = re.findall(r'^\|.*`fp16`.*`"stage": 0`.*$', (ROOT / "day03" / page).read_text(), re.M)
        assert len(rows) == 1 and words in rows[0], rows


PROBES = """
import deepspeed, json, torch
from common.cpu import start_without_compiler
from day11.precision import emulate_fp16, forget_autocast
start_without_compiler()
emulate_fp16()
deepspeed.init_distributed()
HALF = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
BF16 = {"bf16": {"enabled": True}}

def start(stage, betas=(0.9, 0.999), **section):
    model = torch.nn.Linear(4, 1, bias=False)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
    params = {"lr": 0.001, "betas": betas, "weight_decay": 0.0, "torch_adam": True}
    config |= section | {"optimizer": {"type": "AdamW", "params": params}}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

def step(engine, factor):
    inputs = torch.ones(1, 4, device=engine.device, dtype=next(engine.parameters()).dtype)
    engine.backward(engine(inputs).sum() * factor)
    engine.step()

def scale_after_three_overflows(engine):
    for _ in range(3):
        step(engine, float("inf"))
    return (engine.torch_autocast_z0_gradscaler or engine.optimizer.torch_autocast_gradscaler).get_scale()

def updates(stage, betas):
    engine, lengths = start(stage, betas, **BF16), []
    for _ in range(20):
        master = engine.basic_optimizer.param_groups[0]["params"][0]  # fp32 at both stages
        before = master.detach().flatten()[0].item()
        step(engine, 1.0)
        lengths.append(before - master.detach().flatten()[0].item())
    return lengths

def lives_through_a_nan(stage, **section):
    engine = start(stage, **section)
    for factor in (1.0, float("nan"), 1.0):
        step(engine, factor)
    with deepspeed.zero.GatheredParameters(engine.module.weight):
        finite = bool(torch.isfinite(engine.module.weight).all())
    forget_autocast()
    return [finite, engine.skipped_steps]

found = {"autocast_zero0": scale_after_three_overflows(start(0, **HALF))}
found["autocast_zero1"] = scale_after_three_overflows(start(1, **HALF))
found["next"] = start(1, fp16={"enabled": True}).optimizer.torch_autocast_gradscaler is not None
forget_autocast()
found["updates"] = [[updates(stage, betas) for stage in (0, 1)] for betas in ((0.9, 0.999), (0.9, 0.95))]
precisions = {"fp32": {}, "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "bf16": BF16}
precisions["fp16"] = {"fp16": {"enabled": True, "initial_scale_power": 8}}
found["nan"] = {name: [lives_through_a_nan(s, **section) for s in range(4)] for name, section in precisions.items()}
try:
    start(0, **BF16, data_types={"grad_accum_dtype": "fp32"})
except NotImplementedError as error:
    found["mix"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """What one weight matrix under DeepSpeed shows of its traps: scales, lengths of updates, what a nan leaves."""
    script = tmp_path_factory.mktemp("probes") / "probes.py"
    script.write_text(PROBES)
    return json.loads(run_ranks(script).stdout.splitlines()[-1])


@pytest.mark.launch
def test_traps_of_autocast_to_float16(probes):
    assert probes["autocast_zero0"] == 2**16 / 2**3  # as it should be: each overflow halves the scale
    assert probes["autocast_zero1"] == 2**16, f"autocast to float16 with ZeRO never lowers its scale: {FIXED}"
    assert probes["next"], f"engine.destroy() leaves autocast on, and the next fp16 engine scales twice: {FIXED}"


@pytest.mark.launch
def test_bf16_without_zero_makes_its_first_steps_too_short(probes):
    """Adam's count starts at 1: its bias correction divides by 1 - beta^(t+1) where t steps have been made."""
    for (beta1, beta2), (zero0, zero1) in zip([(0.9, 0.999), (0.9, 0.95)], probes["updates"], strict=True):
        for t, (ours, right) in enumerate(zip(zero0, zero1, strict=True), start=1):
            first, second = (1 - beta1**t) / (1 - beta1 ** (t + 1)), (1 - beta2**t) / (1 - beta2 ** (t + 1))
            assert ours / right == pytest.approx(first / second**0.5, abs=2e-3), f"step {t}: {FIXED}"
    zero0, zero1 = probes["updates"][0]
    shares = [ours / right for ours, right in zip(zero0, zero1, strict=True)]
    assert [f"{share:.3f}" for share in shares[:3]] == ["0.744", "0.858", "0.910"]
    assert shares[9] == pytest.approx(0.995, abs=1e-3)
    assert all(share == pytest.approx(1, abs=0.012) for share in shares[9:])
    steps = range(10, 1000)  # more than are made here: by the formula
    later = [(1 - 0.9**t) / (1 - 0.9 ** (t + 1)) / ((1 - 0.999**t) / (1 - 0.999 ** (t + 1))) ** 0.5 for t in steps]
    assert 1.0118 < max(later) < 1.012 and min(later) == later[0]
    for day in ("day07", "day11"):  # in one line, the row of the pitfall
        for name in ("notes.md", "notes.zh.md"):
            page = (ROOT / day / name).read_text()
            assert re.search("0.744.*0.858.*0.910", page), f"{day}/{name} does not say how wrong"
    for name, words in (("notes.md", "within 1.2 % of it from then on"), ("notes.zh.md", "此后相差不超过 1.2 %")):
        assert words in (ROOT / "day11" / name).read_text()


@pytest.mark.launch
def test_fp32_sums_need_zero(probes):
    for name in ("notes.md", "notes.zh.md"):
        assert f"`{probes['mix']}`" in (ROOT / "day11" / name).read_text()


@pytest.mark.launch
def test_a_nan_stays_for_ever_without_zero_and_costs_a_step_with_it(probes):
    """[are the weights finite after it, skipped steps] at stages 0 to 3."""
    for precision in ("fp32", "autocast"):
        assert probes["nan"][precision] == [[False, 0]] + [[True, 1]] * 3, precision
    for precision in ("bf16", "fp16"):  # their optimizers check at stage 0 as well
        assert probes["nan"][precision] == [[True, 1]] * 4, precision


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
def test_fp32_sums_are_exact_when_they_are_sent_in_fp32_too(tmp_path):
    flags = ["--stages", 1, "--accumulation", 8, *SMALL, "--run_dir", tmp_path]
    run_ranks("day11/labs/gradients.py", *flags, ranks=RANKS)
    result = json.loads((tmp_path / "gradients.json").read_text())
    plain, sent, added, both = result["table"]
    assert [row["setting"] for row in (sent, added, both)] == ["sent in fp32", "added in fp32", "both in fp32"]
    assert 1e-3 < plain["off"] < 1e-2 and both["off"] < 1e-7  # 4e-3 and 2e-9 were measured with 16
    assert sent["off"] == pytest.approx(plain["off"], rel=0.05)  # twice the bytes, and rounded to bf16 again
    assert added["off"] < 0.9 * plain["off"]
    for wide, narrow in ((sent, plain), (both, added)):
        assert wide["sent_bytes"] == pytest.approx(2 * narrow["sent_bytes"], rel=0.01)
    assert added["optimizer"] == "BF16_Optimizer"
    assert added["held_bytes"] - plain["held_bytes"] == pytest.approx(4 * NUM_PARAMS, rel=0.01)
    dropped, kept = result["keep_in_fp32"]
    assert dropped.startswith("score_bias bfloat16") and kept.startswith("score_bias float32, 256 of 256 values")
    assert all(said.endswith("weight bfloat16") for said in (dropped, kept))  # of parameters none stays


def test_the_table_of_formats():
    """Largest, smallest above 0 (subnormal) and the next after 1, as the pages have them."""
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8 E5M2": "float8_e5m2"}
    names["fp8 E4M3"] = "float8_e4m3fn"
    for page in ("notes.md", "notes.zh.md"):
        text = (ROOT / "day11" / page).read_text()
        for name, dtype in names.items():
            info = torch.finfo(getattr(torch, dtype))
            _, parts, largest, smallest, following = re.search(rf"^\| {name} (\|.*\|)$", text, re.M)[1].split("|")[:5]
            assert float(largest) == pytest.approx(info.max, rel=0.01), name
            assert float(smallest.split("=")[1].replace("−", "-")) == pytest.approx(
                info.smallest_normal * info.eps, rel=0.02
            )
            assert float(following.split("=")[-1]) == pytest.approx(1 + info.eps, abs=5e-5)
            assert sum(map(int, parts.split(","))) == info.bits


@pytest.mark.launch
def test_train_proves_its_precision(tmp_path):
    run = run_day("day11/train.py", "--steps", 6, *SMALL, "--run_dir", tmp_path)
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
    flags = ["--deepspeed_config", "day11/ds_config_fp16.json", "--steps", 1, *SMALL]
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
    run = run_ranks("day11/train.py", "--deepspeed_config", tmp_path / "config.json", *SMALL, check=False)
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
    """On a batch that fills the card: with a few sequences a step is all launches, and as long in 16 bits."""
    sequences = min(32, int(torch.cuda.get_device_properties(0).total_memory / 2.4e9))  # fp32 peaks at 1.9 GB for each
    flags = ["--model", "gpt2", "--global_batch", sequences, "--steps", 8, "--run_dir", tmp_path]
    run_ranks("day11/labs/compare.py", *flags, "--cases", "fp32", "bf16", "fp16", "autocast_bf16")
    fp32, *others = json.loads((tmp_path / "compare.json").read_text())["table"]
    for row in others:
        assert row["tokens_per_s"] > 1.3 * fp32["tokens_per_s"], row["case"]  # day 03 measured 2.4 times
        assert row["peak_bytes"] < fp32["peak_bytes"] and difference(row, fp32) < 0.1, row["case"]


@pytest.mark.launch
def test_a_learning_rate_below_zero_gets_one_sentence():
    run = run_ranks("day11/labs/missing_bits.py", "--rates", 1e-3, -1, check=False)
    assert error_line(run) == "--rates -1.0: a learning rate is larger than 0"


ANSWERS = """
import bench.judge
import torch.distributed as dist
from day11 import solution
from day11.exercise import check, clear_errors

bench.judge.ALARM_S = 8.0

class Fp16Optimizer(solution.Fp16Optimizer):
    def step(self, gradient):
        return super().step(gradient) if dist.get_rank() == 0 else True

with clear_errors():
    check(Fp16Optimizer)
"""


@pytest.mark.launch
def test_the_exercise_names_the_open_todo_and_ends_an_all_reduce_of_one_rank(tmp_path):
    assert error_line(run_ranks("day11/exercise.py", check=False)).startswith("not yet: TODO 1, __init__()")
    (tmp_path / "answers.py").write_text(ANSWERS)
    run = run_ranks(tmp_path / "answers.py", ranks=RANKS, check=False)
    assert error_line(run).startswith("not yet: no end after 8 s. A gather and an all_reduce need all ranks")
