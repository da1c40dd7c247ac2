"""Every JSON of config/ trains: on 2 CPU ranks here, the losses fall and the engine says that the feature is on.

One launch runs them all (tests/train_templates.py); each test reads its template's part of the result. What a CPU needs
otherwise than the template says is injected at load time and listed in "changes": torch_adam, no cpu_checkpointing, ….
"""

import json
import math

import pytest

from config.read import read_config
from tests.launch import ROOT, run_ranks

NAMES = sorted(path.stem for path in (ROOT / "config").glob("*.json") if path.name != "ds_config.schema.json")

# What the engine must say, beside the stage, batch and clipping that every template is held to.
PROOF = {
    "single_gpu_bf16": {"zero_stage": 0, "autocast": "torch.bfloat16", "param_dtype": "float32"},
    "zero1_bf16": {"zero_stage": 1, "param_dtype": "bfloat16", "optimizer_state_fraction": 0.5, "overlap_comm": True},
    "zero2_bf16": {"zero_stage": 2, "param_dtype": "bfloat16", "optimizer_state_fraction": 0.5, "overlap_comm": True},
    "zero3_bf16": {"zero_stage": 3, "param_dtype": "bfloat16", "param_fraction": 0.5, "leaf_modules": 0},
    "zero2_fp16": {"zero_stage": 2, "param_dtype": "float16", "loss_scale": 2.0**16, "skipped_steps": 0},
    "zero2_bf16_offload_cpu": {"zero_stage": 2, "offload_optimizer": True, "round_robin": True},
    "zero3_bf16_offload_cpu": {"zero_stage": 3, "offload_optimizer": True, "offload_param": True},
    "zero3_bf16_offload_nvme": {"zero_stage": 3, "offload_optimizer": True, "swapped_to_nvme": True},
    "zero3_bf16_throughput": {"zero_stage": 3, "leaf_modules": 2, "prefetch_elements": 200_000_000},
    "zero3_bf16_capacity": {"zero_stage": 3, "prefetch_elements": 10_000_000, "reduce_bucket_size": 10_000_000},
    "zero3_bf16_multi_node": {"zero_stage": 3, "hpz": True, "grad_accum_dtype": "float32"},
    "zero3_bf16_long_context": {"zero_stage": 3, "param_fraction": 0.5},
    "zero2_bf16_lora": {"zero_stage": 2, "optimizer_state_fraction": 0.5},
    "zero3_bf16_lora": {"zero_stage": 3, "param_fraction": 0.5},
    "pipeline_zero1_bf16": {"zero_stage": 1, "pipe_stages": 2, "checkpoint_interval": 1, "use_reentrant": False},
    "tensor_parallel_zero1_bf16": {"zero_stage": 1, "tensor_parallel": 2, "q_proj_shape": [32, 64]},
    "cpu_fp32": {"zero_stage": 1, "param_dtype": "float32", "optimizer_state_fraction": 0.5},
    "debug": {
        "zero_stage": 1, "wall_clock_breakdown": True, "memory_breakdown": True, "flops_profiler": True,
        "comms_logger": True, "monitor": True,
    },
    "zero2_bf16_hf": {"zero_stage": 2, "param_dtype": "bfloat16"},
    "zero2_fp16_hf": {"zero_stage": 2, "param_dtype": "float16", "loss_scale": 2.0**16},
    "zero3_bf16_hf": {"zero_stage": 3, "param_dtype": "bfloat16", "param_fraction": 0.5},
    "zero3_bf16_offload_hf": {"zero_stage": 3, "offload_optimizer": True, "offload_param": True},
}  # fmt: skip


def load(name: str) -> dict:
    return read_config(ROOT / "config" / f"{name}.json")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("templates") / "results.json"
    run_ranks("tests/train_templates.py", "--out", out, ranks=2, timeout=900, DS_ACCELERATOR="cpu")
    return json.loads(out.read_text())["templates"]


