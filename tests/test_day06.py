"""Day 06: ZeRO-2 keeps its own slice's gradients, and pays for accumulation in bytes sent."""

import json
import re

import pytest

from tests.launch import SMALL_CORPUS, error_line, run_answer, run_day, run_ranks
from tests.render import ROOT

CORPUS = ("--corpus", SMALL_CORPUS)
ALL_GRADIENTS = 17_094_656  # bytes, fp32, preset mini


def life_of_gradients(run) -> list[list[tuple[int, int]]]:
    """For each printed moment and rank: (bytes of gradients, bytes of the bucket)."""
    moments = re.findall(r"^after .*on each rank: (.*)$", run.stdout, re.M)
    return [
        [tuple(int(count.replace(",", "")) for count in rank.split(" + ")) for rank in moment.split(" | ")]
        for moment in moments
    ]


@pytest.mark.launch
def test_zero2_holds_its_slice_from_the_first_micro_batch_on(tmp_path):
    run = run_day("day06/train.py", "--steps", 2, *CORPUS, "--run_dir", tmp_path)
    assert "zero stage 2 | gradients partitioned True | bucket 500,000 elements" in run.stdout
    *micro_batches, after_step = life_of_gradients(run)
    assert len(micro_batches) == 4
    for ranks in micro_batches:
        for gradients, _ in ranks:  # half, and the one parameter that the cut goes through whole: day 04's plan
            assert gradients == pytest.approx(ALL_GRADIENTS / 2, rel=0.03)
    assert all(gradients < 100 for gradients, _ in after_step)


@pytest.mark.launch
def test_zero1_holds_all_gradients_until_the_last_micro_batch(tmp_path):
    flags = ["--deepspeed_config", "day06/ds_config_zero1.json", "--steps", 2, *CORPUS, "--run_dir", tmp_path]
    run = run_ranks("day06/train.py", *flags, ranks=2)
    assert "zero stage 1 | gradients partitioned False" in run.stdout
    *first_three, last, _ = life_of_gradients(run)
    for ranks in first_three:
        assert all(gradients == pytest.approx(ALL_GRADIENTS, rel=0.001) for gradients, _ in ranks)
        assert all(bucket == 2_000_000 for _, bucket in ranks)
    assert all(gradients == pytest.approx(ALL_GRADIENTS / 2, rel=0.03) for gradients, _ in last)


@pytest.mark.launch
def test_compare_counts_what_the_arithmetic_says(tmp_path):
    run_ranks("day06/labs/compare.py", "--steps", 4, *CORPUS, "--run_dir", tmp_path, ranks=2)
    table = json.loads((tmp_path / "compare.json").read_text())["table"]
    rows = {(row["config"], row["accumulation"]): row for row in table}
    half = ALL_GRADIENTS / 2  # (N - 1)/N of a gradient, the unit in which a ring sends, N = 2
    sent = {key: row["sent_bytes"] / half for key, row in rows.items()}
    assert sent == {
        ("ds_config_zero1", 1): pytest.approx(2 + 1, rel=0.001),  # all-reduce, then all-gather of the weights
        ("ds_config", 1): pytest.approx(2 + 1, rel=0.001),
        ("ds_config_reduce", 1): pytest.approx(1 + 1, rel=0.001),
        ("ds_config_zero1", 4): pytest.approx(2 + 1, rel=0.001),
        ("ds_config", 4): pytest.approx(4 * 2 + 1, rel=0.001),
        ("ds_config_reduce", 4): pytest.approx(4 * 1 + 1, rel=0.001),
    }
    assert rows["ds_config_zero1", 4]["gradient_bytes"] == pytest.approx(ALL_GRADIENTS, rel=0.001)
    assert rows["ds_config", 4]["gradient_bytes"] == pytest.approx(half, rel=0.03)
    for accumulation in (1, 4):
        losses = [row["losses"] for key, row in rows.items() if key[1] == accumulation]
        assert all(other == pytest.approx(losses[0], abs=1e-5) for other in losses)
    assert (tmp_path / "gradient_bytes.png").exists() and (tmp_path / "sent_bytes.png").exists()


def test_pages_give_the_bytes_that_compare_counts():
    """In the units of the test above: data parallelism 2, stages 1 and 2 three, or two with the key."""
    for language, wrong in (("", "stays that of data parallelism"), (".zh", "通信量与数据并行相同")):
        text = (ROOT / f"config/README{language}.md").read_text()
        assert "3Ψ" in text and "use_multi_rank_bucket_allreduce" in text and wrong not in text
        assert "as many bytes as plain data parallelism" not in text
        table = (ROOT / f"day01/notes{language}.md").read_text()
        (gather,) = [row for row in re.findall(r"^\| all-gather.*$", table, re.M) if "S(N" in row]
        assert "ZeRO-1" in gather and "ZeRO-3" in gather
        (scatter,) = re.findall(r"^\| reduce-scatter.*$", table, re.M)
        assert "ZeRO-3" in scatter and "ZeRO-1" not in scatter and "ZeRO-2" not in scatter


@pytest.mark.launch
def test_a_stage_without_gradient_buckets_gets_one_sentence(tmp_path):
    flags = ["--deepspeed_config", "day05/ds_config_zero0.json", *CORPUS, "--run_dir", tmp_path]
    run = run_ranks("day06/train.py", *flags, check=False)
    assert error_line(run) == "zero stage 0 in day05/ds_config_zero0.json: this day needs 1 or 2"


@pytest.mark.launch
def test_steps_too_few_to_time_get_one_sentence(tmp_path):
    run = run_ranks("day06/labs/compare.py", "--steps", 3, "--run_dir", tmp_path, check=False)
    assert error_line(run).startswith("--steps 3: at least 4")


EACH_ALONE = """
flush = GradientSlice.flush
GradientSlice.add = lambda self, offset, gradient: (self.bucket.append((offset, gradient)), flush(self))
"""


@pytest.mark.launch
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("GradientSlice.flush = lambda self: self.bucket.clear()", "rank 0 averaged 0 of 1861 elements"),
        (EACH_ALONE, "rank 0 averaged [2, 118, "),
    ],
)
def test_wrong_answers_get_one_sentence(change, sentence, tmp_path):
    run = run_answer("day06", change, tmp_path, ranks=2)
    assert run.code != 0 and f"not yet: {sentence}" in error_line(run) and "Traceback" not in run.stderr
