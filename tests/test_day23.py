"""Day 23: LoRA under ZeRO is LoRA in plain PyTorch; the base stays as it is; what is saved loads, merges, switches."""

import contextlib
import importlib.util
import io
import json
import math
import re
import runpy
import shutil
import sys
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from common.errors import UserError, clear_errors
from common.run_log import read_rows
from day23 import exercise, lora, solution
from tests.launch import Run, error_line, run_day, run_ranks, run_warm
from tests.render import ROOT

RATE = 5e-3  # bold: the adapter then does something within 6 steps
# Each family once, each stage once: GPT-2, with its transposed matrices and tied output, where both are cut.
CASES = {("tiny-gpt2", 3): run_day, ("tiny-llama", 2): run_ranks, ("tiny-qwen", 1): run_ranks}
FLAGS = ["--steps", 6, "--log_every", 1]


def write_config(folder, stage: int, **zero):
    """The fp32 JSON with another stage and rate, and a comment."""
    config = json.loads((ROOT / "day23/ds_config_fp32.json").read_text())
    config["zero_optimization"] |= {"stage": stage, "stage3_param_persistence_threshold": 0, **zero}
    config["optimizer"]["params"]["lr"] = RATE
    (folder / "config.json").write_text("// mine\n" + json.dumps(config))
    return folder / "config.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(model, stage): (run, folder of the adapter)} of train.py on two ranks."""
    found = {}
    for (model, stage), launch in CASES.items():
        run_dir = tmp_path_factory.mktemp(f"{model}_zero{stage}")
        more = ["--recompute"] if stage == 1 else []  # another way to the same gradients
        flags = ["--deepspeed_config", write_config(run_dir, stage), "--pretrained", model, "--run_dir", run_dir]
        found[model, stage] = launch("day23/train.py", *FLAGS, *more, *flags, ranks=2), run_dir / "adapter"
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """{model: (run, folder of the adapter)} of plain PyTorch and peft in one process; two of them in this one."""
    found = {}
    for model in ("tiny-llama", "tiny-gpt2", "tiny-qwen"):
        run_dir = tmp_path_factory.mktemp(f"{model}_plain")
        flags = ["--deepspeed_config", write_config(run_dir, 0), "--pretrained", model, "--run_dir", run_dir]
        launch = run_warm if model == "tiny-llama" else in_this_process
        found[model] = launch("day23/labs/baseline_torch.py", *FLAGS, *flags), run_dir / "adapter"
    return found


def in_this_process(script: str, *flags: object) -> Run:
    stdout = io.StringIO()
    with patch.object(sys, "argv", [script, *map(str, flags)]), contextlib.redirect_stdout(stdout):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return Run(0, stdout.getvalue(), "")


@pytest.mark.launch
@pytest.mark.parametrize(("model", "stage"), CASES)
def test_lora_under_zero_is_lora_in_plain_pytorch(runs, plain, model, stage):
    (run, folder), (want, plain_folder) = runs[model, stage], plain[model]
    assert list(run.losses) == [1, 2, 3, 4, 5, 6]
    for step, loss in want.losses.items():  # 2e-6 was measured: the log's last digits
        assert run.losses[step] == pytest.approx(loss, abs=1e-5), step
    assert run.held_out[6] == pytest.approx(want.held_out[6], abs=1e-5)
    assert run.held_out[6] < run.held_out[0] - 0.02
    weights, plain_weights = (load_file(path / "adapter_model.safetensors") for path in (folder, plain_folder))
    assert weights.keys() == plain_weights.keys() and len(weights) >= 16
    for name, tensor in weights.items():
        assert tensor.shape == plain_weights[name].shape
        assert (tensor - plain_weights[name]).abs().max() <= 1e-5, name
        assert "lora_B" not in name or tensor.abs().max() > 1e-3, f"{name} was not trained"


@pytest.mark.launch
def test_proof_lines(runs):
    run, folder = runs["tiny-gpt2", 3]
    # r (d_in + d_out) of c_attn, c_proj, and the two of the feed-forward part, hidden 64, two layers, r = 8
    adapter = 8 * 2 * ((64 + 192) + (64 + 64) + 2 * (64 + 256))
    base = (4096 + 512) * 64 + 2 * (12 * 64**2 + 13 * 64) + 128
    assert "lora r=8 alpha=16 beside 8 matrices: c_attn c_fc c_proj" in run.stdout
    share = f"{adapter:,} of {base + adapter:,} parameters trained = {adapter / (base + adapter):.2%}"
    assert f"zero stage 3 | {share} | float32 | cpu" in run.stdout
    held = re.compile(r"^this rank holds: frozen ([\d.]+) MB \| trained ([\d.]+) MB \| optimizer ([\d.]+) MB$", re.M)
    found = [float(size) for size in held.search(run.stdout).groups()]  # half of each; the optimizer: copy, two moments
    assert found == pytest.approx([base * 4 / 2e6, adapter * 4 / 2e6, adapter * 12 / 2e6], abs=0.01)
    found = [float(size) for size in held.search(runs["tiny-llama", 2][0].stdout).groups()]
    assert found == pytest.approx([360_768 * 4 / 1e6, 19_456 * 4 / 1e6, 19_456 * 12 / 2e6], abs=0.01)  # weights whole
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 16, "tiny-gpt2")
    assert config["fan_in_fan_out"]


