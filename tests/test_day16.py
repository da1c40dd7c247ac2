"""Day 16: the pipeline computes what the whole model computes, and the cut is the best there is."""

import json
import re
import sys
from functools import partial
from importlib import import_module
from itertools import combinations

import pytest
import torch
from deepspeed import checkpointing
from deepspeed.runtime.utils import partition_balanced
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from bench.link import why_no_link
from common.errors import UserError
from day16 import exercise, solution
from day16.gpt2_pipe import CutPipeline, best_parts, head, shape_of
from day16.labs import slow_link
from day16.stage_times import config_to_measure
from tests.launch import SMALL_CORPUS, error_line, measure_again, run_day, run_ranks, run_warm

NO_LINK = why_no_link()
needs_link = pytest.mark.skipif(bool(NO_LINK), reason=str(NO_LINK))
TIED = ["parameters", "sgd, zero 1, clipped"]


def cases(run) -> dict[str, dict]:
    return {row["case"]: row for row in json.loads(run)["table"]}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """{case: row} of verify.py on two stages, all cases."""
    run_dir = tmp_path_factory.mktemp("two")
    run_ranks("day16/labs/verify.py", "--run_dir", run_dir, ranks=2)
    return cases((run_dir / "verify.json").read_text())


def assert_like_the_whole_model(row: dict) -> None:
    """1.4e-6 was measured; a mean over the wrong number of micro-batches, or a lost tied gradient, is 1e-3 and more."""
    assert row["loss_difference"] <= 1e-5 and row["held_out_difference"] <= 1e-5, row
    assert row["losses"][0] > row["losses"][-1] + 1e-3  # the weights moved
    # AdamW turns roundings of gradients near its eps into parts of the learning rate of 1e-3 (1.2e-4 was measured, on
    # data parallel ranks without any stages); SGD magnifies nothing (7.5e-9).
    assert row["weight_difference"] <= (1e-6 if "sgd" in row["case"] else 5e-4), row
    assert row["copies_differ_by"] == 0, row


@pytest.mark.launch
def test_every_cut_trains_like_the_whole_model(two):
    cuts = ("parameters", "uniform", "type:GPT2Block", "balanced", "head alone")
    for case in (*cuts, "one stage", "checkpointed", "sgd"):
        assert_like_the_whole_model(two[case])
    assert (two["uniform"]["parts"], two["head alone"]["parts"]) == ([0, 4, 8], [0, 7, 8])
    assert two["one stage"]["pipelines"] == 2 and two["parameters"]["copies"] == 2
    assert two["checkpointed"]["losses"] == pytest.approx(two["parameters"]["losses"], abs=1e-6)


@pytest.mark.launch
def test_zero_1_trains_like_the_whole_model(two):
    for case in ("zero 1", "sgd, zero 1, clipped"):
        assert_like_the_whole_model(two[case])
        assert two[case]["zero"] == 1


@pytest.mark.launch
def test_without_zero_clipping_sees_the_first_stage_alone(two):
    row = two["sgd, zero 0, clipped"]  # 0.19.8: the first stage's norm, which explains the losses, is not the model's
    assert row["loss_difference"] > 1e-4 and row["first_stage_norm_difference"] <= 1e-5, row


@pytest.mark.launch
def test_an_untied_head_goes_its_own_way(two):
    row = two["untied"]
    assert row["copies_differ_by"] > 1e-3 and row["loss_difference"] > 1e-4, row
    with pytest.raises(AssertionError):
        assert_like_the_whole_model(row)


@pytest.mark.launch
def test_weights_go_in_and_out_to_the_bit_and_know_no_cut(two):
    assert two["parameters"]["round_trip"] is True and two["parameters"]["logits"] == 0
    assert two["uniform"]["read_with_another_cut"] is True


@pytest.mark.launch
@pytest.mark.parametrize(("ranks", "stages"), [(3, 3), (4, 2)])
def test_three_stages_and_two_pipelines_of_two(ranks, stages, tmp_path):
    flags = ["--stages", stages, "--steps", 3, "--run_dir", tmp_path]
    run_ranks("day16/labs/verify.py", "--cases", *TIED, *flags, ranks=ranks)
    rows = cases((tmp_path / "verify.json").read_text())
    for case in TIED:
        assert_like_the_whole_model(rows[case])
        assert rows[case]["pipelines"] == ranks // stages


