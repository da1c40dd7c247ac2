"""Day 08: three ways to the same data parallelism; what an all-reduce costs; from which batch on it hides."""

import json
import re
import runpy

import pytest

from bench.link import why_no_link
from common.errors import UserError
from day08.cost import MIB, Cost, fit, rate_bytes_per_s
from tests.launch import SMALL_CORPUS, error_line, measure_again, run_answer, run_day, run_plain, run_ranks
from tests.render import ROOT

CORPUS = ("--corpus", SMALL_CORPUS)
PARAMS = 937_472  # of the preset tiny
RESULTS = ROOT / "day08/results"
MISSING = why_no_link()
needs_link = pytest.mark.skipif(bool(MISSING), reason=str(MISSING))


def proof(run) -> tuple[str, int, int, int]:
    """(way, messages, of them within backward, elements) of the proof line."""
    found = re.search(
        r"^way (\w+) \| (\d+) messages, (\d+) of them while backward ran \| ([\d,]+) elements", run.stdout, re.M
    )
    return found[1], int(found[2]), int(found[3]), int(found[4].replace(",", ""))


@pytest.mark.launch
def test_three_ways_same_numbers_different_moments(tmp_path):
    flags = ("--steps", 4, "--log_every", 1, *CORPUS, "--run_dir")
    deepspeed = run_day("day08/train.py", *flags, tmp_path / "deepspeed")
    ddp = run_ranks("day08/train.py", "--way", "ddp", *flags, tmp_path / "ddp", ranks=2)
    hand = run_ranks("day08/train.py", "--way", "hand", *flags, tmp_path / "hand", ranks=2)
    assert proof(deepspeed) == ("deepspeed", 1, 0, PARAMS)
    assert proof(hand) == ("hand", 28, 0, PARAMS)
    way, messages, early, elements = proof(ddp)
    assert (way, elements) == ("ddp", PARAMS) and messages > 1 and early > 0  # without hooks: none
    for run in (ddp, hand):  # up to 0 was measured on two ranks: a sum of two, halved before or after
        assert run.losses == pytest.approx(deepspeed.losses, abs=2e-6) and len(run.losses) == 4
    for run in (deepspeed, ddp, hand):  # each rank began with weights of its own
        assert "largest difference of a weight between two ranks: 0.0\n" in run.stdout


def test_fit_finds_what_was_put_in():
    true = Cost(alpha_s=1e-3, bytes_per_s=12.5e6)
    seconds = {size: true.all_reduce_s(size, ranks=4) for size in (4096, MIB, 2 * MIB, 8 * MIB)}
    found = fit(seconds, ranks=4)
    assert found.bytes_per_s == pytest.approx(true.bytes_per_s)
    assert found.alpha_s == pytest.approx(true.alpha_s, rel=0.5)  # the smallest message has its bytes, too
    with pytest.raises(UserError, match="larger messages were not slower"):
        fit({4096: 1.0, MIB: 1.0, 2 * MIB: 1.0}, ranks=2)
    with pytest.raises(UserError, match="needs two of each"):
        fit(seconds, ranks=1)


def test_the_knee_is_where_backward_and_all_reduce_meet_whatever_the_size():
    cost, flops_per_s = Cost(0.0, 25e6), 3e10
    assert cost.knee_tokens(flops_per_s, ranks=2) == pytest.approx(flops_per_s / 25e6)  # C/W
    for ranks in (2, 8):
        tokens = cost.knee_tokens(flops_per_s, ranks)
        for num_params in (1e6, 1e9):
            backward_s = 4 * num_params * tokens / flops_per_s
            assert cost.all_reduce_s(4 * num_params, ranks) == pytest.approx(backward_s)


def test_a_rate_is_read_as_tc_reads_it():
    assert rate_bytes_per_s("100mbit") == 12.5e6 and rate_bytes_per_s("1gbit") == 125e6
    with pytest.raises(UserError, match="rate '100MB': write it as tc does"):
        rate_bytes_per_s("100MB")