@pytest.mark.launch
@pytest.mark.parametrize(("model", "stage"), CASES)
def test_merged_computes_what_the_adapter_does_beside_its_base(runs, model, stage):
    from day22.chat_data import collate, held_out_loss, load_chat
    from day22.pretrained import load_model, load_tokenizer
    from day23.merge import load_adapter

    run, folder = runs[model, stage]
    tokenizer = load_tokenizer(model)
    _, items = load_chat("chat", tokenizer, 128)
    batch, cpu = collate(items[:4], tokenizer.pad_token_id), torch.device("cpu")
    base = load_model(model).eval()
    with torch.no_grad():
        alone = base(**batch).logits
        adapted = load_adapter(base, folder).eval()
        beside = adapted(**batch).logits
        assert held_out_loss(adapted, items, tokenizer.pad_token_id, cpu) == pytest.approx(run.held_out[6], abs=1e-5)
        merged = adapted.eval().merge_and_unload()(**batch).logits
    assert (beside - alone).abs().max() > 1e-2
    assert (merged - beside).abs().max() <= 1e-5  # 1e-6 was measured


@pytest.mark.launch
def test_merge_and_generate(runs, plain, tmp_path):
    (run, llama), (_, other) = runs["tiny-llama", 2], plain["tiny-llama"]
    merged = run_warm("day23/merge.py", llama, tmp_path / "merged")
    assert float(re.search(r"logits .* at most ([\d.e-]+) apart", merged.stdout)[1]) <= 1e-5
    losses = dict(re.findall(r"(base|adapter|merged, float32) ([\d.]+)", merged.stdout.split("held-out loss: ")[1]))
    assert float(losses["base"]) == pytest.approx(run.held_out[0], abs=1e-5)
    assert float(losses["adapter"]) == pytest.approx(float(losses["merged, float32"]), abs=1e-5)
    assert float(losses["adapter"]) == pytest.approx(run.held_out[6], abs=1e-5)
    assert len(load_file(tmp_path / "merged/model.safetensors")) == 20  # an ordinary Llama: no lora_ in its names
    said = run_warm("day23/generate.py", f"one={llama}", f"two={other}", "--max_new_tokens", 2, "--prompts", "What?")
    assert "tiny-llama 1.44 MB | one 0.08 MB | two 0.08 MB" in said.stdout
    assert re.search(r"^What\?\n    tiny-llama: .*\n    one: .*\n    two: .*$", said.stdout, re.M)


@pytest.mark.launch
def test_adapters_are_switched_by_name(runs, tmp_path):
    from day22.pretrained import load_model
    from day23.merge import load_adapter

    folder, ids = runs["tiny-llama", 2][1], torch.arange(24).view(2, 12)
    shutil.copytree(folder, tmp_path / "twice")
    weights = load_file(folder / "adapter_model.safetensors")
    twice = {name: 2 * tensor if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(twice, tmp_path / "twice/adapter_model.safetensors")
    base = load_model("tiny-llama").eval()
    with torch.no_grad():
        alone = base(ids).logits
        model = load_adapter(load_adapter(base, folder, "once"), tmp_path / "twice", "twice").eval()
        said = {}
        for name in ("once", "twice", "once"):
            model.set_adapter(name)
            again = said.get(name)
            said[name] = model(ids).logits
            assert again is None or torch.equal(said[name], again)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, alone)
    assert (said["once"] - alone).abs().max() > 1e-2 and (said["twice"] - said["once"]).abs().max() > 1e-2


@pytest.mark.launch
def test_what_deepspeed_makes_of_a_frozen_base(tmp_path):
    run = run_ranks("day23/labs/frozen.py", "--run_dir", tmp_path, ranks=2)
    result = json.loads((tmp_path / "frozen.json").read_text())
    rows = {(row["stage"], row["threshold"]): row for row in result["table"]}
    for row in rows.values():
        assert row["base_changed"] == 0  # to the bit
        assert row["resumed_difference"] <= 1e-6 and row["untrained_difference"] > 1e-3
    frozen = {key: row["held_bytes"]["frozen"] for key, row in rows.items()}
    assert frozen[2, 0] == 360_768 * 4 and frozen[3, 0] == pytest.approx(360_768 * 4 / 2, rel=0.01)
    assert rows[2, 0]["naive_shapes"] == ["[8, 64]"]
    assert rows[3, 0]["naive_shapes"] == ["[0]"] and "invalid shape" in run.stderr  # the trap; peft warns since 0.21
    assert rows[3, 100_000]["naive_shapes"] == ["[8, 64]"]  # and here it does not show: small parameters stay whole
    assert rows[2, 0]["still_in"] == ["lm_head.weight"]  # 0.19.8: the second name of a tied weight is not excluded
    assert rows[3, 0]["excluding_bytes"] < rows[3, 0]["checkpoint_bytes"] / 4
    for stage in "123":
        assert result["all_frozen"][stage] and result["all_frozen"][stage] in (ROOT / "day23/notes.md").read_text()


