"""config/plan.py: the papers' numbers by hand, what DeepSpeed really allocates, recommendations, bad input."""

import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.error

import pytest

from config import memory, models, plan, presets
from tests.launch import ROOT, Run, run_plain, run_ranks
from tests.plan_points import LLAMA_8B, OOM, XL, points, public_rows, public_table, random_run

HOST = ["--host_mem", 512]
TEMPLATES = {path.stem for path in (ROOT / "config").glob("*.json")}


@pytest.fixture
def run_plan(capsys):
    """`python config/plan.py FLAG...` without the start of a Python."""

    def run(*flags: object) -> Run:
        capsys.readouterr()
        try:
            code = plan.main([str(flag) for flag in flags])
        except SystemExit as end:  # argparse
            code = end.code
        return Run(code, *capsys.readouterr())

    return run


# ---- arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_figure_1_of_the_zero_paper(stage, gigabytes):
    """7.5B parameters on 64 GPUs: 16Ψ, 4Ψ + 12Ψ/64, 2Ψ + 14Ψ/64, 16Ψ/64."""
    states = plan.model_state_bytes(7.5e9, 64, stage)
    assert round(states["total"] / 1e9, 1) == gigabytes
    assert states["total"] == states["parameters"] + states["gradients"] + states["optimizer"]


def test_fp32_zero_keeps_the_weights_twice():
    """Without ZeRO 4 + 4 + 8 bytes a parameter; with it 4Ψ + 4Ψ + (4 + 8)Ψ/N, so one rank needs more, not less."""
    assert plan.model_state_bytes(100, 1, 0, "fp32")["total"] == 1600
    assert plan.model_state_bytes(100, 1, 1, "fp32")["total"] == 2000
    assert plan.model_state_bytes(100, 4, 2, "fp32")["total"] == 400 + 100 + 300


def test_gpt2_xl_by_hand():
    model = plan.gpt2_model("gpt2-xl")
    assert model.num_params == 50257 * 1600 + 1024 * 1600 + 48 * (12 * 1600**2 + 13 * 1600) + 2 * 1600 == 1_557_611_200
    kept = plan.activation_bytes(model, 1024, 8, checkpointing=True)
    assert kept["layers"] == 2 * 48 * 1024 * 8 * 1600
    assert kept["recompute"] == 56 * 1024 * 8 * 1600
    assert kept["logits"] == 12 * 1024 * 8 * 50257


def test_presets_are_those_of_common():
    from common.model import PRESETS

    for name, preset in PRESETS.items():
        assert plan.GPT2[name][:4] == (preset.num_layers, preset.hidden, preset.num_heads, preset.block_size)


def test_buckets_are_allocated_in_full():
    model = plan.gpt2_model("tiny")
    assert model.num_params < 1e6
    default = {"zero_optimization": {"stage": 2}}
    assert plan.predict(model, default, 2, 8, 1)["buffers"]["buckets"] == 2 * 500_000_000
    overlap = {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}}
    assert plan.predict(model, overlap, 2, 8, 1, "fp32")["buffers"]["buckets"] == 2 * 4 * 1000


def test_gradients_that_straddle_a_cut_are_kept_whole():
    """Sizes 6, 2, 2 on two ranks: the cut at 5 goes through the first parameter, and both ranks keep all 6 of it."""
    assert plan.owned_gradient_elements((6, 2, 2), 2) == 10
    assert plan.owned_gradient_elements((5, 5), 2) == 5


def tiny_model(family: str, layers: int, attention: str = "sdpa", dtype=None, **differs):
    """A real model of `transformers` and its config, 128 wide, without dropout."""
    import transformers

    same = {"vocab_size": 64, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    same |= {"attn_implementation": attention}
    if family == "gpt2":
        dropout = dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)
        config = transformers.GPT2Config(n_layer=layers, n_embd=128, n_head=4, **same, **dropout, **differs)
    else:
        sizes = {"hidden_size": 128, "intermediate_size": 341, "num_attention_heads": 4, "num_key_value_heads": 4}
        kind = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
        config = getattr(transformers, kind[family])(num_hidden_layers=layers, **same, **(sizes | differs))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    model.loss_type = "ForCausalLM"
    return model, config


