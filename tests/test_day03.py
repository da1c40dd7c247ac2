"""Day 03: the JSON decides, the script proves it, and compare.py sets configs side by side."""

import json
import re
import sys

import pytest
import torch

from common.errors import UserError
from day03.labs import compare
from tests.launch import SMALL_CORPUS, error_line, launch_warm, run_answer, run_ranks, run_warm
from tests.render import ROOT

CORPUS = ("--corpus", str(SMALL_CORPUS))
NOTES = [(ROOT / f"day03/notes{language}.md").read_text() for language in ("", ".zh")]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """compare.py over three configs: (compare.json, its folder). Its ranks are forked, not launched."""
    run_dir = tmp_path_factory.mktemp("compare")
    configs = [f"day03/ds_config{name}.json" for name in ("", "_cosine", "_sgd")]
    flags = ["--configs", *configs, "--ranks", "1", "--steps", "20", "--log_every", "5", *CORPUS]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(compare, "launch", launch_warm)
        patch.setattr(sys, "argv", ["compare.py", *flags, "--run_dir", str(run_dir)])
        compare.main()
    return json.loads((run_dir / "compare.json").read_text()), run_dir


@pytest.mark.launch
def test_compare_writes_table_and_plots(compared):
    result, run_dir = compared
    assert [row["config"] for row in result["table"]] == [f"ds_config{n}.json" for n in ("", "_cosine", "_sgd")]
    for row in result["table"]:
        assert row["held_out_loss"] < 8.34 and row["tokens_per_s"] > 0 and row["peak_gib"] > 0
    assert (run_dir / "loss.png").exists() and (run_dir / "speed.png").exists()


@pytest.mark.launch
def test_adamw_beats_sgd_and_holds_one_state_more(compared):
    adamw, _, sgd = compared[0]["table"]
    assert adamw["held_out_loss"] < sgd["held_out_loss"] - 0.1
    # bytes a parameter between steps, fp32: weights 4 + AdamW's two moments 8, or SGD's momentum 4
    num_params = 937_472
    assert adamw["held_gib"] * 2**30 / num_params == pytest.approx(12, rel=0.01)
    assert sgd["held_gib"] * 2**30 / num_params == pytest.approx(8, rel=0.01)


@pytest.mark.launch
def test_schedule_follows_the_json(compared):
    rows = {row["step"]: row["lr"] for row in compared[0]["table"][1]["rows"] if "lr" in row}
    # the rate logged after step s is the one for step s+1; schedules start one step late: see the notes
    assert rows[1] == 0.0
    for step in (5, 10, 15, 20):
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
    run = run_ranks("day03/train.py", "--steps", 3, *CORPUS, "--log_every", 1, *flags, ranks=2)
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
def test_a_run_shorter_than_log_every_has_a_speed(tmp_path):
    """The program as a reader starts it: through the real launcher."""
    flags = ["--configs", "day03/ds_config.json", "--ranks", 1, "--steps", 2, *CORPUS, "--run_dir", tmp_path]
    run = run_warm("day03/labs/compare.py", *flags)
    row = json.loads((tmp_path / "compare.json").read_text())["table"][0]
    assert row["tokens_per_s"] > 0 and f"{row['held_out_loss']:.4f}" in run.stdout


def test_compare_names_the_config_that_fails_and_asks_for_two_names(tmp_path, monkeypatch):
    (tmp_path / "bad.json").write_text('{"train_micro_batch_size_per_gpu": 8,')
    with pytest.raises(UserError, match="bad.json is not valid JSON"):
        compare.chosen_configs([str(tmp_path / "bad.json")])
    with pytest.raises(UserError, match="two configs are called ds_config: "):
        compare.chosen_configs([str(ROOT / "day02/ds_config.json"), str(ROOT / "day03/ds_config.json")])

    def fail(*words, **options):
        raise UserError("error: stage 7")

    monkeypatch.setattr(compare, "launch", fail)
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    with pytest.raises(UserError, match="training with .*bad.json failed: error: stage 7"):
        compare.train(tmp_path / "bad.json", tmp_path, compare.parse_args())