RUNS_OUT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from day23.labs import frozen

def too_large(*_):
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError
    return {{}}

frozen.try_stage = too_large
frozen.main()
"""


@pytest.mark.launch
def test_frozen_goes_on_after_a_stage_that_ran_out_of_memory(tmp_path):
    (tmp_path / "runs_out.py").write_text(RUNS_OUT)
    run_ranks(tmp_path / "runs_out.py", "--run_dir", tmp_path, ranks=2)
    result = json.loads((tmp_path / "frozen.json").read_text())
    assert [row["error"] for row in result["table"]] == ["out of memory"] * 3 and len(result["all_frozen"]) == 3


@pytest.mark.launch
def test_compare_follows_the_arithmetic(tmp_path):
    flags = ["--full_lrs", 1e-3, "--lora_lrs", 1e-2, "--lora_ranks", 2, "--steps", 6, "--eval_every", 3]
    more = ["--pretrained", "tiny-llama", "--fp32", "--other_corpus", "chat", "--run_dir", tmp_path]
    run = run_ranks("day23/labs/compare.py", *flags, *more, ranks=2)
    table = json.loads((tmp_path / "compare.json").read_text())["table"]
    assert [row["case"] for row in table] == ["full lr=0.001", "lora r=8 lr=0.01", "lora r=2 lr=0.01"]
    assert [row["trained"] for row in table] == [360_768, 19_456, 4_864]
    for row in table:
        assert row["stage"] == 2 and row["save_bytes"] == 4 * row["trained"]
        assert row["held_bytes"]["optimizer"] == pytest.approx(
            12 * row["trained"] / 2, rel=0.01
        )  # on each of two ranks
        assert [r["step"] for r in row["rows"] if "held_out_loss" in r] == [0, 3, 6]
    assert table[0]["peak_bytes"] > table[1]["peak_bytes"]
    full, eight, two = (row["improvement"] for row in table)
    assert full > 0.05 and eight > two > 0.01
    assert re.search(r"^start [\d.]+ \| lora r=8 lr=0.01 gains \d+% of full lr=0.001$", run.stdout, re.M)
    assert all((tmp_path / f"{plot}.png").exists() for plot in ("loss", "gain", "forgotten"))


@pytest.mark.launch
def test_choose_stops_early_and_goes_on_where_it_ended(tmp_path):
    """One launch: a case from an earlier one, a rate that learns, one that spoils, and some of the variants."""
    done = {"case": "full, lr=0.001", "kind": "full", "lr": 1e-3, "trained": 1, "best_epoch": 2, "seconds": 1.0}
    done |= {"held_out_loss": 1.0, "last_held_out_loss": 1.0, "improvement": 1.0, "forgotten": 0.0, "epochs": []}
    (tmp_path / "choose.json").write_text(json.dumps({"table": [done]}))
    flags = ["--full_lrs", 1e-3, 10, "--lora_lrs", 1e-2, "--epochs", 2, "--samples", 32, "--held_out", 8]
    flags += ["--variants", "r=64, alpha=16", "r=64, alpha=16, rsLoRA", "r=8, DoRA"]
    more = ["--pretrained", "tiny-llama", "--fp32", "--other_corpus", "chat", "--run_dir", tmp_path]
    run_ranks("day23/labs/choose.py", *flags, *more, ranks=2)
    first, spoiled, lora_row, *variants = json.loads((tmp_path / "choose.json").read_text())["table"]
    assert first == done
    assert spoiled["best_epoch"] == 0 and len(spoiled["epochs"]) == 2 and spoiled["improvement"] == 0
    assert lora_row["best_epoch"] >= 1 and lora_row["improvement"] > 0.01 and lora_row["trained"] == 19_456
    assert [row["lr"] for row in variants] == [1e-2] * 3 and (tmp_path / "rate.png").exists()
    trained = [row["trained"] for row in variants]
    assert trained[:2] == [155_648, 155_648] and trained[2] > 19_456  # DoRA's magnitudes come on top
    assert variants[0]["held_out_loss"] != variants[1]["held_out_loss"]  # alpha / r and alpha / sqrt(r)


@pytest.mark.launch
@pytest.mark.serial
@pytest.mark.parametrize("precision", [[], ["--bf16", "--stage", 0, "--lean"]], ids=["fp32", "autocast"])
def test_speed_takes_turns_on_the_same_batches(precision, tmp_path):
    """In fp32; with a bf16 base and an fp32 adapter, which DeepSpeed's own bf16 without ZeRO does not keep (1e-3).
    The second clips outside of the engine, as `--lean` has it."""
    config = json.loads((ROOT / "day23/ds_config.json").read_text())
    text = "// mine\n" + json.dumps(config | {"gradient_clipping": 0.01})  # it clips in every step
    (tmp_path / "config.json").write_text(text)
    flags = ["--deepspeed_config", tmp_path / "config.json", "--pretrained", "tiny-llama", "--turns", 3, "--window", 2]
    run_ranks("day23/labs/speed.py", *flags, *precision, "--run_dir", tmp_path)
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["losses_apart"] <= 1e-5 and len(result["losses"]["torch"]) == 6  # 1e-6 and 0 were measured
    assert 0.2 < result["ratio"] < 5


def test_lean_goes_without_zero(monkeypatch):
    from day23.labs.speed import main

    monkeypatch.setattr("sys.argv", ["day23/labs/speed.py", "--lean"])
    with pytest.raises(UserError, match="--lean --stage 1: .*; --lean goes with --stage 0"):
        main()


# What DeepSpeed and peft themselves do on two ranks, in one launch: added tokens at stages 1 and 3, the embedding
# trained as well at stages 0 to 3, bf16 at 0 and 1.
PROBE = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import deepspeed, torch, torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig
from bench.world import join_world
from day22.pretrained import load_model, locate
from day23.lora import add_lora, save_adapter

join_world()
for name in ("tiny-llama", "tiny-qwen"):
    locate(name)  # writes the model, where it is not yet: not in parts
ids = torch.arange(4080, 4098).view(1, -1)  # the last two are new

def build(name, stage, dtype, new_tokens, **more):
    config = {{"train_micro_batch_size_per_gpu": 1, "bf16": {{"enabled": dtype == torch.bfloat16}},
               "optimizer": {{"type": "AdamW", "params": {{"lr": 0.01, "torch_adam": True}}}},
               "zero_optimization": {{"stage": stage, "stage3_param_persistence_threshold": 0}}}}
    alive = HfDeepSpeedConfig(config)
    base = load_model(name, dtype)
    if new_tokens:
        base.resize_token_embeddings(4098)
    torch.manual_seed(0)
    model = add_lora(base, 8, 16, **more)
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]

def train(engine, ids):
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()

def train_and_save(name, stage, folder, **more):
    engine = build(name, stage, torch.float32, True, **more)
    for _ in range(2):
        train(engine, ids)
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=ids).logits
    save_adapter(engine.module, name, folder)
    if dist.get_rank() == 0:
        torch.save(logits, folder + ".pt")
    engine.destroy()

for name, stage in (("tiny-llama", 1), ("tiny-qwen", 3)):
    train_and_save(name, stage, {folder!r} + "/" + name)
for stage in range(4):
    for name, modules in (("tiny-llama", ["embed_tokens"]), ("tiny-qwen", ["embed_tokens", "lm_head"])):
        train_and_save(name, stage, {folder!r} + f"/{{stage}}-{{name}}", modules_to_save=modules)
found = {{}}
for stage in (0, 1):
    engine = build("tiny-llama", stage, torch.bfloat16, False)
    masters = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in masters]
    train(engine, ids % 4096)
    after = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    moved = sum((a - b).square().sum().item() for a, b in zip(after, before))
    moved = torch.tensor(moved)
    if stage:
        dist.all_reduce(moved)  # each rank has its part
    found[stage] = [type(engine.optimizer).__name__, str(masters[0].dtype), moved.item() ** 0.5]
    engine.destroy()
if dist.get_rank() == 0:
    Path({folder!r}, "bf16.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.py").write_text(PROBE.format(root=str(ROOT), folder=str(folder)))
    run_ranks(folder / "probe.py", ranks=2)
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen"])
def test_rows_of_added_tokens_are_in_the_adapters_file(probe, name):
    """Tied at stage 1, with an output layer of its own at stage 3."""
    from day22.pretrained import load_model

    saved = load_file(probe / name / "adapter_model.safetensors")
    embeddings = [key for key in saved if "embed_tokens" in key or "lm_head" in key]
    assert len(embeddings) >= (2 if name == "tiny-qwen" else 1)
    assert all(saved[key].shape == (4098, 64) for key in embeddings)
    base = load_model(name)
    torch.manual_seed(1)  # another draw of the new rows than that of the run
    base.resize_token_embeddings(4098)
    with torch.no_grad():
        again = PeftModel.from_pretrained(base, probe / name).eval()(torch.arange(4080, 4098).view(1, -1)).logits
    assert (again - torch.load(probe / f"{name}.pt")).abs().max() <= 1e-5


@pytest.mark.launch
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen"])
def test_a_trained_embedding_is_in_the_adapters_file_at_every_stage(probe, name, stage):
    """`modules_to_save`, with new tokens: both ends, of a tied model the same matrix under two names."""
    from day22.pretrained import load_model

    saved = load_file(probe / f"{stage}-{name}/adapter_model.safetensors")
    whole = {key: tensor for key, tensor in saved.items() if "lora_" not in key}
    assert len(whole) == 2 and all(tensor.shape == (4098, 64) for tensor in whole.values()), sorted(whole)
    base = load_model(name)
    torch.manual_seed(1)
    base.resize_token_embeddings(4098)
    before = base.get_input_embeddings().weight.detach().clone()
    model = PeftModel.from_pretrained(base, probe / f"{stage}-{name}").eval()
    with torch.no_grad():
        again = model(torch.arange(4080, 4098).view(1, -1)).logits
    assert (again - torch.load(probe / f"{stage}-{name}.pt")).abs().max() <= 1e-5
    weights = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert (weights[0] - before).abs().max() > 1e-3  # it was trained
    assert torch.equal(*weights) == (name == "tiny-llama")  # tied stays tied


def test_of_a_tied_embedding_peft_alone_trains_one_end():
    """Then a new token is read and never said; add_lora keeps both ends one matrix."""
    from day22.pretrained import load_model

    more = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    alone = get_peft_model(load_model("tiny-llama"), LoraConfig(r=2, **more))
    ours = lora.add_lora(load_model("tiny-llama"), 2, 4, targets=["q_proj"], modules_to_save=["embed_tokens"])
    for model, tied in ((alone, False), (ours, True)):
        weights = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
        assert weights[0].requires_grad and weights[1].requires_grad == tied and (weights[0] is weights[1]) == tied


@pytest.mark.launch
def test_an_adapter_without_new_tokens_has_no_embedding(runs):
    for _, folder in runs.values():
        assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))


@pytest.mark.launch
def test_bf16_at_stage_0_keeps_masters_and_begins_with_a_short_step(probe):
    (kind, dtype, moved), (_, zero_dtype, whole) = json.loads((probe / "bf16.json").read_text()).values()
    assert (kind, dtype, zero_dtype) == ("FP16_UnfusedOptimizer", "torch.float32", "torch.float32")
    assert moved / whole == pytest.approx(0.744, abs=0.02)  # "by a quarter" in the notes
    for page in ("notes.md", "notes.zh.md"):
        assert "`FP16_UnfusedOptimizer`" in (ROOT / "day23" / page).read_text()


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (exercise.LoraLinear, "not yet: TODO 1, __init__()"),
        (type("L", (solution.LoraLinear,), {"forward": exercise.LoraLinear.forward}), "not yet: TODO 2, forward()"),
        (type("L", (solution.LoraLinear,), {"merged": exercise.LoraLinear.merged}), "not yet: TODO 3, merged()"),
        (solution.LoraLinear, "not yet: TODO 4, largest_rank()"),
        (
            type("L", (solution.LoraLinear,), {"forward": lambda self, x: None}),
            "not yet: forward() returned a NoneType",
        ),
    ],
)
def test_the_exercise_names_the_todo_that_is_open(layer, sentence, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["exercise.py"])
    with pytest.raises(SystemExit), clear_errors():
        exercise.check(layer, exercise.largest_rank, exercise.preference_loss)
    assert f"error: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            lambda policy, reference, beta: None,
            "not yet: preference_loss() returned None, want a tensor of one number.",
        ),
        (
            lambda policy, reference, beta: solution.preference_loss(policy, torch.zeros_like(reference), beta),
            "not yet: policy and reference alike must give log 2 = 0.6931, not ",
        ),
        (
            lambda policy, reference, beta: solution.preference_loss(policy.flip(0), reference.flip(0), beta),
            "not yet: the loss of 8 pairs is ",
        ),
        (
            lambda policy, reference, beta: (1 + (-beta * (policy - reference).diff(dim=0).neg()).exp()).log().mean(),
            "not yet: a margin of -200 gives inf, want 200: take nn.functional.logsigmoid.",
        ),
    ],
)
def test_a_wrong_loss_of_preferences_is_told_what_is_wrong(answer, sentence):
    with pytest.raises(UserError) as error:
        exercise.check_preference(answer)
    assert str(error.value).startswith(sentence)


@pytest.mark.launch
def test_targets_that_match_nothing_get_one_sentence(tmp_path):
    flags = ["--targets", "q_proj", "query", "--pretrained", "tiny-llama", "--run_dir", tmp_path]
    run = run_ranks("day23/train.py", *flags, check=False)
    sentence = "--targets query: the model has no such matrix; it has down_proj, gate_proj, k_proj, lm_head, o_proj,"
    assert error_line(run).startswith(sentence)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rank": 0}, "--lora_rank 0: a bypass has at least rank 1"),
        ({"alpha": 0}, "--lora_alpha 0: above 0"),
        ({"dropout": 2}, "--lora_dropout 2: a share of the inputs, 0 to below 1"),
    ],
)
def test_impossible_values_get_one_sentence(values, sentence):
    from day22.pretrained import load_model
    from day23.lora import add_lora

    with pytest.raises(UserError, match=sentence):
        add_lora(load_model("tiny-llama"), **{"rank": 8, "alpha": 16, **values})


def test_an_adapters_name_has_no_dot(monkeypatch):
    from day23 import generate

    monkeypatch.setattr(sys, "argv", ["generate.py", "v1.0=folder"])
    with pytest.raises(UserError, match="'v1.0=folder' is not of the form name=folder"):
        generate.main()
    monkeypatch.setattr(sys, "argv", ["generate.py", "chat=folder", "chat=other"])
    with pytest.raises(UserError, match="two adapters named 'chat'"):
        generate.main()


def test_quantize_needs_a_gpu_and_a_stage_below_3(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--quantize needs an NVIDIA GPU and `pip install bitsandbytes`; leave it out"):
        lora.load_quantized("tiny-llama", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="--quantize at stage 3: .*; take stage 1 or 2"):
        lora.load_quantized("tiny-llama", 3)


@pytest.mark.launch
def test_an_adapter_for_another_base_gets_one_sentence(runs, tmp_path):
    from day22.pretrained import load_model
    from day23.merge import base_of, load_adapter

    llama, gpt2 = runs["tiny-llama", 2][1], runs["tiny-gpt2", 3][1]
    with pytest.raises(UserError, match="is an adapter for 'tiny-llama', not for 'smollm2': .* add --any_base"):
        base_of(llama, "smollm2", any_base=False)
    assert base_of(llama, "smollm2", any_base=True) == "smollm2"
    with pytest.raises(UserError, match="does not fit this base: it has no c_attn, c_fc, c_proj"):
        load_adapter(load_model("tiny-llama"), gpt2)
    wide = load_model("tiny-llama")
    for layer in wide.model.layers:
        layer.mlp.up_proj = torch.nn.Linear(64, 200, bias=False)
    with pytest.raises(UserError, match="does not fit this base: size mismatch for .*up_proj"):
        load_adapter(wide, llama)
    with pytest.raises(UserError, match="has no adapter_config.json: not the folder of an adapter"):
        base_of(tmp_path, None, any_base=False)


# --- preference tuning ---

HAS_TRL = importlib.util.find_spec("trl") is not None
YES_NO = [
    {"prompt": f"Is {number} a number?", "chosen": f"Yes, {number} is.", "rejected": f"No, never {number}."}
    for number in range(2, 50)
]


def write_rows(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """{stage: {"ours": rows of metrics.jsonl, "trl": ..., "run": our run, "folder": ...}} on two ranks."""
    found, file = {}, write_rows(YES_NO, tmp_path_factory.mktemp("pairs") / "pairs.jsonl")
    for stage in (2, 3):
        folder = tmp_path_factory.mktemp(f"dpo_zero{stage}")
        config = json.loads(write_config(folder, stage).read_text().partition("\n")[2])
        config["train_micro_batch_size_per_gpu"] = 4
        config["optimizer"]["params"]["lr"] = 2e-2
        (folder / "config.json").write_text(json.dumps(config))
        flags = ["--deepspeed_config", folder / "config.json", "--pretrained", "tiny-llama", "--dataset", file]
        flags += ["--steps", 6, "--log_every", 1, "--beta", 0.5]
        run = run_ranks("day23/train_dpo.py", *flags, "--eval_every", 3, "--run_dir", folder, ranks=2)
        found[stage] = {"run": run, "folder": folder, "ours": read_rows(folder)}
        if HAS_TRL:
            run_ranks("day23/labs/dpo_trl.py", *flags, "--run_dir", folder / "trl", ranks=2)
            found[stage]["trl"] = read_rows(folder / "trl")
    return found


@pytest.mark.launch
@pytest.mark.skipif(not HAS_TRL, reason="pip install --no-deps -r day22/requirements.txt (trl)")
@pytest.mark.parametrize("stage", [2, 3])
def test_our_dpo_is_trls(preferences, stage):
    ours = [row for row in preferences[stage]["ours"] if "loss" in row]
    theirs = [row for row in preferences[stage]["trl"] if "loss" in row]
    assert len(ours) == len(theirs) == 6
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "margin", "chosen", "rejected"):
            assert mine[name] == pytest.approx(other[name], abs=1e-5), (mine["step"], name)
        assert mine["accuracy"] == other["accuracy"]
    assert ours[-1]["margin"] > 0.05  # something was learned, so something was compared


@pytest.mark.launch
@pytest.mark.parametrize("stage", [2, 3])
def test_dpo_starts_at_ln_2_and_tells_held_out_pairs_apart(preferences, stage):
    run, rows = preferences[stage]["run"], preferences[stage]["ours"]
    assert f"zero stage {stage} | 19,456 of 380,224 parameters trained = 5.12% | beta 0.5 | cpu" in run.stdout
    assert run.held_out[0] == run.losses[1] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are the same
    held_out = [row for row in rows if "held_out_accuracy" in row]
    assert [row["step"] for row in held_out] == [0, 3, 6]
    assert held_out[0]["held_out_margin"] == held_out[0]["held_out_accuracy"] == 0
    assert held_out[-1]["held_out_accuracy"] == 1 and held_out[-1]["held_out_margin"] > 0.05
    assert held_out[-1]["held_out_reference_prefers"] == held_out[0]["held_out_reference_prefers"]  # it has not moved
    assert all((preferences[stage]["folder"] / f"{plot}.png").exists() for plot in ("margin", "accuracy"))
    adapter = load_file(preferences[stage]["folder"] / "adapter/adapter_model.safetensors")
    assert len(adapter) == 28 and all(tensor.numel() for tensor in adapter.values())


def test_the_reference_is_the_model_without_its_adapter():
    from day22.pretrained import load_model, load_tokenizer
    from day23.dpo import dpo_loss, reference_logps, sequence_logps
    from day23.pairs import collate_pairs, load_pairs_of

    tokenizer, base = load_tokenizer("tiny-llama"), load_model("tiny-llama").eval()
    batch = collate_pairs(load_pairs_of(YES_NO[:3], tokenizer), tokenizer.pad_token_id)
    with torch.no_grad():
        before = sequence_logps(base, batch)
        probabilities = base(batch["input_ids"][:1]).logits[0].log_softmax(-1)
        model = lora.add_lora(base, 8, 16).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        assert torch.equal(reference_logps(model, batch), before)
        policy = sequence_logps(model, batch)
    assert (policy - before).abs().max() > 1e-2
    labels = batch["labels"][0]  # by hand, token by token
    by_hand = sum(probabilities[at - 1, labels[at]] for at in range(1, len(labels)) if labels[at] != -100)
    assert before[0] == pytest.approx(float(by_hand), abs=1e-4)
    loss, rewards = dpo_loss(policy, before, 0.1)
    ratios = [math.exp(p - r) for p, r in zip(policy.tolist(), before.tolist(), strict=True)]
    losses = [-math.log(1 / (1 + math.exp(-0.1 * math.log(ratios[i] / ratios[i + 3])))) for i in range(3)]
    assert loss.item() == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert rewards.shape == (2, 3) and torch.allclose(rewards.flatten(), 0.1 * (policy - before))


def test_in_the_shipped_pairs_who_does_not_read_the_prompt_is_right_half_of_the_time():
    from day23.pairs import HELD_OUT_EVERY, _continuations

    training, held_out = _continuations()
    for page, said in (("preference.md", "Every eighth address"), ("preference.zh.md", "每八篇咨文留出一篇")):
        assert HELD_OUT_EVERY == 8 and said in (ROOT / "day23" / page).read_text()
    assert len(training) > 400 and len(held_out) >= 48
    for rows in (training, held_out):
        assert sorted(row["chosen"] for row in rows) == sorted(row["rejected"] for row in rows)
        assert all(row["chosen"] != row["rejected"] for row in rows)
    texts = [{row[key] for row in rows for key in ("prompt", "chosen")} for rows in (training, held_out)]
    assert not texts[0] & texts[1]


DIALOGUES = [[{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": text}] for text in ("Yes.", "No.")]


def test_every_form_of_pairs_gives_the_same_tokens(tmp_path):
    """TRL's three: texts, lists of messages, two dialogues; and an earlier answer in the prompt is not learned."""
    from day22.pretrained import load_tokenizer
    from day23.pairs import load_pairs_of

    tokenizer = load_tokenizer("tiny-llama")
    (prompt, chosen), (_, rejected) = DIALOGUES
    forms = [
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]},
        {"chosen": DIALOGUES[0], "rejected": DIALOGUES[1]},
        {"prompt": "Hi?", "chosen": DIALOGUES[0], "rejected": DIALOGUES[1]},
    ]
    first, *others = load_pairs_of(forms, tokenizer)
    for pair in others:
        for name in ("chosen", "rejected"):
            assert all(torch.equal(pair[name][key], first[name][key]) for key in ("input_ids", "labels"))
    longer = [prompt, {"role": "assistant", "content": "What?"}, prompt]
    (pair,) = load_pairs_of([{"prompt": longer, "chosen": [chosen], "rejected": [rejected]}], tokenizer)
    learned = [pair["chosen"]["labels"], first["chosen"]["labels"]]
    assert torch.equal(*(labels[labels != -100] for labels in learned))