@pytest.mark.launch
def test_training_then_convert_gives_the_same_held_out_loss(tmp_path):
    flags = ["--corpus", "moby_dick"]  # 64 held-out blocks: an odd number would lose one in micro-batches of 2
    flags += ["--steps", 6, "--log_every", 3, "--run_dir", tmp_path, "--save"]
    flags += ["--partition_method", "balanced", "--checkpoint_interval", 1]
    run = run_day("day16/train.py", *flags, "--deepspeed_config", "day16/ds_config_zero1.json")
    assert run.losses[1] > run.losses[6] + 0.02
    assert re.search(
        r"^rank 0: stage 0 of 2, pipeline 0 \| layers 0 to \d of 6 \| [\d,]+ parameters$", run.stdout, re.M
    )
    assert re.search(
        r"^2 stages x 1 pipelines \| zero 1 \| tied on ranks \[\(0, 1\)\] \| 8 micro-batches", run.stdout, re.M
    )
    assert "checkpoint interval 1 |" in run.stdout
    assert len(re.findall(r"^rank \d: [\d.]+ ms forward and backward a micro-batch$", run.stdout, re.M)) == 2
    out = run_warm("day16/convert.py", tmp_path / "pipeline", tmp_path / "model", "--corpus", "moby_dick").stdout
    assert "5 layer files | 937,472 parameters | held-out loss " in out  # the tied head has no file
    assert float(re.search(r"held-out loss ([\d.]+)", out)[1]) == pytest.approx(run.held_out[6], abs=1e-5)


@pytest.mark.launch
@pytest.mark.serial
@measure_again
def test_the_balanced_cut_is_faster(tmp_path):
    run_ranks("day16/labs/balance.py", "--steps", 4, "--rounds", 2, "--run_dir", tmp_path, ranks=2)
    result = json.loads((tmp_path / "balance.json").read_text())
    theirs, ours = result["table"]  # on two stages of tiny, DeepSpeed's three methods come to the same cut
    assert theirs["cut"] == "uniform = parameters = type:GPT2Block" and ours["cut"] == "balanced"
    assert theirs["slowest_s"] > 1.1 * ours["slowest_s"]  # 1.48 was measured
    assert theirs["slowest_by_fastest"] > 1.2 * ours["slowest_by_fastest"]  # 2.61 and 1.03
    assert len({row["ms"] for row in result["layers"] if ".h." in row["layer"]}) == 1  # equal blocks, their median
    assert (tmp_path / "layers.png").exists() and (tmp_path / "stages.png").exists()


@pytest.mark.launch
@pytest.mark.serial
@measure_again
def test_stages_finds_the_cuts_and_times_on_one_process(two, tmp_path):
    run_warm("day16/labs/stages.py", "--num_layers", 4, "--rounds", 1, "--run_dir", tmp_path)
    result = json.loads((tmp_path / "stages.json").read_text())
    rows = {name: row for row in result["table"] for name in row["cut"].split(" = ")}
    for name in ("uniform", "parameters", "type:GPT2Block"):  # as PipelineModule cuts on two ranks
        assert rows[name]["parts"] == " ".join(map(str, two[name]["parts"])), name
    theirs, ours = (list(map(float, rows[name]["stage_ms"].split())) for name in ("type:GPT2Block", "balanced"))
    assert max(theirs) > max(ours)  # 1.13 times: the head takes as long as three blocks
    for row in rows.values():
        alone, layers = (list(map(float, row[key].split())) for key in ("stage_ms", "layers_ms"))
        assert sum(alone) == pytest.approx(sum(layers), rel=0.5)  # the same layers, in a row and one by one
        step_ms = sum(alone) + 7 * max(alone)
        assert row["tokens_per_s"] == pytest.approx(8 * 2 * 128 / step_ms * 1000, rel=0.01)
    assert (tmp_path / "stages.png").exists()


