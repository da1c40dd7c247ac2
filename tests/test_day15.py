"""Day 15: the pipeline trains like the whole model; the schedule, its bubble and its memory are what the notes say."""

import json
import re

import pytest
import torch
from deepspeed.runtime.pipe.schedule import TrainSchedule
from torch.utils.data import DataLoader, DistributedSampler

from common.data import endless_batches, load_corpus, load_tokenizer
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from day15.labs.volume import num_parameters, volume
from day15.schedule import GPipeSchedule, as_text, in_flight, play, read_schedule
from tests.launch import error_line, measure_again, run_day, run_plain, run_ranks

SHAPES = [(p, m) for p in (1, 2, 3, 4, 5, 8) for m in (1, 2, 3, 4, 8, 16)]
STEPS = 10


@pytest.mark.parametrize("backward", [1, 2, 3, 0.5])
@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_the_bubble_is_the_formula_when_messages_are_free(name, backward):
    for p, m in SHAPES:
        ends = play(read_schedule(name, p, m), 1, backward, send=0)
        assert 1 - m * (1 + backward) / ends == pytest.approx((p - 1) / (m + p - 1)), (p, m)
        assert play(read_schedule("inference", p, m), 1, 0, send=0) == m + p - 1


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "inference"])
def test_sends_and_receives_match_one_to_one(name):
    for p, m in SHAPES:
        stages = read_schedule(name, p, m)
        play(stages, send=0.25)  # raises at the first message that nobody takes
        for message in ("Activation", "Grad"):
            sent = [(e.stage, e.micro_batch, e.start) for s in stages for e in s if e.name == f"Send{message}"]
            shift = 1 if message == "Activation" else -1
            got = [(e.stage - shift, e.micro_batch, e.start) for s in stages for e in s if e.name == f"Recv{message}"]
            assert sorted(sent) == sorted(got)
            assert len(sent) == (0 if name == "inference" and message == "Grad" else m * (p - 1))


def test_every_micro_batch_goes_forward_then_backward_through_every_stage():
    for name in ("1f1b", "gpipe"):
        stages = read_schedule(name, 4, 6)
        play(stages, 1, 2)
        at = {(e.stage, e.name, e.micro_batch): e for events in stages for e in events}
        for i in range(6):
            for s in range(3):
                assert at[s, "ForwardPass", i].end <= at[s + 1, "ForwardPass", i].start
                assert at[s + 1, "BackwardPass", i].end <= at[s, "BackwardPass", i].start
            assert at[3, "ForwardPass", i].end <= at[3, "BackwardPass", i].start
        assert [events[-1].name for events in stages] == ["OptimizerStep"] * 4


def test_1f1b_keeps_as_many_micro_batches_as_stages_are_left_and_gpipe_all():
    for p, m in SHAPES:
        kept = [in_flight(events) for events in read_schedule("1f1b", p, m)]
        assert kept == [min(p - stage, m) for stage in range(p)]
        assert [in_flight(events) for events in read_schedule("gpipe", p, m)] == [m] * p
        assert [TrainSchedule(m, p, stage).num_pipe_buffers() for stage in range(p)] == [max(2, k) for k in kept]
    assert GPipeSchedule(6, 4, 0).num_pipe_buffers() == 6


def test_the_picture_in_text():
    stages = read_schedule("1f1b", 2, 3)
    assert as_text(stages, play(stages, 1, 2), 1) == ["F0F1....B0==F2B1==..B2==", "..F0B0==F1B1==F2B2==...."]