def test_pairs_come_from_files_folders_and_the_hub(tmp_path, monkeypatch):
    import datasets

    from day22.pretrained import load_tokenizer
    from day23.pairs import load_pairs

    tokenizer, saved = load_tokenizer("tiny-llama"), datasets.Dataset.from_list(YES_NO)
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "pairs.parquet")
    parts = datasets.DatasetDict(train_prefs=saved.select(range(40)), test_prefs=saved.select(range(40, 48)))
    parts.save_to_disk(tmp_path / "parts")
    sizes = [len(part) for part in load_pairs(str(write_rows(YES_NO, tmp_path / "pairs.jsonl")), tokenizer, 64)]
    assert sum(sizes) == 48 and sizes[1] == 4
    for name in ("saved", "pairs.parquet"):
        assert [len(part) for part in load_pairs(str(tmp_path / name), tokenizer, 64)] == sizes, name
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: {("someone/pairs", "short"): parts}[names])
    for name in (str(tmp_path / "parts"), "someone/pairs:short"):
        assert [len(part) for part in load_pairs(name, tokenizer, 64)] == [40, 8], name


def test_every_rank_looks_at_held_out_pairs_as_often_and_at_each_once(monkeypatch):
    """At stage 3 each pass gathers: of 17 pairs one rank of two has a micro-batch of 8 more than the other."""
    from day22.pretrained import load_model, load_tokenizer
    from day23.dpo import held_out_rewards
    from day23.pairs import load_pairs_of

    tokenizer = load_tokenizer("tiny-llama")
    pairs, cpu, passes = load_pairs_of(YES_NO[:17], tokenizer), torch.device("cpu"), []
    torch.manual_seed(0)
    model = lora.add_lora(load_model("tiny-llama"), 8, 16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr("day23.dpo.over_ranks", lambda total, *_: total)
    whole, found = held_out_rewards(model, pairs, tokenizer.pad_token_id, 0.1, cpu, []), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        passes.clear()
        found.append(held_out_rewards(model, pairs, tokenizer.pad_token_id, 0.1, cpu, []))
        assert len(passes) == 2 * 2  # policy and reference, two micro-batches each, on either rank
    for name in whole:
        assert found[0][name] + found[1][name] == pytest.approx(whole[name], abs=1e-4), name
    assert whole["accuracy"] > 0 and whole["margin"] != 0


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"question": "Hi?", "good": "Yes."}] * 4, "has the columns question, good: wanted are `prompt`, `chosen`"),
        ([{"prompt": "Hi?", "chosen": 1, "rejected": 0}] * 4, "has the columns prompt, chosen, rejected: wanted are"),
        ([{"chosen": DIALOGUES[0], "rejected": DIALOGUES[1] * 2}] * 4, "differ in more than their last message"),
        ([{**row, "chosen": " "} for row in YES_NO[:9]], "0 training pairs are left, and 2 ranks need at least 2"),
        ([{**row, "rejected": row["chosen"]} for row in YES_NO[:9]], "a pair has two different answers"),
        (YES_NO[:5], "1 held-out pairs are left, and 2 ranks need at least 2"),
    ],
    ids=["columns", "numbers", "dialogues", "empty", "equal", "ranks"],
)
def test_pairs_that_teach_nothing_get_one_sentence(rows, sentence, tmp_path, monkeypatch):
    from day22.pretrained import load_tokenizer
    from day23.pairs import load_pairs

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_pairs(str(write_rows(rows, tmp_path / "pairs.jsonl")), load_tokenizer("tiny-llama"), 128)