@needs_link
@pytest.mark.launch
@pytest.mark.serial
@measure_again
def test_a_slow_link_carries_a_pipeline_better_than_data_parallelism(tmp_path):
    """Same model, same global batch, same losses; what is sent is what the notes compute, and decides."""
    flags = ["--rates", "50mbit", "--num_layers", 6, "--global_batch", 8, "--steps", 1, "--run_dir", tmp_path]
    run_warm("day16/labs/slow_link.py", *flags)
    rows = {row["way"]: row for row in json.loads((tmp_path / "slow_link.json").read_text())["table"]}
    assert list(rows) == ["ddp", "zero 1", "pipeline"]
    for row in rows.values():
        assert row["losses"] == pytest.approx(rows["ddp"]["losses"], abs=1e-5) and len(row["losses"]) == 2
        assert row["sent_bytes"] == pytest.approx(row["computed_bytes"], rel=0.03)  # 1.003 was measured
    weights = 4 * (6 * 198_272 + 4096 * 128 + 128 * 128 + 256)  # bytes, the tied matrix once
    assert rows["ddp"]["computed_bytes"] == weights and rows["zero 1"]["computed_bytes"] == 1.5 * weights
    assert rows["pipeline"]["computed_bytes"] == 4 * 128 * (
        8 * 128 + 4096
    )  # activations of all tokens; the tied matrix
    assert rows["pipeline"]["gain"] > 1.2  # 2.4 was measured
    assert (tmp_path / "slow_link.png").exists()


def test_a_batch_that_cannot_be_cut_gets_one_sentence():
    with pytest.raises(UserError, match="--global_batch 6 --micro_batch 2: the batch is not a multiple of"):
        slow_link.refuse_bad_batch(6, 2, ranks=2)


@pytest.mark.launch
def test_the_last_micro_batch_must_be_as_large_as_the_others():
    run = run_ranks("day16/labs/last_batch.py", "--ways", "drop", "repeat", "dynamic", "keep", ranks=2, check=False)
    seen = {way: blocks.split() for way, blocks in re.findall(r"^(\w+) +\| blocks ([\d ]+) \|", run.stdout, re.M)}
    assert all(len(blocks) == 2 for way in ("drop", "repeat") for blocks in seen[way])
    assert seen["repeat"] == seen["repeat"][:3] * 4 and seen["drop"][:3] != seen["drop"][3:6]  # nobody reshuffles
    assert [len(blocks) for blocks in seen["dynamic"]] == [2, 2, 2, 1] * 3
    assert run.code != 0 and "keep" not in seen
    assert "Expected input batch_size (64) to match target batch_size (32)." in run.stderr


def test_no_cut_is_better_than_best_parts():
    """Neither in its slowest stage nor, of the cuts as good as that, in its fastest: looked for among all cuts."""
    for costs, stages in (
        ([1, 4, 2, 1, 1], 3),
        ([3, 5, 2, 3, 4, 1, 2, 2, 1, 1], 4),
        ([0.2, 0.1, 6.4, 6.6, 0.1, 15], 2),
        ([0.5, *[2] * 15, 5], 4),
    ):
        ways = [[0, *cut, len(costs)] for cut in combinations(range(1, len(costs)), stages - 1)]

        def worth(parts, costs=costs):
            sums = [sum(costs[a:b]) for a, b in zip(parts, parts[1:], strict=False)]
            return -max(sums), min(sums)

        assert best_parts(costs, stages) in ways and worth(best_parts(costs, stages)) == max(map(worth, ways))
    gpt2_xl = [0.2, 0.1, *[1] * 48, 0.1, 2.7]
    assert best_parts(gpt2_xl, 4) == [0, 14, 27, 40, 52]  # 12, 13, 13, 10 blocks: 13, 13, 13, 9 are as fast, less even


def test_deepspeeds_own_balance_minimises_something_else():
    costs = [1, 4, 2, 1, 1]
    assert list(partition_balanced(costs, 3)) == [0, 2, 3, 5]  # 5, 2, 2: the slowest takes 5
    assert best_parts(costs, 3) == [0, 1, 2, 5]  # 1, 4, 4


