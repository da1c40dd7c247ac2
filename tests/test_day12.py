"""Day 12: a long run's parts - groups, schedule, checkpoints that continue bitwise - and what it holds and uses."""

import argparse
import json
import re
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from common.errors import UserError
from common.model import PRESETS
from common.run_log import read_rows
from config.read import read_config
from day12 import checkpoint, exercise
from day12.gpt import build_gpt, parameter_groups, to_transformers
from day12.resources import peak_flops
from tests.launch import SMALL_CORPUS, run_day, run_ranks, run_warm
from tests.render import ROOT

FP32 = "day12/ds_config_fp32.json"
NUM_PARAMS, NUM_MATRIX, NUM_VECTOR = 934_528, 933_888, 640  # tiny, without biases


def losses(run_dir) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(run_dir) if "loss" in row}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(the run, its folder) of the default config: autocast, ZeRO-0, through the launcher."""
    run_dir = tmp_path_factory.mktemp("smoke")
    flags = ["--steps", 20, "--log_every", 5, "--eval_every", 10, "--save_every", 20, "--sample_every", 20]
    return run_day("day12/train.py", *flags, "--corpus", SMALL_CORPUS, "--run_dir", run_dir), run_dir


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Run folders of 12 steps in one go, and of the same continued after step 6. An epoch has 5 steps."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("\n\n".join(f"Call me Ishmael, number {i}, some years ago." * 40 for i in range(19)))
    flags = ["--deepspeed_config", FP32, "--steps", 12, "--log_every", 1, "--sample_every", 3, "--eval_every", 6]
    flags += ["--save_every", 6, "--corpus", corpus]
    whole, rest = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("rest")
    run_ranks("day12/train.py", *flags, "--run_dir", whole, ranks=2)
    (whole / "checkpoints/latest").write_text("step6")  # as if the run had been killed before its second checkpoint
    run = run_ranks("day12/train.py", *flags, "--run_dir", rest, "--resume", whole, ranks=2)
    return whole, rest, run


@pytest.mark.launch
def test_train_learns_with_every_part_on(smoke):
    run, run_dir = smoke
    assert "zero stage 0 | autocast torch.bfloat16 | compiled False" in run.stdout
    assert f"AdamW: weight decay 0.1 for {NUM_MATRIX:,} parameters" in run.stdout
    assert f"AdamW: weight decay 0.0 for {NUM_VECTOR} parameters" in run.stdout
    assert "schedule WarmupCosineLR, 20 steps" in run.stdout
    assert list(run.held_out) == [0, 10, 20] and run.held_out[20] < run.held_out[0] - 0.5
    assert "step   20 | sample 'The" in run.stdout and (run_dir / "checkpoints/step20").is_dir()
    assert "GPU utilisation unknown: the ranks are CPU processes" in run.stdout or torch.cuda.is_available()
    rates = [row["lr"] for row in read_rows(run_dir) if "lr" in row]
    assert max(rates) <= 0.004 and rates[-1] == pytest.approx(0.0004, rel=0.1)  # cos_min_ratio 0.1, reached at the end


@pytest.mark.launch
def test_log_rows_say_where_the_time_went(smoke):
    rows = [row for row in read_rows(smoke[1]) if "data_share" in row]
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20]
    assert all(0 < row["data_share"] < 1 for row in rows)
    run = run_warm("day12/labs/resources.py", smoke[1], "--measure")
    assert "934,528 parameters" in run.stdout and "%" in run.stdout and (smoke[1] / "resources.png").exists()


@pytest.mark.launch
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(interrupted):
    whole, rest, run = interrupted
    assert "after step 6" in run.stdout
    assert losses(rest) == {step: loss for step, loss in losses(whole).items() if step > 6}
    samples = [[row["sample"] for row in read_rows(d) if "sample" in row] for d in (whole, rest)]
    assert samples[1] == samples[0][2:], "rank 0 draws other random numbers than it would have"
    first, second = (
        torch.load(d / "checkpoints/step12/mp_rank_00_model_states.pt", weights_only=False) for d in (whole, rest)
    )
    assert all(torch.equal(first["module"][name], second["module"][name]) for name in first["module"])
    assert first["lr_scheduler"] == second["lr_scheduler"]
    for a, b in zip(first["random"], second["random"], strict=True):
        assert torch.equal(a[0], b[0])
    assert not torch.equal(first["random"][0][0], first["random"][1][0])  # rank 0 alone writes samples
    for rank in (0, 1):
        name = f"checkpoints/step12/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        states = [torch.load(d / name, weights_only=False)["optimizer_state_dict"] for d in (whole, rest)]
        parts = [state["single_partition_of_fp32_groups"] for state in states]
        assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))
        adam, same = (state["base_optimizer_state"]["state"] for state in states)
        for group, values in adam.items():
            assert all(torch.equal(values[name], same[group][name]) for name in ("step", "exp_avg", "exp_avg_sq"))


class FinishedEngine:
    """What `resume` asks of an engine, after 12 steps."""

    global_rank, dp_world_size = 0, 2

    def train_micro_batch_size_per_gpu(self) -> int:
        return 8

    def gradient_accumulation_steps(self) -> int:
        return 1

    def load_checkpoint(self, folder: str) -> tuple[str, dict]:
        return folder, {"step": 12, "random": [(torch.get_rng_state(), torch.get_rng_state())]}


def test_bad_input_gets_one_sentence(tmp_path):
    old = {"model": "tiny", "corpus": "all", "seed": 0, "batch": "8 micro x 1 accumulation x 2 ranks"}
    (tmp_path / "settings.json").write_text(json.dumps(old))
    new_run = {
        "resume": str(tmp_path),
        "run_dir": "elsewhere",
        "steps": 13,
        "model": "tiny",
        "corpus": "all",
        "seed": 0,
    }
    assert checkpoint.resume(FinishedEngine(), argparse.Namespace(**new_run)) == 12
    assert checkpoint.resume(FinishedEngine(), argparse.Namespace(**new_run | {"resume": None})) == 0
    for args, sentence in (
        ({"resume": "nowhere"}, "no settings.json there"),
        ({"seed": 1}, "that run had seed 0, this one has 1"),
        ({"run_dir": str(tmp_path)}, "its log would be overwritten"),
        ({"steps": 12}, "that run has 12 steps; --steps must be more"),
    ):
        with pytest.raises(UserError, match=sentence):
            checkpoint.resume(FinishedEngine(), argparse.Namespace(**new_run | args))


@pytest.mark.parametrize(
    ("script", "flags", "sentence"),
    [
        ("train", ["--save_every", "0"], "--save_every 0: take 1 or more"),
        ("train", ["--global_batch", "12"], "--global_batch 12: a multiple of 16, micro-batch x ranks"),
        ("train", ["--tokens", "2000"], "--tokens 2000: one optimizer step takes 2,048"),
        ("oom", ["--micro_batch", "1"], "--micro_batch 1 cannot be halved"),
        ("oom", ["--micro_batch", "3"], "--micro_batch 3 cannot be halved"),
        ("oom", ["--limit_gib", "-1"], "--limit_gib -1.0 leaves no memory at all"),
        ("trial", ["--steps", "1"], "--steps 1: take 2 or more"),
        ("memory", ["--loss_chunks", "0"], "--loss_chunks 0: take 1 or more"),
        (
            "speed",
            ["--nanogpt", "day12"],
            "--nanogpt day12: no model.py there; git clone https://github.com/karpathy/nano",
        ),
        ("speed", ["--steps", "5"], "--steps 5 --window 10: take two windows or more"),
        ("resources", ["nowhere"], "no log nowhere/metrics.jsonl"),
        ("train", ["--deepspeed_config", "no.json"], r"no config file 'no\.json'"),
        ("train", ["--deepspeed_config", "TWICE"], "holds the key 'bf16' twice"),
    ],
)
def test_bad_flags_get_one_sentence(script, flags, sentence, monkeypatch, tmp_path):
    (tmp_path / "twice.json").write_text('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}')
    flags = [str(tmp_path / "twice.json") if flag == "TWICE" else flag for flag in flags]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", [f"day12/{script}.py", *flags])
    with pytest.raises(UserError, match=sentence):
        import_module("day12.train" if script == "train" else f"day12.labs.{script}").main()


def test_flops_per_token_are_those_that_pytorch_counts():
    for name in ("tiny", "mini"):
        counted = exercise.counted_flops(name, 4096)
        assert build_gpt(name, 4096).flops_per_token(PRESETS[name].block_size) == pytest.approx(counted, rel=1e-3)
    with torch.device("meta"):  # 12 layers of 12 x 768^2, 50,304 x 768; 12 x 12 x 768 x 1,024
        flops = build_gpt("gpt2", 50257).flops_per_token(1024)
    assert flops == 6 * (84_934_656 + 38_633_472 + 19_200) + 113_246_208


def test_matrices_decay_and_vectors_do_not():
    matrices, vectors = parameter_groups(build_gpt("tiny", 4096))
    assert sum(p.numel() for p in matrices["params"]) == NUM_MATRIX and "weight_decay" not in matrices
    assert sum(p.numel() for p in vectors["params"]) == NUM_VECTOR and vectors["weight_decay"] == 0.0


def test_the_schedule_follows_the_steps():
    config = read_config(ROOT / "day12/ds_config.json")
    import_module("day12.train").stretch_schedule(config, 60)
    assert config["scheduler"]["params"]["total_num_steps"] == 60
    assert config["scheduler"]["params"]["warmup_num_steps"] == 6  # a tenth, as in the file
    for total in (0, "auto"):
        config["scheduler"]["params"]["total_num_steps"] = total
        with pytest.raises(UserError, match=f"total_num_steps {total!r} in the scheduler's params: an integer"):
            import_module("day12.train").stretch_schedule(config, 60)


def test_a_token_budget_is_the_same_text_for_every_batch():
    """16 sequences of 128 tokens a step on two ranks of 8; 64 with four micro-batches: a quarter of the steps."""
    flags = {"tokens": 614_400, "steps": 300, "log_every": 20, "eval_every": 9, "sample_every": 9, "save_every": 9}
    for global_batch, steps, accumulation in ((None, 300, 1), (64, 75, 4)):
        config = read_config(ROOT / "day12/ds_config.json")
        args = argparse.Namespace(**flags, global_batch=global_batch)
        import_module("day12.train").plan_run(config, args, block_size=128, ranks=2)
        assert (args.steps, config["gradient_accumulation_steps"]) == (steps, accumulation)
        assert config["scheduler"]["params"]["total_num_steps"] == steps


# An engine on one rank: what day12/fast.py changes is asked for, counted, and has the same result.
FAST = """
import sys