def with_lora(model, rank: int, targets: str):
    """Adapters in the base's precision, as DeepSpeed's bf16 makes them."""
    import peft

    names = "all-linear" if targets == "all-linear" else targets.split()
    wide = model.config.model_type == "gpt2"  # its matrices are transposed
    config = peft.LoraConfig(r=rank, target_modules=names, task_type="CAUSAL_LM", fan_in_fan_out=wide)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


SHAPES = {  # family, what differs in its config, attention, what differs in the run
    "gpt2": ("gpt2", {}, "sdpa", {}),
    "gpt2_fused": ("gpt2", {"activation_function": "gelu_pytorch_tanh"}, "sdpa", {}),
    "gpt2_eager": ("gpt2", {}, "eager", {}),
    "llama": ("llama", {}, "sdpa", {}),
    "llama_grouped": ("llama", {"num_key_value_heads": 1, "intermediate_size": 448}, "sdpa", {}),
    "llama_eager": ("llama", {"num_key_value_heads": 2}, "eager", {}),
    "qwen2_grouped": ("qwen2", {"num_key_value_heads": 2}, "sdpa", {}),
    "qwen3_grouped": ("qwen3", {"num_key_value_heads": 2, "head_dim": 48}, "sdpa", {}),
    "llama_lora": ("llama", {"num_key_value_heads": 2}, "sdpa", {"lora_rank": 4}),
    "llama_lora_qv": ("llama", {}, "sdpa", {"lora_rank": 4, "lora_targets": "q_proj v_proj"}),
    "qwen3_lora": ("qwen3", {"head_dim": 48}, "sdpa", {"lora_rank": 4}),
    "gpt2_lora": ("gpt2", {}, "sdpa", {"lora_rank": 4}),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_match_what_autograd_saves(case, checkpointing, precision):
    """Bytes a layer saves for backward, counted by storage: `layer_token_bytes` and its statistics hold to 1 %."""
    import torch

    family, differs, attention, more = SHAPES[case]
    seq_len, micro_batch = 32, 2

    def saved_bytes(layers: int) -> tuple[int, dict]:
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        model, config = tiny_model(family, layers, attention, dtype, **differs)
        if more:
            model = with_lora(model, more["lora_rank"], more.get("lora_targets", "all-linear"))
            model.enable_input_require_grads()  # or a checkpoint, whose input needs no gradient, computes none
        if checkpointing:
            model.gradient_checkpointing_enable()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages, kept = {}, []

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor)  # keeps the address from being used again
            return tensor

        ids = torch.zeros(micro_batch, seq_len, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=ids, labels=ids)
        return sum(size for address, size in storages.items() if address not in weights), config.to_dict()

    of_four, config = saved_bytes(4)
    a_layer = (of_four - saved_bytes(2)[0]) / 2
    model = models.config_model(config | {"n_layer" if family == "gpt2" else "num_hidden_layers": 1}, case)
    more = {"attention": attention, **more}
    predicted = plan.activation_bytes(model, seq_len, micro_batch, precision, checkpointing, **more)["layers"]
    # left out are 4 bytes a token and head, up to 16 a token, and with norms of queries and keys 4 for each of these
    assert predicted == pytest.approx(a_layer, rel=0.01)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_real_model(family, tied):
    """In order, as the flat buffer has them; and those of the adapters that peft puts beside every matrix."""
    import torch

    grouped = {} if family == "gpt2" else {"num_key_value_heads": 2, "tie_word_embeddings": tied}
    with torch.device("meta"):
        model, config = tiny_model(family, 3, **grouped)
    planned = models.config_model(config.to_dict(), family)
    assert planned.sizes == tuple(parameter.numel() for parameter in model.parameters())
    run = {**plan.RUN, **planned.shape(), "lora_rank": 4}
    assert run["extra"] == 0 and memory.parameter_sizes(run) == list(planned.sizes)
    with torch.device("meta"):
        adapters = [p.numel() for p in with_lora(model, 4, "all-linear").parameters() if p.requires_grad]
    assert memory.lora_sizes(run, 3) == adapters


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_have_the_parameters_that_their_pages_say(name):
    assert models.named_model(name).num_params == presets.PUBLISHED[name]