def test_what_the_config_table_says_of_defaults():
    """Warm-up's highest rate and autocast's type: read from DeepSpeed, and what the notes say of them."""
    from deepspeed.runtime.config import get_torch_autocast_dtype
    from deepspeed.runtime.lr_schedules import WarmupDecayLR, WarmupLR

    rates = {}
    for schedule in (WarmupLR, WarmupDecayLR):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
        flags = {"total_num_steps": 100} if schedule is WarmupDecayLR else {}
        built = schedule(optimizer, warmup_num_steps=10, **flags)
        for _ in range(11):
            built.step()
        rates[schedule.__name__] = optimizer.param_groups[0]["lr"]
    assert rates == {"WarmupLR": pytest.approx(0.02), "WarmupDecayLR": pytest.approx(0.001)}
    assert (
        get_torch_autocast_dtype({"torch_autocast": {"enabled": True}}) is None
    )  # so PyTorch's default for the device
    assert torch.get_autocast_dtype("cuda") is torch.float16 and torch.get_autocast_dtype("cpu") is torch.bfloat16
    for page in NOTES:
        (maximum,) = re.findall(r"^\| `scheduler.params.warmup_min_lr`.*$", page, re.M)
        assert "`WarmupDecayLR`" in maximum and "0.001" in maximum and "`optimizer.params.lr`" in maximum
        (autocast,) = re.findall(r"^\| `torch_autocast.enabled`.*`.dtype`.*$", page, re.M)
        assert "None" in autocast and "float16" in autocast


FIRST_UPDATES = """
import os, sys
sys.path.insert(0, os.getcwd())
import deepspeed, torch
from bench.world import join_world
join_world()
weights = {}
for stage in (0, 1):
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 8, bias=False)
    adam = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": adam, "bf16": {"enabled": True},
              "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    optimizer = engine.optimizer
    groups = optimizer.single_partition_of_fp32_groups if stage else optimizer.fp32_groups[0]
    weights[stage] = [groups[0].detach().flatten()[:8].double().clone()]
    for _ in range(12):
        engine.backward(engine(torch.ones(1, 1, dtype=torch.bfloat16)).float().sum())  # the same gradient every time
        engine.step()
        weights[stage].append(groups[0].detach().flatten()[:8].double().clone())
updates = {stage: torch.stack(seen).diff(dim=0).mean(dim=1) for stage, seen in weights.items()}
print("ratios", *[round(ratio, 3) for ratio in (updates[0] / updates[1]).tolist()])
"""


@pytest.mark.launch
def test_bf16_without_zero_makes_short_first_steps(tmp_path):
    """The figures that days 03, 07, 11 and config/ give; when DeepSpeed mends it, all become 1."""
    (tmp_path / "first_updates.py").write_text(FIRST_UPDATES)
    run = run_ranks(tmp_path / "first_updates.py")
    ratios = [float(word) for word in re.search(r"^ratios (.*)$", run.stdout, re.M)[1].split()]
    assert ratios[:3] == pytest.approx([0.744, 0.858, 0.910], abs=0.002)
    assert ratios[9] == pytest.approx(0.995, abs=0.003) and ratios[11] == pytest.approx(1.0, abs=0.003)
    for page in (*NOTES, *((ROOT / f"config/README{language}.md").read_text() for language in ("", ".zh"))):
        text = " ".join(page.split())
        assert "0.744, 0.858, 0.910" in text.replace("、", ", ") and "0.995" in text
        assert "within 1.2 % of it from then on" in text or "此后相差不超过 1.2 %" in text
        assert "hardly learns" not in text and "trains wrongly" not in text


@pytest.mark.launch
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ('CONFIG["optimizer"]["params"]["learning_rate"] = 1', "DeepSpeed refuses CONFIG: TypeError: "),
        ('del CONFIG["optimizer"], CONFIG["scheduler"]', "CONFIG has no optimizer"),
        ('CONFIG["zero_optimization"] = 1', "DeepSpeed refuses CONFIG: "),
        ('CONFIG["gradient_accumulation_steps"] = 4', "the global batch on 2 ranks is 32, want 64"),
        ('del CONFIG["scheduler"]', "the schedule is NoneType, want WarmupDecayLR"),
        ('del CONFIG["scheduler"]["params"]["warmup_type"]', "update 6 used learning rate 0.0007"),
    ],
)
def test_wrong_configs_get_one_sentence(change, sentence, tmp_path):
    run = run_answer("day03", change, tmp_path)
    assert run.code != 0 and f"not yet: {sentence}" in error_line(run) and "Traceback" not in run.stderr
