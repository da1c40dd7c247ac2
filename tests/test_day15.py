"""Day 15: the pipeline trains like the whole model; the schedule, its bubble and its memory are what the notes say."""

import json
import re
import sys

import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.schedule import TrainSchedule
from torch.utils.data import DataLoader, DistributedSampler

from common.data import endless_batches, load_corpus, load_tokenizer
from common.errors import UserError, clear_errors
from common.model import Preset, build_model, get_preset
from day15 import exercise, solution
from day15.labs.volume import main as volume_main
from day15.labs.volume import num_parameters, volume, zero3_gathers
from day15.schedule import GPipeSchedule, as_text, in_flight, play, read_schedule
from tests.launch import SMALL_CORPUS, error_line, measure_again, run_day, run_ranks, run_warm
from tests.render import ROOT

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
    run = run_warm("day15/schedule.py", "--instructions", "--run_dir", tmp_path)
    assert run.stdout.count("time 33 | bubble 0.2727 | formula 3/11 = 0.2727") == 2
    assert "kept, stage by stage: [4, 3, 2, 1] | buffers: [4, 3, 2, 2]" in run.stdout
    assert re.search(r"^tick  4 \| load2 F2 +\| a>1 ", run.stdout, re.M)
    assert (tmp_path / "schedule.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="0 stages x 8 micro-batches: both start at 1"):
        read_schedule("1f1b", 0, 8)


def test_volume_is_that_of_the_notes():
    tiny = get_preset("tiny")
    assert num_parameters(tiny, 4096) == sum(p.numel() for p in build_model("tiny", 4096).parameters())
    psi, xl = 1_557_611_200, get_preset("gpt2-xl")
    gathers = zero3_gathers(xl, psi, 50257, live=1_000_000_000)
    sent = volume(xl, psi, gathers, ranks=4, accumulation=8, global_batch=32)
    assert sent["pipeline, 4 stages"] == 2 * 32 * 1024 * 1600
    assert sent["ZeRO-3"] == 8 * (gathers + psi) * 3 / 4 > sent["ZeRO-2"] == 17 * psi * 3 / 4  # more than one gather
    assert zero3_gathers(xl, psi, 50257, live=10**10) == psi


# A GPT-2 with ZeRO-3's limits as small beside it as the defaults are beside XL: what does the engine gather?
GATHERS = """
import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bench.traffic import count_traffic
from bench.world import join_world
from common.ranks import print0

device = join_world()
shape = {"n_layer": 12, "n_embd": 64, "n_head": 4, "n_positions": 64, "vocab_size": 512}
model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
zero = {"stage": 3, "stage3_param_persistence_threshold": 1000, "stage3_prefetch_bucket_size": 20_000}
zero |= {"stage3_max_reuse_distance": LIVE, "stage3_max_live_parameters": LIVE, "reduce_bucket_size": 50_000}
config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8, "zero_optimization": zero}
config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
ids = torch.zeros(1, 64, dtype=torch.long, device=device)
for micro_batch in range(4):  # the first ones record the order of use
    with count_traffic() as traffic:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
part_bytes = sum(size * count for size, count in traffic.calls["all_gather_into_tensor"].items())
psi = sum(parameter.ds_numel for parameter in model.parameters())
print0(f"gathered {2 * part_bytes // 4}, parameters {psi}")
"""


@pytest.mark.launch
def test_zero_3_gathers_what_volume_says(tmp_path):
    script, live = tmp_path / "gathers.py", 400_000
    script.write_text(GATHERS.replace("LIVE", str(live)))
    run = run_ranks(str(script), ranks=2)
    gathered, psi = map(int, re.search(r"gathered (\d+), parameters (\d+)", run.stdout).groups())
    small = Preset(num_layers=12, num_heads=4, hidden=64, block_size=64)
    # 1.48 psi; vectors, 2 % here, are below the persistence threshold and never gathered again
    assert gathered == pytest.approx(zero3_gathers(small, psi, 512, live), rel=0.02) and gathered > 1.4 * psi


def test_every_rank_builds_every_layer_to_count_it_and_the_notes_say_so():
    built = []

    class Counted(torch.nn.Linear):
        def __init__(self, *size) -> None:
            super().__init__(*size)
            built.append(size)

    stage = PipelineModule.__new__(PipelineModule)  # without ranks: it decides by these alone
    stage._layer_specs = [LayerSpec(Counted, 2, 3), LayerSpec(Counted, 3, 4)]
    assert stage._count_layer_params() == [9, 16] and built == [(2, 3), (3, 4)]
    assert all("_count_layer_params" in (ROOT / f"day15/notes{zh}.md").read_text() for zh in ("", ".zh"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """train.py as two stages on two ranks, every loss."""
    run_dir = tmp_path_factory.mktemp("train")
    flags = ["--steps", STEPS, "--log_every", 1, "--corpus", SMALL_CORPUS, "--run_dir", run_dir]
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
    blocks, held_out = load_corpus(str(SMALL_CORPUS), tokenizer, preset.block_size)
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
        some = list(DistributedSampler(held_out, 1, 0, seed=0))[: len(held_out) // 2 * 2]  # whole micro-batches of 2
        batch = torch.utils.data.default_collate([held_out[i] for i in some])
        loss = next_token_loss(model(batch["input_ids"]), batch["labels"])
    assert trained.held_out[STEPS] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.launch
def test_one_stage_starts_from_the_same_weights(trained, tmp_path):
    flags = ["--steps", 1, "--log_every", 1, "--corpus", SMALL_CORPUS, "--run_dir", tmp_path, "--stages", 1]
    run = run_ranks("day15/train.py", *flags, ranks=1)
    assert "rank 0: stage 0 of 1 | layers 0 to 4 of 5 | 1,461,760 parameters" in run.stdout
    assert run.losses[1] == pytest.approx(trained.losses[1], abs=1e-5)


@pytest.mark.launch
def test_stages_that_do_not_divide_the_ranks_get_one_sentence():
    run = run_ranks("day15/train.py", "--stages", 2, ranks=1, check=False)
    assert error_line(run) == "--stages 2 does not divide the 1 ranks; possible here: 1"


@pytest.mark.launch
@pytest.mark.serial
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


@pytest.mark.parametrize("flags", [["--ranks", "0"], ["--micro_batch", "-1"], ["--ranks", "3"]])
def test_volume_refuses_a_batch_that_cannot_be_cut(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["day15/labs/volume.py", *flags])
    with pytest.raises(UserError, match=" ".join(flags)):
        volume_main()


def answers(**changed):
    return {name: changed.get(name, getattr(solution, name)) for name in ("bubble", "kept", "micro_batches_for")}


@pytest.mark.parametrize(
    ("part", "answer", "sentence"),
    [
        ("arithmetic", answers(bubble=lambda p, m: 0.5), "TODO 1, bubble(1, 1) is 0.5: return it as Fraction(a, b)"),
        ("arithmetic", answers(kept=lambda p, m, stage: None), "kept(1, 1, 0) is None, in the schedule 1"),
        ("specs", lambda: None, "TODO 4, layers() returns None, not a list of LayerSpecs"),
        ("specs", lambda: [LayerSpec(torch.relu)], "TODO 4, a LayerSpec wants a class, torch.nn.ReLU say"),
        ("specs", lambda: [torch.nn.ReLU()], "ReLU() in layers() is not a LayerSpec"),
        (
            "pipeline",
            [solution.layers()[0], LayerSpec(torch.nn.Softmax, dim=5), *solution.layers()[1:]],
            "layer 1, Softmax(dim=5), cannot take what the one before gives",
        ),
    ],
)
def test_the_exercise_says_what_is_wrong(part, answer, sentence):
    with pytest.raises(UserError) as told:
        if part == "arithmetic":
            exercise.check_arithmetic(**answer)
        else:
            {"specs": exercise.specs_of, "pipeline": exercise.check_pipeline}[part](answer)
    assert sentence in str(told.value)