@pytest.mark.launch
def test_schedule_draws_and_prints_bubble_beside_formula(tmp_path):
    run = run_plain("day15/schedule.py", "--instructions", "--run_dir", tmp_path)
    assert run.stdout.count("time 33 | bubble 0.2727 | formula 3/11 = 0.2727") == 2
    assert "kept, stage by stage: [4, 3, 2, 1] | buffers: [4, 3, 2, 2]" in run.stdout
    assert re.search(r"^tick  4 \| load2 F2 +\| a>1 ", run.stdout, re.M)
    assert (tmp_path / "schedule.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="0 stages x 8 micro-batches: both start at 1"):
        read_schedule("1f1b", 0, 8)


def test_volume_is_that_of_the_notes():
    tiny = get_preset("tiny")
    assert num_parameters(tiny, 4096) == sum(p.numel() for p in build_model("tiny", 4096).parameters())
    sent = volume(get_preset("gpt2-xl"), 1_557_611_200, ranks=4, global_batch=32, micro_batch=1)
    assert sent["pipeline, 4 stages"] == 2 * 32 * 1024 * 1600
    assert sent["ZeRO-3"] == 2 * 8 * 1_557_611_200 * 3 / 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """train.py as two stages on two ranks, every loss."""
    run_dir = tmp_path_factory.mktemp("train")
    flags = ["--steps", STEPS, "--log_every", 1, "--corpus", "moby_dick", "--run_dir", run_dir]
    return run_day("day15/train.py", *flags)


@pytest.mark.launch
def test_train_proves_that_the_model_is_cut(trained):
    assert re.search(r"^rank 0: stage 0 of 2 \| layers 0 to 1 of 5 \| 738,944 parameters \|", trained.stdout, re.M)
    assert re.search(r"^rank 1: stage 1 of 2 \| layers 2 to 4 of 5 \| 722,816 parameters \|", trained.stdout, re.M)
    assert "batch 16 = 8 micro-batches x 2 sequences x 1 pipelines | bubble 11.1% | zero 1" in trained.stdout
    assert trained.held_out[STEPS] < trained.held_out[0] - 0.5


@pytest.mark.launch
def test_two_stages_train_like_the_whole_model(trained):
    """Plain PyTorch, one process, the same global batch: no DeepSpeed in here."""
    from day15.layers import Block, Embed, next_token_loss

    preset, tokenizer = get_preset("tiny"), load_tokenizer("bpe4096")
    blocks, held_out = load_corpus("moby_dick", tokenizer, preset.block_size)
    size = (preset.hidden, preset.num_heads)
    recipes = [lambda: Embed(len(tokenizer), preset.block_size, preset.hidden), lambda: Block(*size)]
    recipes += [lambda: Block(*size), lambda: torch.nn.LayerNorm(preset.hidden)]
    recipes += [lambda: torch.nn.Linear(preset.hidden, len(tokenizer), bias=False)]
    layers = []
    for seed, recipe in enumerate(recipes):
        torch.manual_seed(seed)
        layers.append(recipe())
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, max(0, n - 1) / 10))
    loader = DataLoader(blocks, 16, sampler=DistributedSampler(blocks, 1, 0, seed=0), drop_last=True)
    batches = endless_batches(loader)
    for step in range(1, STEPS + 1):
        batch = next(batches)
        loss = next_token_loss(model(batch["input_ids"]), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert trained.losses[step] == pytest.approx(loss.item(), abs=1e-5), step
    model.eval()
    with torch.no_grad():
        batch = torch.utils.data.default_collate([held_out[i] for i in range(64)])
        loss = next_token_loss(model(batch["input_ids"]), batch["labels"])
    assert trained.held_out[STEPS] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.launch
def test_one_stage_starts_from_the_same_weights(trained, tmp_path):
    flags = ["--steps", 1, "--log_every", 1, "--corpus", "moby_dick", "--run_dir", tmp_path, "--stages", 1]
    run = run_ranks("day15/train.py", *flags, ranks=1)
    assert "rank 0: stage 0 of 1 | layers 0 to 4 of 5 | 1,461,760 parameters" in run.stdout
    assert run.losses[1] == pytest.approx(trained.losses[1], abs=1e-5)


@pytest.mark.launch
def test_stages_that_do_not_divide_the_ranks_get_one_sentence():
    run = run_ranks("day15/train.py", "--stages", 2, ranks=1, check=False)
    assert error_line(run) == "--stages 2 does not divide the 1 ranks; possible here: 1"


@pytest.mark.launch
@measure_again
def test_the_engine_takes_as_long_and_keeps_as_much_as_the_schedule_says(tmp_path):
    flags = ["--micro_batches", 6, "--steps", 1, "--run_dir", tmp_path]
    run_ranks("day15/labs/bubble.py", *flags, ranks=3)
    table = json.loads((tmp_path / "bubble.json").read_text())["table"]
    assert [(row["schedule"], row["kept"]) for row in table] == [("1f1b", "3 2 1"), ("gpipe", "6 6 6")]
    for row in table:  # up to 1.15 was measured; stages that take turns would need 2.25 times as long
        assert row["computed_s"] <= row["seconds"] < 2 * row["computed_s"], row
        assert row["sent_bytes"] == row["micro_batches"] * 2 * 64 * 128 * 4  # the first stage: activations alone


SAID = {
    "before_init_distributed": "AssertionError: DeepSpeed backend not set, please initialize it using"
    " init_process_group()",
    "zero_2": "AssertionError: ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism",
    "zero_3": "AssertionError: ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism",
    "forward": "PipelineError: Only train_batch() is accessible in pipeline mode.",
    "backward": "PipelineError: Only train_batch() is accessible in pipeline mode.",
    "step": "PipelineError: Only train_batch() is accessible in pipeline mode.",
    "no_grad": "RuntimeError: train_batch() requires gradients enabled. Use eval_batch() instead.",
    "too_few_batches": "StopIteration",
    "dictionary_batch": "KeyError: 0",
    "list_of_batches": "TypeError: 'list' object is not an iterator",
    "stages_not_dividing": "RuntimeError: num_stages (3) must divide distributed world size (2)",
    "no_stages": "RuntimeError: must provide num_stages or topology",
    "function_as_spec": "TypeError: issubclass() arg 1 must be a class",
    "object_as_spec": "TypeError: issubclass() arg 1 must be a class",
    "default_seed_fn": "TypeError: The only supported seed types are: None, int, float, str, bytes, and bytearray.",
    "not_managed": "AssertionError: managed_gradient_accumulation=False is not supported with pipeline parallelism",
    "no_optimizer": "AssertionError: must provide optimizer during init in order to use backward",
    "dictionary_layer": "NotImplementedError: Could not send meta type <class 'dict'>",
}


@pytest.mark.launch
def test_mistakes_get_the_messages_of_the_notes(tmp_path):
    flags = ["--mistakes", *list(SAID)[1:-1], "dictionary_layer", "--run_dir", tmp_path]  # last: it ends the run
    run_ranks("day15/labs/break_it.py", *flags, ranks=2, check=False)
    assert json.loads((tmp_path / "break_it.json").read_text())["said"] == SAID


@pytest.mark.parametrize("mistake", ["zero_2", "forward", "stages_not_dividing", "not_managed"])
def test_messages_that_a_day_can_meet_come_with_a_cure(mistake, capsys):
    with pytest.raises(SystemExit), clear_errors():
        raise RuntimeError(SAID[mistake].split(": ", 1)[1])
    assert re.fullmatch(r"error: .* -> .*: day 15\n", capsys.readouterr().err)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("more_stages_than_layers", "rank 1: ValueError: optimizer got an empty parameter list"),
        ("half_the_stages", "rank 0: StopIteration"),
        ("shape_changes", "Received data size doesn't match expected size"),  # from gloo, which ends the process
    ],
)
def test_mistakes_that_leave_the_other_rank_waiting(mistake, said, tmp_path):
    run = run_ranks("day15/labs/break_it.py", "--mistakes", mistake, "--run_dir", tmp_path, ranks=2, check=False)
    assert said in run.stdout + run.stderr


@pytest.mark.launch
@pytest.mark.parametrize("flags", [["--ranks", 0], ["--micro_batch", -1], ["--ranks", 3]])
def test_volume_refuses_a_batch_that_cannot_be_cut(flags):
    assert f"{flags[0]} {flags[1]}" in error_line(run_plain("day15/labs/volume.py", *flags, check=False))
