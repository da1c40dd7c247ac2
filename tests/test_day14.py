"""Day 14: equals are not told apart, differences are found at the advised repeats, configs are compared fairly."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from common.errors import UserError
from day14.clock import NoisyClock
from day14.designs import DESIGNS, concluded, echo
from day14.stats import interval, judge, paired_ratios, repeats_needed, turn_orders
from tests.house import altered_solution
from tests.launch import SMALL_CORPUS, error_line, run_day, run_ranks
from tests.render import ROOT

SMALL = ("--corpus", SMALL_CORPUS)
RUNS = 100
REAL = 0.11  # jitter


def simulated(turns: int, difference: float, seed: int, jitter: float = 0.03) -> tuple[list[float], list[float]]:
    """Times of "a" and of "b", which is faster by `difference`, by turns in random order on a fresh noisy machine."""
    clock, seconds = NoisyClock(seed, jitter=jitter), {"a": [], "b": []}
    for order in turn_orders("ab", turns, seed):
        for case in order:
            seconds[case].append(clock.step(0.05 / (1 + difference if case == "b" else 1)))
    return seconds["a"], seconds["b"]


def test_equals_are_not_told_apart_and_five_percent_is_found_at_the_advised_repeats():
    pilots = [judge(*simulated(30, 0.0, seed), difference=0.05) for seed in range(RUNS)]
    assert sum(pilot.text.startswith("cannot tell") for pilot in pilots) >= 95
    found = [judge(*simulated(pilot.needed, 0.05, RUNS + seed), 0.05).text for seed, pilot in enumerate(pilots)]
    assert found.count("faster") >= 90 and "slower" not in found
    assert judge(*reversed(simulated(80, 0.05, 0)), 0.05).text == "slower"
    assert np.median([pilot.needed for pilot in pilots]) < 80  # found for want of noise, or by asking for too much?


def test_the_same_holds_on_a_machine_as_noisy_as_the_one_that_aa_recorded():
    """Its spread from step to step, and its echoes: `REAL` jitter makes the simulated machine as bad in both."""
    recorded = json.loads((ROOT / "day14/results/aa_2cpu.json").read_text())["step_s"]
    clock = NoisyClock(0, jitter=REAL)
    times = [clock.step(0.05) for _ in recorded]
    assert all(echo(times, lag) > 0.7 * echo(recorded, lag) for lag in (1, 10))
    spreads = [np.subtract(*np.quantile(np.log(np.divide(s[::2], s[1::2])), [0.75, 0.25])) for s in (times, recorded)]
    assert spreads[0] > 0.9 * spreads[1]
    pilots = [judge(*simulated(40, 0.0, seed, REAL), difference=0.05) for seed in range(RUNS)]
    assert sum(pilot.text.startswith("cannot tell") for pilot in pilots) >= 95
    plans = enumerate(pilots[:50])
    found = [judge(*simulated(pilot.needed, 0.05, RUNS + seed, REAL), 0.05).text for seed, pilot in plans]
    assert found.count("faster") >= 45


@pytest.mark.parametrize(
    ("design", "beat", "least", "most"),  # wrong verdicts among 50
    [
        ("blocks", 0.0, 15, 50),
        ("random, looking", 0.0, 4, 25),
        ("random order", 0.0, 0, 3),
        ("always A first", 0.05, 45, 50),
        ("random order", 0.05, 0, 3),
    ],
)
def test_each_wrong_way_to_measure_shows_its_errors(design, beat, least, most):
    wrong = 0
    for seed in range(50):
        clock = NoisyClock(seed, beat=beat)
        wrong += concluded(DESIGNS[design], lambda _, clock=clock: clock.step(0.05), 30, seed)[1] != "cannot tell"
    assert least <= wrong <= most


def test_turns_are_random_orders_of_all_cases_and_the_same_on_every_rank():
    orders = turn_orders(["a", "b", "c"], 600, seed=3)
    assert orders == turn_orders(["a", "b", "c"], 600, seed=3) != turn_orders(["a", "b", "c"], 600, seed=4)
    counts = Counter(map(tuple, orders))
    assert len(counts) == 6 and min(counts.values()) > 60  # of 100 expected


def test_an_interval_has_the_confidence_it_claims_and_narrows_with_the_square_root():
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(150):
        low, high = interval(draw.standard_t(3, size=40) + 5.0)
        inside += low <= 5.0 <= high
    assert inside >= 0.95 * 150  # 0.99 claimed; of 40 values a bootstrap gives a little less, 0.973 seen
    samples = np.exp(draw.normal(0, 0.05, size=(20, 640)))
    few, many = (np.mean([np.diff(interval(sample[:size])) for sample in samples]) for size in (40, 640))
    assert few / many == pytest.approx(4, rel=0.2)  # 16 times the values; one sample alone may give 2.4


def test_verdicts_say_what_is_missing():
    equal = [1.0 + 0.001 * (turn % 3) for turn in range(20)]
    assert judge(equal, equal, 0.03).text == "cannot tell (less than 3% apart)"
    a, b = simulated(15, 0.0, 5)
    verdict = judge(a, b, difference=0.02)
    assert verdict.text == f"cannot tell (needs {verdict.needed - 15} more)"
    assert verdict.needed == repeats_needed(interval(paired_ratios(a, b)), 15, 0.02)
    alone, one_of_five = (judge(*simulated(40, 0.0, 5), comparisons=number) for number in (1, 5))
    assert one_of_five.low < alone.low < alone.high < one_of_five.high  # each of several gets its share of the error
    with pytest.raises(UserError, match="9 and 9 turns: both need the same number, 10 or more"):
        judge(a[:9], b[:9])


HOOK = """
import time, torch