def test_longer_segments_tiles_and_shared_sequences():
    """Of one shape: what day 21's switches change, and what they leave alone."""
    model = plan.gpt2_model("gpt2-xl")
    plain = plan.activation_bytes(model, 1024, 8, checkpointing=True)
    fours = plan.activation_bytes(model, 1024, 8, checkpointing=True, every=4)
    assert (fours["layers"], fours["recompute"]) == (plain["layers"] / 4, plain["recompute"] * 4)
    tiled = plan.activation_bytes(model, 1024, 8, loss_tiles=8)
    head = 2 * 1600 * 50257
    assert tiled["logits"] == plain["logits"] / 8 + 2 * head + 2 * 1600 * 1024 * 8
    shared = plan.activation_bytes(model, 1024, 8, checkpointing=True, sequence_ranks=2)
    assert shared == {what: size / 2 for what, size in plain.items()}


def test_the_papers_34_is_a_fused_layer_with_two_dropout_masks():
    model = plan.Model("", 1, 1600, 25, 50257, (1,), "gpt2", fused_gelu=True)
    masks = 2 * 1600  # a byte an element
    assert plan.layer_bytes(model)["kept"] + masks == 34 * 1600


@pytest.mark.parametrize(("text", "count"), [("7e9", 7e9), ("7B", 7e9), ("7b", 7e9), ("1.3e9", 1.3e9), ("350M", 350e6)])
def test_numbers_of_parameters(text, count):
    assert plan.parse_count(text) == count
    assert plan.assumed_model(int(count)).num_params == count


# ---- recommendations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "template"),
    [
        (["--model", "gpt2", "--gpus", 1, "--gpu_mem", 24], "single_gpu_bf16"),
        (["--model", "gpt2", "--gpus", 1, "--gpu_mem", 24, "--precision", "fp16"], "zero2_fp16"),
        (["--model", "gpt2-xl", "--gpus", 1, "--gpu_mem", 24], "zero2_bf16_offload_cpu"),
        (["--params", "7B", "--gpus", 8, "--gpu_mem", 80], "zero1_bf16"),
        (["--params", "7B", "--gpus", 8, "--gpu_mem", 36], "zero3_bf16_throughput"),
        (["--params", "13B", "--gpus", 8, "--gpu_mem", 40, "--checkpointing"], "zero3_bf16_throughput"),
        (["--params", "13B", "--gpus", 8, "--gpu_mem", 16, "--checkpointing", *HOST], "zero3_bf16_offload_cpu"),
        (["--params", "70B", "--gpus", 8, "--gpu_mem", 80, "--checkpointing", *HOST], "zero3_bf16_offload_nvme"),
    ],
)
def test_recommended_template(run_plan, flags, template, tmp_path):
    done = run_plan(*flags, "--write", tmp_path / "ds_config.json")
    assert done.code == 0, done.stderr
    assert f"Use config/{template}.json" in done.stdout and template in TEMPLATES
    written = json.loads((tmp_path / "ds_config.json").read_text())
    assert written["train_micro_batch_size_per_gpu"] == 1
    assert json.dumps(written, indent=2) in done.stdout


def test_every_candidate_is_a_template():
    assert set(plan.ONE_GPU + plan.MANY_GPUS) <= TEMPLATES


def test_nothing_fits():
    """This one in a Python of its own: the program's exit code."""
    done = run_plain("config/plan.py", "--params", "7B", "--gpus", 2, "--gpu_mem", 8, "--host_mem", 8, check=False)
    assert done.code == 2 and "Nothing fits." in done.stdout and "Use config/" not in done.stdout


def test_a_folder_with_a_config_works_offline(tmp_path):
    import transformers

    transformers.LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    ).save_pretrained(tmp_path)
    model = models.named_model(str(tmp_path))
    assert model.sizes == models.named_model(f"{tmp_path}/config.json").sizes
    assert (model.layers, model.hidden, model.vocab, model.family) == (3, 64, 1000, "llama")
    assert model.num_params == 2 * 1000 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64