@pytest.mark.launch
def test_what_must_be_equal_and_what_must_differ(tmp_path):
    run_ranks("day08/labs/break_it.py", "--steps", 6, *CORPUS, "--run_dir", tmp_path, ranks=2)
    rows = {row["case"]: row for row in json.loads((tmp_path / "break_it.json").read_text())["table"]}
    drift = {"weights not broadcast", "gradients not averaged", "rank 0 has twice the lr"}
    assert {case for case, row in rows.items() if row["apart"] > 0} == drift
    assert {case for case, row in rows.items() if row["sequences"] == 8} == {"same data everywhere"}
    assert rows["right"]["sequences"] == 16
    assert rows["summed, SGD"]["update"] == pytest.approx(2, rel=1e-3)  # the sum over two ranks: twice the lr
    assert rows["summed, AdamW"]["update"] == pytest.approx(1, rel=1e-2)  # divides by the gradient's own size
    assert rows["summed, AdamW"]["held_out_loss"] == pytest.approx(rows["right"]["held_out_loss"], abs=0.01)


@pytest.mark.launch
def test_the_end_of_an_epoch_with_data_that_does_not_divide(tmp_path):
    run_ranks("day08/labs/uneven.py", "--patience", 1, "--run_dir", tmp_path, ranks=2)
    rows = json.loads((tmp_path / "uneven.json").read_text())["table"]
    found = {row["case"]: (row["batches"], row["twice"], row["left_out"], row["ended"]) for row in rows}
    assert found == {  # 17 sequences, two in a batch
        "sampler": ("5 5", 1, 0, "complete"),
        "drop_last": ("4 4", 0, 1, "complete"),
        "Join": ("5 4", 0, 0, "complete"),
        "as it comes": ("5 4", 0, 0, "timed out"),
    }


@needs_link
@pytest.mark.launch
@pytest.mark.serial
@measure_again
def test_the_fitted_bandwidth_is_the_links(tmp_path):
    """The bar: within 10 % at 100 Mbit and 1 Gbit; and what the ring sends crosses the wire, headers aside."""
    run_plain("day08/labs/fit.py", "--sizes_mib", 1, 2, 4, "--repeats", 3, "--run_dir", tmp_path)
    slow, fast = json.loads((tmp_path / "fit.json").read_text())["table"]
    for row in (slow, fast):
        assert row["share"] == pytest.approx(1, abs=0.1), row  # 0.96 and 0.95 were measured
        assert row["wire"] == pytest.approx(1, abs=0.02), row  # 1.002 was


@pytest.mark.launch
@pytest.mark.serial
@measure_again
def test_ddp_and_the_solution_overlap_and_stage_0_does_not(tmp_path):
    flags = ("--model", "tiny", "--tokens", 512, "--turns", 5, "--ways", "ddp", "zero0", *CORPUS)
    run = run_ranks("day08/labs/overlap.py", *flags, "--answer", "solution", "--run_dir", tmp_path, ranks=2)
    assert "solved: " in run.stdout
    rows = {row["case"]: row for row in json.loads((tmp_path / "overlap.json").read_text())["table"]}
    assert rows["zero0"]["hidden"] < 0.1 < rows["ddp"]["hidden"]
    assert rows["yours"]["hidden"] > 0.1
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["zero0"]["loss"], abs=2e-5)
    assert (tmp_path / "overlap.png").exists()


@pytest.mark.launch
def test_steps_are_timed_around_the_predicted_knee(tmp_path):
    flags = ("--models", "tiny", "--ways", "none", "zero0", "--around", 0.5, 1, "--turns", 2, *CORPUS)
    run = run_ranks("day08/labs/steps.py", *flags, "--run_dir", tmp_path, ranks=2)
    result = json.loads((tmp_path / "steps.json").read_text())
    (knee,) = result["knees"]
    assert knee["num_params"] == PARAMS and f"predicted {knee['predicted']:,.0f} tokens" in run.stdout
    assert knee["predicted"] == pytest.approx(knee["flops_per_s"] / result["bytes_per_s"])
    assert all(row["none_ms"] > row["backward_ms"] > 0 for row in result["table"])