import deepspeed
import torch

from bench.traffic import count_traffic
from bench.world import join_world
from common.ranks import print0
from config.read import read_config
from day12 import fast
from day12.gpt import build_gpt

join_world()
clip, clipped = torch.nn.utils.clip_grad_norm_, []
torch.nn.utils.clip_grad_norm_ = lambda parameters, norm: clipped.append(norm) or clip(parameters, norm)
for changes in ((), (fast.clip_with_pytorch, fast.skip_averaging)):
    torch.manual_seed(0)
    model = build_gpt("tiny", 4096)
    config = read_config("day12/ds_config.json") | {"gradient_clipping": 0.1}
    config.pop("scheduler")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for change in changes:
        change(engine)
    ids = torch.arange(128).repeat(2, 1)
    with count_traffic() as traffic:
        for _ in range(2):
            loss = engine(ids, ids).loss
            engine.backward(loss)
            engine.step()
    print0(f"messages {sum(map(len, traffic.calls.values()))} | clipped at {clipped} | loss {loss.item():.6f}")
"""


@pytest.mark.launch
def test_fast_clips_with_pytorch_and_averages_with_nobody(tmp_path):
    script = tmp_path / "fast.py"
    script.write_text(FAST)
    plain, fast = re.findall(r"^messages (\d+) \| clipped at (.*) \| loss (.*)$", run_ranks(str(script)).stdout, re.M)
    assert int(plain[0]) > 0 and plain[1] == "[]"
    assert (int(fast[0]), fast[1]) == (0, "[0.1, 0.1]")
    assert float(fast[2]) == pytest.approx(float(plain[2]), abs=1e-3)


def test_batches_continue_where_they_were():
    blocks = list(range(50))
    sampler = DistributedSampler(blocks, num_replicas=2, rank=1, seed=3)
    loader = DataLoader(blocks, batch_size=4, sampler=sampler, drop_last=True)

    def some(position: int, count: int) -> list[list[int]]:
        return [b.tolist() for b, _ in zip(checkpoint.batches_from(loader, position), range(count), strict=False)]

    first = some(0, 16)
    for position in (1, 6, 7):  # an epoch has 6
        assert some(position, 9) == first[position : position + 9]
    assert first[:6] != first[6:12]


CARDS = {  # as torch names them; dense bf16 TFLOP/s, or None where no figure is known for certain
    "NVIDIA A100-SXM4-80GB": 312, "A100-PCIE-40GB": 312, "NVIDIA A800 80GB PCIe": 312, "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989, "NVIDIA H800": 989, "NVIDIA H20": 148, "NVIDIA H20-3e": 148,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 4090 D": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA H200 NVL": None,
    "NVIDIA H800 PCIe": None, "NVIDIA A100-SXM4-80GB MIG 3g.40gb": None,
}  # fmt: skip


def test_peak_flops_are_known_for_listed_devices_only(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    for name, tflops in CARDS.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12), name


@pytest.mark.parametrize(
    ("part", "answer", "sentence"),
    [
        ("flops", lambda preset, vocabulary: None, "TODO 1, flops_per_token(tiny) is None, not a number"),
        ("mfu", lambda rows: "0.42", "TODO 2, mfu of the log is '0.42', not a number"),
        ("groups", lambda model: None, 'TODO 3, a group has the keys "params" and "weight_decay", not None'),
        ("groups", lambda model: [{"params": model.parameters()}], "\"weight_decay\", not ['params']"),
        (
            "groups",
            lambda model: [{"params": model.named_parameters(), "weight_decay": 0.1}],
            "TODO 3, a tuple in a group is no parameter of the model",
        ),
    ],
)
def test_the_exercise_says_what_is_wrong(part, answer, sentence):
    with pytest.raises(UserError) as told:
        getattr(exercise, f"check_{part}")(answer)
    assert sentence in str(told.value)


@pytest.fixture(scope="module")
def timelines(tmp_path_factory):
    """Samples of memory.py on two ranks, ZeRO-1, plain and with both cures."""
    found = {}
    for name, flags in (("plain", []), ("cured", ["--recompute", "--loss_chunks", 8])):
        run_dir = tmp_path_factory.mktemp(name)
        flags = ["--corpus", SMALL_CORPUS, "--steps", 2, *flags, "--run_dir", run_dir]
        run_ranks("day12/labs/memory.py", *flags, ranks=2)
        assert (run_dir / "memory.png").exists()
        samples = json.loads((run_dir / "memory.json").read_text())["samples"]
        found[name] = {sample["when"]: sample for sample in samples if sample["step"] == 2}
    return found


@pytest.mark.launch
def test_the_memory_timeline_adds_up(timelines):
    plain = timelines["plain"]
    order = ["start", "forward 0", "forward 1", "forward", "backward 1", "backward 0", "backward", "step"]
    assert list(plain) == order
    for sample in plain.values():
        kinds = ("parameters", "optimizer", "gradients", "buckets", "activations", "other")
        assert sample["total"] == sum(sample[kind] for kind in kinds)
        assert sample["parameters"] == 4 * NUM_PARAMS
        assert sample["optimizer"] == pytest.approx(12 * NUM_PARAMS / 2, rel=1e-3)  # fp32 weights and two moments
    assert plain["start"]["activations"] == plain["backward"]["activations"] == 0 == plain["step"]["gradients"]
    assert plain["forward 0"]["activations"] < plain["forward 1"]["activations"] < plain["forward"]["activations"]
    assert plain["forward"]["activations"] > 2 * 4096 * 8 * 128  # the logits alone are twice that
    assert plain["backward"]["gradients"] >= 4 * NUM_PARAMS / 2
    assert plain["start"]["total"] == pytest.approx(plain["step"]["total"], rel=1e-3)


@pytest.mark.launch
def test_cures_show_in_the_timeline(timelines):
    plain, cured = timelines["plain"], timelines["cured"]
    assert cured["forward 1"]["activations"] < 0.3 * plain["forward 1"]["activations"]  # two block inputs are left
    assert cured["forward"]["activations"] < 0.3 * plain["forward"]["activations"]  # and no logits


@pytest.mark.launch
def test_oom_is_provoked_and_cured(tmp_path):
    flags = ["--ranks", 1, "--model", "tiny", "--micro_batch", 32, "--steps", 2, "--cases", "loss_chunks"]
    run = run_warm("day12/labs/oom.py", *flags, "--run_dir", tmp_path)
    result = json.loads((tmp_path / "oom.json").read_text())
    assert "you tried to allocate" in result["complaint"] or "out of memory" in result["complaint"]
    base, chunks = result["table"]
    assert base["fits"] == "no" and chunks["fits"] == "yes" and result["fastest"] == "loss_chunks"
    assert "trains" in result["proof"], run.stdout  # under the limit
    logits = 4 * 4096 * 32 * 128 / 2**30  # in GiB; the loss holds them, their softmax and the gradient
    assert chunks["saved_gib"] > 1.5 * logits
    assert chunks["losses"] == pytest.approx(base["losses"], abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the fused loss is a CUDA kernel")
def test_train_on_a_gpu_compiles_and_knows_its_mfu(tmp_path):
    flags = ["--steps", 20, "--log_every", 5, "--corpus", SMALL_CORPUS, "--run_dir", tmp_path]
    run = run_day("day12/train.py", *flags, ranks=1)
    assert "compiled True" in run.stdout and run.held_out[20] < run.held_out[0] - 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the fused loss is a CUDA kernel")
def test_the_fused_loss_is_the_plain_one():
    torch.manual_seed(0)
    model = build_gpt("tiny", 4090).cuda()
    ids = torch.randint(0, 4090, (2, 128), device="cuda")
    gradients = []
    for model.fused_loss in (False, True):
        loss = model(ids, ids).loss
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        model.zero_grad()
    for plain, fused in zip(*gradients, strict=True):
        assert torch.allclose(plain, fused, atol=1e-5), (plain - fused).abs().max()


def test_the_model_takes_the_fused_loss_from_its_day(monkeypatch):
    """Without the kernel, which needs a GPU: whatever day12.loss offers is what the model uses."""
    kernel = SimpleNamespace(linear_cross_entropy=lambda x, weight, targets, vocab_size: targets.sum() * 0 + vocab_size)
    monkeypatch.setitem(sys.modules, "day12.loss", kernel)
    model, ids = build_gpt("tiny", 4090), torch.zeros(2, 8, dtype=torch.long)
    model.fused_loss = True
    assert model(ids, ids).loss.item() == pytest.approx(4090 / 14)  # 2 x 7 positions have a next token


@pytest.mark.parametrize("vocab_size", [4096, 4090], ids=["whole", "padded"])
def test_the_lean_model_is_a_gpt2_whose_biases_are_zero(vocab_size):
    """Logits, loss, and the gradients of each way to compute it: in parts, with recomputation."""
    torch.manual_seed(0)
    model = build_gpt("tiny", vocab_size)
    ids = torch.randint(0, vocab_size, (2, 128))
    theirs = to_transformers(model, eos_token_id=0)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, theirs(ids).logits, atol=1e-5)
        assert model(ids, ids).loss.item() == pytest.approx(theirs(ids, labels=ids).loss.item(), abs=1e-5)
    gradients = []
    for model.recompute, model.loss_chunks in ((False, 1), (True, 1), (False, 4)):
        model(ids, ids).loss.backward()
        gradients.append(model.wte.weight.grad.clone())
        model.zero_grad()
    assert all(torch.allclose(other, gradients[0], atol=1e-7) for other in gradients[1:])
    assert gradients[0][vocab_size:].abs().sum() == 0  # ids that pad the vocabulary learn nothing


# What day12/labs/speed.py uses of a clone of nanoGPT, around day 12's own model.
LIKE_NANOGPT = """
from dataclasses import dataclass