def test_another_kind_of_model_is_counted_by_transformers(tmp_path):
    import transformers

    transformers.OPTConfig(
        vocab_size=100, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    ).save_pretrained(tmp_path)
    model = models.named_model(str(tmp_path))
    assert (model.layers, model.hidden) == (2, 64) and model.num_params > 2 * 4 * 64 * 64
    assert memory.count_parameters({**plan.RUN, **model.shape()}) == model.num_params


def test_a_name_on_the_hub(monkeypatch, run_plan, tmp_path):
    """Its config.json is fetched; without a network one sentence says so within the time that is given."""
    config = {**presets.PRESETS["qwen2.5-7b"], "architectures": ["Qwen2ForCausalLM"]}
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    class Page:
        __enter__ = __exit__ = lambda self, *error: self if not error else None
        read = staticmethod(lambda: json.dumps(config).encode())

    asked = []
    monkeypatch.setattr(models.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or Page())
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert models.named_model("someone/fine-tuned").num_params == presets.PUBLISHED["qwen2.5-7b"]
    assert asked == ["https://mirror.example/someone/fine-tuned/resolve/main/config.json"]

    def forbidden(url, timeout):
        raise urllib.error.HTTPError(url, 401, "Unauthorized", None, None)

    flags = ["--model", "someone/private", "--gpus", 8, "--gpu_mem", 80]
    monkeypatch.setattr(models.urllib.request, "urlopen", forbidden)
    assert "no config.json of someone/private to everybody (HTTP 401)" in run_plan(*flags).stderr
    monkeypatch.setattr(models, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(models.urllib.request, "urlopen", lambda url, timeout: time.sleep(3) or Page())
    start = time.monotonic()
    done = run_plan(*flags)
    assert done.code == 1 and "the Hub is not reachable (no answer in 0.2 s)" in done.stderr
    assert done.stderr.count("\n") == 1 and time.monotonic() - start < 2
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids" in run_plan(*flags).stderr
    cached = tmp_path / "hub/models--someone--private/snapshots/0"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text(json.dumps(config))
    assert run_plan(*flags, "--checkpointing").code == 0  # a model that was loaded before needs no network


def test_the_plan_needs_no_torch():
    """Nor transformers: somebody installs it for the arithmetic alone."""
    program = "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'deepspeed']); import config.plan;"
    program += "sys.exit(config.plan.main('--model qwen3-8b --gpus 8 --gpu_mem 80 --checkpointing'.split()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Use config/zero1_bf16.json" in done.stdout, done.stderr


# ---- my config ------------------------------------------------------------------------------------------------------


def test_my_config_fits_or_not(run_plan, tmp_path):
    """The JSON's own stage, batch, buckets and optimizer are planned for, and the exit code says what comes out."""
    mine = tmp_path / "mine.json"
    zero = {"stage": 2, "reduce_bucket_size": 5e7, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    config = {"train_batch_size": 16, "gradient_accumulation_steps": 2, "bf16": {"enabled": True}}
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}, "zero_optimization": zero}
    mine.write_text(json.dumps(config))
    flags = ["--config", mine, "--model", "qwen2.5-1.5b", "--gpus", 4, "--seq_len", 1024, "--checkpointing"]
    done = run_plan(*flags, "--gpu_mem", 24)
    assert done.code == 0 and "mine.json fits: " in done.stdout and "Batch    2 × 1024 tokens" in done.stdout
    assert "sgd_momentum" in done.stdout and "reduce_bucket_size 50,000,000 × 2" in done.stdout
    assert "host, rounding" not in done.stdout  # nothing is pinned
    assert run_plan(*flags, "--gpu_mem", 8).code == 2
    no_host = run_plan(*flags, "--gpu_mem", 24, "--host_mem", 16)
    assert no_host.code == 2 and "mine.json does not fit: the host needs" in no_host.stdout
    more = run_plan(*flags, "--gpu_mem", 24, "--micro_batch", 8, "--optimizer", "adamw_8bit")
    assert "Batch    8 × 1024 tokens" in more.stdout and "adamw_8bit" in more.stdout