class Sleeper(torch.nn.Module):  # a micro-batch costs 10 ms, whatever its size: accumulation is slow, for certain
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(16, 1)

    def forward(self, x, y):
        time.sleep(0.01)
        return (self.layer(x) - y).square().mean()

def build():
    draw = torch.Generator().manual_seed(0)
    return Sleeper(), torch.utils.data.TensorDataset(*(torch.randn(64, n, generator=draw) for n in (16, 1)))
"""


@pytest.mark.launch
def test_compare_finds_a_real_difference_on_a_model_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(HOOK)
    configs = [f"day14/ds_config{name}.json" for name in ("", "_micro4", "")]
    flags = [
        "--model",
        f"{tmp_path}/mine.py:build",
        "--turns",
        10,
        "--window",
        1,
        "--warm_up",
        1,
        "--price",
        2,
        "--run_dir",
        tmp_path,
    ]
    run = run_ranks("day14/labs/compare.py", *configs, *flags, ranks=2)
    result = json.loads((tmp_path / "compare.json").read_text())
    first, micro4, again = result["table"]
    assert [row["accumulation"] for row in result["table"]] == [4, 1, 4] and result["batch"] == 8
    assert micro4["verdict"] == "faster" and micro4["low"] > 1.5
    assert re.search(r"^ds_config_micro4 .*\| faster$", run.stdout, re.M)
    assert again["losses_apart"] == 0.0 and len(again["losses"]) == 11  # a turn more than is timed
    assert micro4["losses_apart"] < 1e-5  # another order of additions
    assert all(len(row["step_s"]) == 10 for row in result["table"])
    assert again["verdict"] == judge(first["step_s"], again["step_s"], 0.05, comparisons=2).text
    cost = 2 * 2 * 1e6 / first["tokens_per_s"] / 3600  # ranks x dollars x hours
    assert first["dollars_per_mtoken"] == pytest.approx(cost)
    assert first["flops"] == 3 * 2 * 16 * 4  # forward and twice that backward, a Linear(16, 1), 4 samples a rank
    assert (tmp_path / "compare.png").exists()


@pytest.mark.launch
def test_compare_refuses_unequal_batches_in_one_sentence(tmp_path):
    configs = [f"day14/ds_config{name}.json" for name in ("", "_batch32")]
    run = run_ranks("day14/labs/compare.py", *configs, *SMALL, "--run_dir", tmp_path, ranks=2, check=False)
    assert error_line(run).startswith("global batches differ (ds_config 8, ds_config_batch32 32)")


@pytest.mark.launch
def test_the_heat_map_has_speeds_and_cells_that_do_not_fit(tmp_path):
    flags = ["--configs", "day14/ds_config.json", "--micro_batches", 1, 16, "--passes", 2, "--steps", 1]
    run = run_ranks("day14/labs/heatmap.py", *flags, "--limit_gib", 0.1, *SMALL, "--run_dir", tmp_path)
    result = json.loads((tmp_path / "heatmap.json").read_text())
    small, large = ([row for row in result["table"] if row["micro_batch"] == size] for size in (1, 16))
    assert [row["accumulation"] for row in small] == [16, 16]  # two passes
    assert [row.get("error") for row in large] == ["out of memory"]  # and not tried again
    assert {cell["micro_batch"]: bool(cell["tokens_per_s"]) for cell in result["cells"]} == {1: True, 16: False}
    assert re.search(r"^ds_config +[\d,]+ +OOM$", run.stdout, re.M)
    assert (tmp_path / "heatmap.png").exists()


@pytest.mark.launch
def test_time_to_a_target_may_prefer_the_smaller_batch(tmp_path):
    flags = ["--target_loss", 7.3, "--seeds", 0, "--seq_len", 32, *SMALL, "--run_dir", tmp_path]
    run_ranks("day14/labs/target.py", *flags, ranks=2)
    result = json.loads((tmp_path / "target.json").read_text())
    small, large = sorted(result["table"], key=lambda row: row["batch"])
    for row in (small, large):
        losses = [loss for _, loss in row["curve"]]
        assert row["reached"] and losses[-1] <= 7.3 and all(loss > 7.3 for loss in losses[:-1])
        assert row["tokens"] == row["steps"] * row["batch"] * 32
    assert small["tokens"] < large["tokens"]  # needs fewer tokens, whatever the clock says
    assert {row["config"] for row in result["summary"]} == {"ds_config", "ds_config_batch32"}


@pytest.mark.launch
def test_aa_tries_every_way_on_the_same_times(tmp_path):
    (tmp_path / "mine.py").write_text(HOOK.replace("time.sleep(0.01)", "pass"))
    flags = ["--trials", 3, "--turns", 10, "--model", f"{tmp_path}/mine.py:build", "--run_dir", tmp_path]
    run_ranks("day14/labs/aa.py", *flags)
    result = json.loads((tmp_path / "aa.json").read_text())
    assert [row["case"] for row in result["table"]] == list(DESIGNS) and len(result["step_s"]) == 60
    blocks = result["table"][0]["ratios"]
    assert blocks[0] == pytest.approx(np.median(result["step_s"][:10]) / np.median(result["step_s"][10:20]))
    assert (tmp_path / "aa.png").exists()


@pytest.mark.launch
def test_training_reports_what_runs_are_compared_by(tmp_path):
    flags = ["--steps", 12, "--log_every", 1, "--target_loss", 8.0, "--price", 3, *SMALL, "--run_dir", tmp_path]
    run = run_day("day14/train.py", *flags)
    assert "zero stage 1 | batch 8 = 1 micro x 4 accumulation x 2 ranks" in run.stdout
    said = re.search(r"^speed: (\S+) tok/s \| 99% interval (\S+) to (\S+) \| 10 windows$", run.stdout, re.M)
    speed, low, high = (float(number.replace(",", "")) for number in said.groups())
    assert low <= speed <= high and run.losses[12] < run.losses[1]
    hours, dollars = re.search(
        r"^cost of a million tokens: ([\d.]+) device hours \| ([\d.]+) dollars$", run.stdout, re.M
    ).groups()
    assert float(hours) == pytest.approx(2e6 / speed / 3600, rel=0.01) and float(dollars) == pytest.approx(
        3 * float(hours), rel=0.01
    )
    reached = next(step for step, loss in sorted(run.held_out.items()) if loss <= 8.0)
    assert f"target: held-out loss 8.0 reached after {reached} steps" in run.stdout


def test_hooks_and_steps_that_do_not_do_get_one_sentence(tmp_path):
    from day14.cases import load_workload

    (tmp_path / "mine.py").write_text("def build():\n    return 3\n")
    for hook, sentence in (
        (f"{tmp_path}/none.py:build", "no file"),
        (f"{tmp_path}/mine.py:other", "has no function 'other'"),
        (f"{tmp_path}/mine.py:build", "returned int, not a module"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_workload(hook, "all", None, 0, "cpu")


@pytest.mark.parametrize(
    ("right", "instead", "sentence"),
    [
        ("np.array(baseline_s) / np.array(case_s)", "np.median(baseline_s) / np.array(case_s)", "compare turn by turn"),
        ("[0.005, 0.995]", "[0.05, 0.95]", "times as wide as they should be: is it the middle 99 %?"),
        ("math.log(1 + difference)) ** 2", "math.log(1 + difference))", "find 3 %, 90 have to"),
    ],
)
def test_wrong_answers_get_one_sentence(right, instead, sentence):
    answer = altered_solution("day14", right, instead)
    with pytest.raises(UserError, match=re.escape(sentence)):
        answer["check"](answer["bounds"], answer["verdict"], answer["repeats"])