import torch

from common.model import Preset
from day12 import gpt


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class GPT(gpt.GPT):
    def __init__(self, config):
        assert not config.bias and not config.dropout
        super().__init__(Preset(config.n_layer, config.n_head, config.n_embd, config.block_size), config.vocab_size)

    def forward(self, idx, targets):
        logits = super().forward(idx).logits
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""


@pytest.mark.launch
def test_deepspeed_and_plain_pytorch_train_the_same_model(tmp_path):
    """Every change of the ladder that a CPU can make leaves the losses where they were; the last rung is PyTorch's."""
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/model.py").write_text(LIKE_NANOGPT)
    cases = ["lean", "no_average", "torch"]
    flags = ["--cases", *cases, "--steps", 6, "--window", 2, "--turns", 2, "--micro_batch", 2, "--corpus", SMALL_CORPUS]
    run_ranks("day12/labs/speed.py", *flags, "--nanogpt", tmp_path / "clone", "--run_dir", tmp_path, ranks=1)
    result = json.loads((tmp_path / "speed.json").read_text())
    lean, last, plain, nanogpt = (row["losses"] for row in result["table"])
    assert nanogpt == pytest.approx(lean, abs=3e-4) and result["turns"]["ratio_nanogpt"] > 0  # 8e-5
    flags = ["--steps", 6, "--log_every", 1, "--micro_batch", 2, "--corpus", SMALL_CORPUS]
    baseline = run_warm("day12/labs/baseline_torch.py", *flags, "--run_dir", tmp_path)
    if not torch.cuda.is_available():  # there the script compiles, and narrows the stream
        assert list(baseline.losses.values()) == pytest.approx(lean, abs=3e-4)  # 2e-5 on one CPU, 1.4e-4 on another
    assert plain[-1] < plain[0]
    assert last == pytest.approx(plain, abs=1e-5) and result["turns"]["losses_apart"] < 1e-5
    assert lean == pytest.approx(plain, abs=1e-2)  # a wider stream between blocks: 2e-4 was measured