def test_every_template_has_a_proof():
    assert sorted(PROOF) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_template_is_plain_and_complete(name):
    """Indented by 2, a batch for any number of GPUs, clipping stated (its default changed), auto only in *_hf."""
    text, config = (ROOT / "config" / f"{name}.json").read_text(), load(name)
    assert {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"} <= set(config)
    assert "train_batch_size" not in config
    assert text.splitlines()[1].startswith('  "')
    assert ('"auto"' in text) == name.endswith("_hf")
    if config["zero_optimization"]["stage"] == 3:
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.launch
@pytest.mark.parametrize("name", NAMES)
def test_template_trains(results, name):
    result, config = results[name], load(name)
    if result["ok"] is None:
        pytest.skip(result["skipped"])
    assert result["error"] is None, result["error"]
    losses = result["losses"]
    assert len(losses) >= 3 and all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses
    assert {key: result[key] for key in PROOF[name]} == PROOF[name]
    if not name.endswith("_hf"):
        accumulation = min(2, config["gradient_accumulation_steps"])  # shortened on CPU, see "changes"
        assert result["batch"] == [config["train_micro_batch_size_per_gpu"], accumulation]
        assert result["gradient_clipping"] == config["gradient_clipping"]


@pytest.mark.launch
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_hf")])
def test_auto_is_filled_by_trainer_and_by_accelerate(results, name):
    """The Trainer fills in its arguments (batch 2, clipping 0.5, hidden size 64); Accelerate its own values."""
    result = results[name]
    assert (result["batch"], result["gradient_clipping"]) == ([2, 1], 0.5)
    assert (result["accelerate"]["batch"], result["accelerate"]["gradient_clipping"]) == ([2, 1], 1.0)
    assert result["accelerate_losses"][-1] < result["accelerate_losses"][0]
    assert result["accelerate"]["zero_stage"] == result["zero_stage"]
    assert "auto" not in result["zero_section"].values()
    if result["zero_stage"] == 3:
        for filled in (result, result["accelerate"]):
            assert (filled["reduce_bucket_size"], filled["prefetch_elements"]) == (64 * 64, int(0.9 * 64 * 64))


@pytest.mark.launch
def test_lora_trains_the_adapters_alone(results):
    for name in ("zero2_bf16_lora", "zero3_bf16_lora"):
        assert 0 < results[name]["trainable_fraction"] < 0.05


@pytest.mark.launch
def test_long_context_checkpoints_its_activations(results):
    """Two blocks, 3 steps of 2 micro-batches: DeepSpeed's checkpoint() ran 12 times, and in no other template."""
    assert results["zero3_bf16_long_context"]["checkpoint_calls"] == 2 * 3 * 2
    assert results["zero3_bf16"]["checkpoint_calls"] == 0


@pytest.mark.launch
def test_persistent_parameters(results):
    """Throughput keeps the most parameters whole on each rank, capacity the fewest. (The thresholds are divided by 100
    for the tiny model, see "changes": 10,000, 1,000 and 100 elements; it has 64 to 16,384 a parameter.)"""
    kept = [results[f"zero3_bf16{kind}"]["persistent_elements"] for kind in ("_throughput", "", "_capacity")]
    assert kept[0] > kept[1] > kept[2] > 0


@pytest.mark.launch
def test_stages_agree(results):
    """ZeRO changes where things are stored, not what is computed: the same batches give the same losses."""
    stage2 = results["zero2_bf16"]["losses"]
    assert results["zero1_bf16"]["losses"] == pytest.approx(stage2, abs=2e-3)
    assert results["zero3_bf16_throughput"]["losses"] == pytest.approx(stage2, abs=2e-3)
    # Autocast keeps fp32 weights and bf16 trains rounded ones: not the same numbers, but the same curve.
    assert results["single_gpu_bf16"]["losses"] == pytest.approx(stage2, abs=2e-2)