def test_a_checkpointed_group_has_blocks_alone():
    """Groups of `interval` layers are counted from a stage's first layer; what is no block keeps its group."""
    shape = shape_of("tiny", 4096)
    stage = CutPipeline.__new__(CutPipeline)  # without ranks: what decides is in these five
    stage.forward_funcs = [*(GPT2Block(shape, layer_idx=0) for _ in range(3)), torch.nn.LayerNorm(4), partial(head)]
    stage.activation_checkpoint_func, stage.checkpointable_layers = checkpointing.checkpoint, ["GPT2Block"]
    for interval, recomputed in ((1, [True] * 3 + [False] * 2), (2, [True, False, False]), (3, [True, False])):
        stage.activation_checkpoint_interval, stage.is_checkpointable_results_interval = interval, None
        stage._precompute_checkpointable_values()
        assert stage.is_checkpointable_results == recomputed


@pytest.mark.launch
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--stages", 2], "--stages 2 does not divide the 1 ranks; possible here: 1"),
        (["--stages", 1, "--checkpoint_interval", -1], "--checkpoint_interval -1: 1 or more layers"),
        (["--stages", 1, "--partition_method", "parts:0,9"], "parts:0,9: 1 stages take 2 rising numbers, 0 to 6"),
        (["--stages", 1, "--partition_method", "nope"], "Partitioning method nope not implemented -> uniform"),
        (["--stages", 1, "--partition_method", "type:Nope"], "Partitioning 'nope' found no valid layers"),
    ],
)
def test_mistakes_get_one_sentence(flags, sentence):
    run = run_ranks("day16/train.py", *flags, "--corpus", SMALL_CORPUS, check=False)
    assert error_line(run).startswith(sentence)


@pytest.mark.parametrize(
    ("script", "flags", "sentence"),
    [
        ("labs.slow_link", ["--steps", "0"], "--steps 0: at least 1"),
        ("labs.balance", ["--micro_batch", "0"], "--micro_batch 0: a micro-batch has 1 sequence at least"),
        ("labs.balance", ["--steps", "1"], "--steps 1 --rounds 3: 2 steps (the first warms up) and 1 round at least"),
        ("labs.stages", ["--stages", "9"], "6 layers do not fill 9 stages"),
        ("labs.stages", ["--rounds", "0"], "--rounds 0: at least 1"),
        ("convert", ["day16", "runs/day16/x"], "day16 has no layer_XX files: name the folder of the tag"),
    ],
)
def test_bad_flags_get_one_sentence(script, flags, sentence, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"day16/{script}.py", *flags])
    with pytest.raises(UserError) as told:
        import_module(f"day16.{script}").main()
    assert str(told.value).startswith(sentence)


def test_a_config_that_lacks_what_is_read_gets_one_sentence(tmp_path):
    config = tmp_path / "ds_config.json"
    config.write_text('{"train_micro_batch_size_per_gpu": 2, // no optimizer\n}')
    with pytest.raises(UserError, match="has no `optimizer.params`, which this script reads"):
        config_to_measure(config, None)
    config.write_text('{"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}, // no batch\n}')
    assert config_to_measure(config, 4)["train_micro_batch_size_per_gpu"] == 4
    with pytest.raises(UserError, match="has no `train_micro_batch_size_per_gpu`"):
        config_to_measure(config, None)


def without_forward_fn():
    specs = solution.layers()
    specs[2].forward_fn = None
    return specs


@pytest.mark.parametrize(
    ("part", "answer", "sentence"),
    [
        ("cuts", lambda costs, stages: None, "best_parts([1, 4, 2, 1, 1], 3) is (), not the cuts of 3 stages"),
        ("cuts", lambda costs, stages: [0, 2, 3, 5], "the slowest stage takes 5; 4 is possible"),
        ("waiting", lambda seconds, count: 0.5, "TODO 3, waiting([1, 1], 1) is 0.5: return it as a Fraction"),
        ("layers", None, "layers() should be a TiedLayerSpec, a LayerSpec, and a TiedLayerSpec of the same key"),
        ("layers", without_forward_fn(), "TODO 1, layer 3, called as layer(x), for it has no forward_fn, raises"),
    ],
)
def test_the_exercise_says_what_is_wrong(part, answer, sentence):
    with pytest.raises(UserError) as told:
        getattr(exercise, f"check_{part}")(answer)
    assert sentence in str(told.value)