def test_auto_is_what_hugging_face_makes_of_it(run_plan):
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    run = plan.config_run({"gradient_accumulation_steps": "auto", "zero_optimization": zero}, hidden=1000)
    assert (run["reduce_bucket_size"], run["persistence_threshold"], run["accumulation"]) == (1_000_000, 10_000, 1)
    flags = ["--model", "llama-3.1-8b", "--gpus", 8, "--gpu_mem", 80, "--checkpointing", "--micro_batch", 2]
    done = run_plan("--config", ROOT / "config/zero3_bf16_hf.json", *flags)
    assert done.code == 0 and "zero3_bf16_hf.json fits" in done.stdout and "Batch    2 × 2048" in done.stdout


@pytest.mark.parametrize("name", sorted(TEMPLATES - {"ds_config.schema"}))
def test_every_template_can_be_planned(run_plan, name):
    done = run_plan("--config", ROOT / f"config/{name}.json", "--model", "gpt2", "--gpus", 8, "--gpu_mem", 80)
    assert done.code in (0, 2) and f"{name}.json" in done.stdout and "<- the peak" in done.stdout


@pytest.mark.parametrize(
    ("flags", "template", "trained"),
    [
        (["--trainable", "lora"], "zero2_bf16_lora", 41_943_040),
        (["--trainable", "qlora", "--lora_rank", 8, "--lora_targets", "q_proj v_proj"], "zero2_bf16_lora", 3_407_872),
        (["--tensor_parallel", 2, "--checkpointing"], "tensor_parallel_zero1_bf16", None),
        (["--pipeline_parallel", 4, "--checkpointing"], "pipeline_zero1_bf16", None),
    ],
)
def test_ways_to_train(run_plan, flags, template, trained):
    done = run_plan("--model", "llama-3.1-8b", "--gpus", 8, "--gpu_mem", 80, *flags)
    assert done.code == 0 and f"Use config/{template}.json" in done.stdout
    assert not trained or f"{trained:,} trained" in done.stdout


# ---- bad input ------------------------------------------------------------------------------------------------------


ZERO3 = ["--config", ROOT / "config/zero3_bf16.json", "--gpus", 1, "--gpu_mem", 80]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--params", "lots", "--gpus", 8, "--gpu_mem", 80], "cannot read 'lots' as a number of parameters"),
        (["--params", "1e400", "--gpus", 8, "--gpu_mem", 80], "cannot read '1e400' as a number of parameters"),
        (["--params", "0", "--gpus", 8, "--gpu_mem", 80], "cannot read '0' as a number of parameters"),
        (["--gpus", 8, "--gpu_mem", 80], "either --params 7e9 or --model gpt2-xl"),
        (["--params", "7B", "--model", "gpt2", "--gpus", 8, "--gpu_mem", 80], "either --params 7e9 or --model gpt2-xl"),
        (["--model", "gpt2-xxl", "--gpus", 8, "--gpu_mem", 80], "unknown model 'gpt2-xxl'"),
        (["--params", "7B", "--gpus", 0, "--gpu_mem", 80], "'0' must be a whole number above 0"),
        (["--params", "7B", "--gpus", 8, "--gpu_mem", -1], "'-1' must be a number above 0"),
        (["--params", "7B", "--gpus", 8, "--gpu_mem", 80, "--reserve", -5], "--reserve -5: from 0 to less than"),
        (["--params", "7B", "--gpus", 8, "--gpu_mem", 80, "--reserve", 80], "--reserve 80: from 0 to less than"),
        (["--model", "gpt2", "--layers", 3, "--gpus", 8, "--gpu_mem", 80], "leave out --layers or use --params"),
        (["--params", "7B", "--gpus", 8, "--gpu_mem", 80, "--write", "no/such/x.json"], "a folder that exists"),
        (["--model", "gpt2", "--gpus", 8, "--gpu_mem", 80, "--every", 4], "--every 4 says how many layers"),
        (["--model", "gpt2", "--gpus", 4, "--gpu_mem", 80, "--sequence_parallel", 3], "3 does not divide --gpus 4"),
        (["--params", "1M", "--hidden", 4096, "--gpus", 8, "--gpu_mem", 80], "--layers, --hidden and --vocab"),
        (["--model", "gpt2", "--gpus", 8, "--gpu_mem", 80, "--tensor_parallel", 3], "3 does not divide --gpus 8"),
        (["--model", "gpt2", "--gpus", 8, "--gpu_mem", 80, "--reserve_share", 101], "--reserve_share 101"),
        (["--config", "no.json", "--model", "gpt2", "--gpus", 8, "--gpu_mem", 80], "no config file 'no.json'"),
        ([*ZERO3, "--model", "gpt2", "--trainable", "qlora"], "ZeRO-3 cannot cut 4-bit weights"),
        ([*ZERO3, "--model", "gpt2", "--write", "x.json"], "leave out --config"),
    ],
)
def test_bad_input_gets_one_sentence(run_plan, flags, sentence):
    done = run_plan(*flags)
    assert done.code in (1, 2) and done.stdout == ""
    assert sentence in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "llama", "num_hidden_layers": 2}, "hidden_size None: the plan needs a whole number"),
        ({"model_type": "qwen3_moe", "num_experts": 64}, "a mixture of experts (num_experts: 64)"),
        ({"model_type": "no_such_kind"}, "the plan reads gpt2, llama, mistral"),
        ([], "holds no object"),
    ],
)
def test_a_bad_model_gets_one_sentence(run_plan, config, sentence, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_plan("--model", tmp_path, "--gpus", 8, "--gpu_mem", 80)
    assert done.code == 1 and sentence in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", [True, "lots", -1, 1e300, [1]])
def test_a_bad_number_in_my_config_gets_one_sentence(run_plan, value, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "sub_group_size": value}}))
    done = run_plan("--config", tmp_path / "mine.json", "--model", "gpt2", "--gpus", 8, "--gpu_mem", 80)
    assert done.code == 1 and "sub_group_size" in done.stderr and done.stderr.count("\n") == 1