def test_the_recorded_knees_are_where_the_model_says():
    """The bar: two model sizes, two link speeds, predicted and measured within a factor of 1.5."""
    rows = json.loads((RESULTS / "knee_2cpu.json").read_text())["table"]
    assert {(row["model"], row["rate"]) for row in rows} == {
        (model, rate) for model in ("tiny", "mini") for rate in ("300mbit", "1gbit")
    }
    for row in rows:
        assert 1 / 1.5 < row["factor"] < 1.5, row
    by_rate = {rate: [row["predicted"] for row in rows if row["rate"] == rate] for rate in ("300mbit", "1gbit")}
    assert min(by_rate["300mbit"]) > 2 * max(by_rate["1gbit"])  # a link 3.3 times as fast


def test_recorded_bytes_on_the_wire_are_the_formulas():
    """Within 2 %: an all-reduce of the gradients; ZeRO-1 and 2 gather the weights as well."""
    rows = {row["case"]: row for row in json.loads((RESULTS / "overlap_2cpu.json").read_text())["table"]}
    want = {"none": 0, "zero1": 1.5, "zero2": 1.5}
    for case, row in rows.items():
        assert row["wire"] == pytest.approx(want.get(case, 1), rel=0.02, abs=1e-3), case
    assert rows["ddp"]["hidden"] > 0.25 > 0.05 > rows["zero0"]["hidden"]
    assert rows["yours"]["of_ddp"] < 1.15


def test_recorded_fits_are_within_ten_percent():
    for row in json.loads((RESULTS / "fit_2cpu.json").read_text())["table"]:
        assert row["share"] == pytest.approx(1, abs=0.1) and row["wire"] == pytest.approx(1, abs=0.02)


def test_two_recorded_gpus_lose_what_the_notes_say():
    """Weak: what is exposed. Strong: less to compute, a shared host, and the same bytes. The link is no cause."""
    rows = {row["case"]: row for row in json.loads((RESULTS / "scaling_2xh200.json").read_text())["table"]}
    alone = rows.pop("1 rank")["ms"]
    for case, row in rows.items():
        assert row["ms"] == pytest.approx(row["alone_ms"] + row["crowded_ms"] + row["exposed_ms"]), case
        speed = alone / row["ms"] if row["kind"] == "weak" else alone / 2 / row["ms"]
        assert row["efficiency"] == pytest.approx(speed, rel=1e-3), case
    assert rows["2 ranks, weak, ddp"]["efficiency"] > 0.95 > 0.85 > rows["2 ranks, strong, ddp"]["efficiency"]
    assert rows["2 ranks, weak, ddp"]["exposed_ms"] < rows["2 ranks, weak, zero2"]["exposed_ms"]
    (knee,) = json.loads((RESULTS / "steps_2xh200.json").read_text())["knees"]
    assert 200 < knee["predicted"] < 400  # tokens per rank: far below every row


def test_an_answer_that_misses_a_target_gets_one_sentence():
    judge = runpy.run_path(str(ROOT / "day08/labs/overlap.py"))["judge"]
    for yours, sentence in (
        ({"wire": 1.05, "of_ddp": 1.0}, "sends 1.05 times the formula's bytes"),
        ({"wire": 1.0, "of_ddp": 1.2}, "takes 1.20 times DDP's time"),
    ):
        with pytest.raises(UserError, match=f"not yet: yours {sentence}"):
            judge({"yours": yours})


WAITS = """
right = DataParallel.ready
def ready(self, parameter):
    right(self, parameter)
    if number := [n for n in self.sent if n == self.bucket_of[parameter]]:
        self.sent[number[0]][1].wait()
DataParallel.ready = ready
"""
LATE = """
right, finish = DataParallel.ready, DataParallel.finish
def late(self):
    for parameter in self.parameters:
        right(self, parameter)
    finish(self)
DataParallel.ready, DataParallel.finish = (lambda self, parameter: None), late
"""


@pytest.mark.launch
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (WAITS, "rank 0 waits within backward"),
        (LATE, "rank 0 sent 0 of 6 buckets before backward was over"),
    ],
)
def test_wrong_answers_get_one_sentence(change, sentence, tmp_path):
    run = run_answer("day08", change, tmp_path, ranks=2)
    assert run.code != 0 and f"not yet: {sentence}" in error_line(run) and "Traceback" not in run.stderr