def test_pairs_that_are_left_out_are_counted(tmp_path, capsys):
    from day22.pretrained import load_tokenizer
    from day23.pairs import load_pairs

    rows = [{**YES_NO[0], "chosen": ""}, {**YES_NO[0], "rejected": YES_NO[0]["chosen"]}]
    rows += [{**YES_NO[0], "chosen": "word " * 200}, *YES_NO]
    training, held_out = load_pairs(str(write_rows(rows, tmp_path / "p.jsonl")), load_tokenizer("tiny-llama"), 64)
    assert len(training) + len(held_out) in (len(YES_NO), len(YES_NO) - 1)
    said = capsys.readouterr().out
    assert "1 with an empty answer, 1 with the same answer twice, 1 of more than 64 tokens" in said
    with pytest.raises(UserError, match="pairs 'nothing-here' are neither shipped"):
        load_pairs("nothing-here", load_tokenizer("tiny-llama"), 64)


def test_recorded_run_reaches_the_bar():
    """Day 22's gain on SmolLM2 to at least 80 %, with less than 2 % of the parameters, in ten minutes on two cores."""
    full, lora = (json.loads((ROOT / f"{day}/results/train_2cpu.json").read_text()) for day in ("day22", "day23"))
    gains = []
    for result in (full, lora):
        held_out = [row["held_out_loss"] for row in result["rows"] if "held_out_loss" in row]
        gains.append(held_out[0] - held_out[-1])
    assert gains[1] >= 0.8 * gains[0] and lora["wall_s"] <= 600
    assert float(re.search(r"trained = ([\d.]+)%", "\n".join(lora["output"]))[1]) < 2