# ---- a pure function of plain numbers -------------------------------------------------------------------------------


def test_whole_bytes_from_plain_numbers():
    """A run and what is planned survive JSON unchanged; bytes are whole and never below 0; more data needs no less."""
    chance = random.Random(0)

    def numbers(found: dict) -> list:
        return [n for value in found.values() for n in (numbers(value) if isinstance(value, dict) else [value])]

    for _ in range(300):
        run = {**random_run(chance), "micro_batch": 1}
        run["tensor_ranks"] = 1 if run["lora_rank"] else run["tensor_ranks"]  # the plan refuses the two together
        need = plan.predict_run(run)
        assert all(isinstance(number, int) and number >= 0 for number in numbers(need)), run
        assert need == plan.predict_run(json.loads(json.dumps(run))) == json.loads(json.dumps(need))
        assert plan.predict_run({**run, "micro_batch": 2})["peak"] >= need["peak"] <= need["on_card"]


# ---- measured -------------------------------------------------------------------------------------------------------

POINTS = points()


@pytest.mark.parametrize("what", POINTS)
def test_the_plan_is_within_a_tenth_of_every_recorded_peak(what):
    measured, model, config, more = POINTS[what]
    run = {**plan.RUN, **model.shape(), **plan.config_run(config, model.hidden)}
    need = plan.predict_run({**run, "precision": plan.config_precision(config), **more})
    # day 14's cases were in memory together, and what each held was subtracted: 9 %; all others 5 %
    assert need["peak"] == pytest.approx(measured, rel=0.10 if "day 14" in what else 0.05)


def test_the_recorded_peaks_are_of_all_kinds():
    ways = {(config["zero_optimization"]["stage"], more.get("gpus", 1)) for _, _, config, more in POINTS.values()}
    assert {stage for stage, _ in ways} == {0, 1, 2, 3} and {gpus for _, gpus in ways} == {1, 2, 4}
    assert {more["seq_len"] for *_, more in POINTS.values()} == {128, 1024, 2048, 4096, 8192, 16384}
    kinds = {(model.family, model.qkv_bias) for _, model, *_ in POINTS.values()}
    assert kinds == {("gpt2", False), ("llama", False), ("llama", True)}  # the bias is Qwen's
    trained = {(more.get("lora_rank", 0), more.get("base_bits", 16)) for *_, more in POINTS.values()}
    assert trained == {(0, 16), (8, 16), (8, 4), (16, 16), (16, 4)}


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_page_counts_the_recorded_peaks(page):
    near = 0
    for measured, model, config, more in POINTS.values():
        run = {**plan.RUN, **model.shape(), **plan.config_run(config, model.hidden)}
        need = plan.predict_run({**run, "precision": plan.config_precision(config), **more})
        near += abs(need["peak"] / measured - 1) <= 0.05
    words = {"README.md": "{} in all .* and {} within 5 %", "README.zh.md": "一共 {} 个.*其中 {} 个在 5 % 以内"}
    assert re.search(words[page].format(len(POINTS), near), (ROOT / "config" / page).read_text())


def test_pipeline_stages_hold_what_was_recorded():
    """GPT-2 XL under ZeRO-1 on 4 H200s, as one pipeline of 4 stages and as 4 of one: weights and optimizer.

    There the list of layers has a head of its own, and is cut where times are equal: 7 % more than equal layers.
    """
    told = re.search(r"held ([\d.]+) GB per GPU in place of ([\d.]+)\.", (ROOT / "day16/results/LOG.md").read_text())
    for stages, gigabytes in ((4, told[1]), (1, told[2])):
        shape = {**plan.RUN, **XL.shape(), "tied": 0, "gpus": 4, "stage": 1, "pipeline_ranks": stages}
        states = plan.predict_run({**shape, "seq_len": 1024, "micro_batch": 2, "accumulation": 4})["states"]
        assert states["parameters"] + states["optimizer"] == pytest.approx(float(gigabytes) * 1e9, rel=0.10)


def test_what_ran_out_of_memory_is_not_said_to_fit():
    """Day 22's 8B under ZeRO-1, and GPT-2's micro-batches under day 14's limit of 24 GiB, fragments included."""
    need = plan.predict(LLAMA_8B, {"zero_optimization": {"stage": 1}}, 2, 128, 4, checkpointing=True)
    assert "79.20 GiB allowed" in (ROOT / "day22/results/zero1_8b_2xh200.json").read_text()
    assert need["peak"] > 79.2 * plan.GIB
    told = json.loads((ROOT / "day14/results/heatmap_1xh200.json").read_text())
    precisions = {"bf16": ("bf16", 1, {}), "fp32": ("fp32", 0, {})}
    precisions["autocast"] = ("bf16", 0, {"torch_autocast": {"enabled": True}})
    seen = set()
    for row in told["table"]:
        precision, stage, section = precisions[row["config"].removeprefix("ds_config_")]
        config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000}, **section}
        need = plan.predict(plan.gpt2_model("gpt2"), config, 1, 1024, row["micro_batch"], precision)
        fits = 1.1 * need["peak"] <= told["limit_gib"] * plan.GIB
        assert fits == ("error" not in row), row["case"]
        seen.add(fits)
    assert seen == {True, False}


def test_the_plan_is_within_a_tenth_of_what_others_published():
    known = 0
    for point, planned in public_rows():
        for reported, mine in zip(point["reported_gb"], planned, strict=True):
            if reported == OOM:
                assert mine > point["card_gib"] * plan.GIB, point
            else:
                assert mine / 1e9 == pytest.approx(reported, rel=0.10), point
                known += 1
    assert known >= 17


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_page_has_the_table(page):
    told = (ROOT / "config" / page).read_text()
    numbers = [line.split("|", 2)[2] for line in public_table()]  # the first column speaks the page's language
    assert all(line in told for line in numbers)


def test_host_memory_of_a_save_by_hand():
    """GPT-2 XL, stage 2, optimizer on the host of 2 GPUs: 20 bytes a parameter to train, 2 to copy, 14 on the disk."""
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    node = plan.predict(XL, config, 2, 1024, 4)["host_of_node"]
    psi = XL.num_params
    assert node["train"] == pytest.approx(20 * psi, rel=0.05)  # and the gradients that both ranks keep whole
    assert (node["save"], node["files"], node["load"]) == (2 * psi, 14 * psi, 4 * psi)
    half = psi // 2
    blocks = [(4 * half, 2**32), (4 * half, 2**32), (2 * half, 2**31)]  # what is pinned, and the next power of two
    assert node["pinned"] == 2 * sum(power - size for size, power in blocks)


SMALL = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 1000}
OFFLOAD = {"device": "cpu"}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = {
    **{f"zero{stage}_fp32": {"zero_optimization": {"stage": stage, **SMALL}} for stage in range(4)},
    **{f"zero{s}_bf16": {"zero_optimization": {"stage": s, **SMALL}, "bf16": {"enabled": True}} for s in range(4)},
    **{
        f"zero{stage}_bf16_fp32_sums": {
            "zero_optimization": {"stage": stage, **SMALL}, "bf16": {"enabled": True}, **FP32_SUMS,
        } for stage in (1, 2, 3)
    },
    **{
        f"zero{stage}_bf16_offload": {
            "zero_optimization": {"stage": stage, "offload_optimizer": OFFLOAD, **SMALL}, "bf16": {"enabled": True},
        } for stage in (1, 2, 3)
    },
    "zero2_bf16_sgd": {
        "zero_optimization": {"stage": 2, **SMALL}, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}},
    },
    "zero1_bf16_half_states": {
        "zero_optimization": {"stage": 1, **SMALL},
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
    },
    "zero2_bf16_lora": {"zero_optimization": {"stage": 2, **SMALL}, "bf16": {"enabled": True}},
    "zero3_bf16_lora": {"zero_optimization": {"stage": 3, **SMALL}, "bf16": {"enabled": True}},
    "zero3_bf16_persistent": {  # most matrices of this model stay whole beside the parts
        "zero_optimization": {"stage": 3, **SMALL, "stage3_param_persistence_threshold": 13_000},
        "bf16": {"enabled": True},
    },
    "zero3_bf16_offload_both": {
        "zero_optimization": {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD, **SMALL},
        "bf16": {"enabled": True},
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=os.environ.get("PLAN_RANKS", "2").split(","))
def measured(request, tmp_path_factory) -> tuple[int, dict]:
    """{case: bytes of all tensors that the fullest rank holds between two micro-batches}.

    On 2 ranks; `PLAN_RANKS=1,2,4 pytest tests/test_config_plan.py` takes some minutes and holds as well.
    """
    out = tmp_path_factory.mktemp("plan") / "bytes.json"
    ranks = int(request.param)
    run_ranks("tests/plan_cases.py", out, ranks=ranks, DS_ACCELERATOR="cpu")
    return ranks, json.loads(out.read_text())


@pytest.mark.launch
@pytest.mark.parametrize("case", CASES)
def test_prediction_agrees_with_the_tensors_held(measured, case):
    num_ranks, held = measured
    config = CASES[case]
    shape = {"vocab_size": 256, "n_positions": 32, "n_embd": 64, "n_layer": 6, "n_head": 2}  # of tests/plan_cases.py
    model = models.config_model({"model_type": "gpt2", **shape}, "tiny")
    assert list(model.sizes) == held["sizes"]
    run = {**plan.RUN, **model.shape(), **plan.config_run(config, 64), "precision": plan.config_precision(config)}
    run |= {"gpus": num_ranks, "accumulation": 2, "lora_rank": 8 if "lora" in case else 0}
    need = plan.predict_run(run)
    predicted = need["states"]["total"] + need["states"]["host"]  # on CPU ranks both are host memory
    if "offload" in case and run["stage"] < 3:
        predicted += 2 * 2 * max(model.sizes)  # a gradient on its way: a buffer on the GPU and one on the host
    assert held[case] == pytest.approx(predicted, rel=0.01)  # seen on 2 and 4 ranks: 0.6 % at most, the buckets


@pytest.mark.launch
def test_a_checkpoint_writes_14_bytes_a_parameter(measured):
    _, held = measured
    psi = sum(held["sizes"])
    assert held["files"] == pytest.approx(14 * psi, rel=0.05)  # beside it names, shapes and a script
