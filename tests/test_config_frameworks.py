"""Who reads the file, and what kind of file it is: the Trainer, Accelerate, Lightning, templates, other programs'."""

import json
import time

import pytest

from config.rules.checker import check
from config.rules.names import WRONG
from config.rules.schema_file import schema, unwrap

AUTO = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "zero_optimization": {"stage": 2}}  # fmt: skip


def errors(source, **how):
    return [f for f in check(source, **how) if f.level == "error"]


def rules(source, **how):
    return {f.rule for f in check(source, **how)}


# --- who reads it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"train_batch_size": 8},
        {"bf16": {"enabled": "auto"}},
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}},
        {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto",
                               "stage3_gather_16bit_weights_on_model_save": True}},
    ],
)  # fmt: skip
def test_hugging_face_is_known_by_its_auto(change):
    """One note says so, and nothing is an error that the Trainer would fill in."""
    found = check(AUTO | change)
    assert not [f for f in found if f.level == "error"]
    assert [f.rule for f in found].count("file/mode") == 1 and "file/mode" not in rules(AUTO | change, mode="hf")
    assert len(errors(AUTO | change, mode="deepspeed")) >= 3


def test_one_auto_is_enough_and_none_is_none():
    plain = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 1}}
    assert "file/mode" not in rules(plain)
    assert "file/mode" in rules(plain | {"bf16": {"enabled": "auto"}})
    tuned = {"train_micro_batch_size_per_gpu": "auto", "autotuning": {"enabled": True}}
    assert "file/mode" not in rules(tuned)
    tuned["autotuning"]["arg_mappings"] = {"train_micro_batch_size_per_gpu": "--per_device_train_batch_size"}
    assert "file/mode" in rules(tuned) and not errors(tuned)


def test_the_name_of_a_file_tells(tmp_path):
    named = tmp_path / "zero2_hf.json"
    named.write_text(json.dumps({k: 2 for k in list(AUTO)[:3]} | {"gradient_clipping": 1.0}))
    assert any(f.path == "zero_optimization" and "Accelerate" in f.message for f in check(named))


def test_each_framework_has_its_rules():
    config = AUTO | {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
                     "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}  # fmt: skip
    levels = {mode: {f.path: f.level for f in check(config, mode=mode)} for mode in ("trainer", "accelerate", "hf")}
    assert levels["trainer"] == {"scheduler": "warning", "optimizer": "note"}
    assert levels["accelerate"]["optimizer.params.betas"] == "error"
    assert levels["hf"]["optimizer.params.betas"] == "note"
    lightning = {f.path: f.level for f in check({**AUTO, "gradient_accumulation_steps": 4}, mode="lightning")}
    assert lightning["gradient_accumulation_steps"] == "error"
    with pytest.raises(ValueError, match="'pytorch'.*lightning"):
        check(AUTO, mode="pytorch")


def test_a_missing_accumulation_is_one_for_hugging_face_and_derived_by_deepspeed():
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
    assert not errors(config, world_size=1, mode="deepspeed")
    found = {f.path: f.message for f in errors(config, world_size=1, mode="trainer")}
    assert set(found) == {"gradient_accumulation_steps", "train_batch_size"}
    assert "8 != " in found["train_batch_size"] and not errors(config | {"gradient_accumulation_steps": "auto"})


def test_an_accelerate_config_that_is_filled_in():
    """plugin.deepspeed_config always holds steps_per_print: inf."""
    filled = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
              "zero_optimization": {"stage": 2}, "steps_per_print": float("inf")}  # fmt: skip
    assert not errors(filled, mode="accelerate")


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 30])
def test_a_number_that_no_one_can_use_is_one_error(text):
    for key in ('"gradient_clipping": %s', '"optimizer": {"type": "SGD", "params": {"lr": %s}}'):
        source = '{"train_batch_size": 2, "gradient_clipping": 1.0,\n%s\n}' % (key % text)
        assert 1 <= len(errors(source.replace('"gradient_clipping": 1.0,\n"gradient_c', '\n"gradient_c'))) <= 2


def test_digits_without_end():
    (found,) = check('{"train_batch_size": ' + "1" * 5000 + "}")
    assert "5000 digits" in found.message
    assert errors({"train_batch_size": 10**5000})


# --- one sentence for one cause -------------------------------------------------------------------------------------

OTHERS = {
    "TrainingArguments": {"output_dir": "out", "learning_rate": 1e-4, "gradient_accumulation_steps": 1, "fp16": True,
                          "num_train_epochs": 3, "report_to": "none"},
    "GPT-NeoX": {"pipe-parallel-size": 1, "num-layers": 12, "hidden-size": 768, "seq-length": 2048, "train-iters": 9,
                 "zero_optimization": {"stage": 1}, "fp16": {"enabled": True}, "optimizer": {"type": "Adam"}},
    "config.json": {"architectures": ["X"], "model_type": "gpt2", "hidden_size": 8, "torch_dtype": "bfloat16"},
    "Accelerate": {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_processes": 2,
                   "deepspeed_config": {"zero_stage": 2}},
    "init_inference": {"replace_with_kernel_inject": True, "dtype": "fp16", "tensor_parallel": {"tp_size": 2}},
    "under the key": {"output_dir": "x", "deepspeed": {"train_batch_size": 2, "zero_optimization": {"stage": 2}}},
    "look like": {"CXX": "g++", "sources": ["a.cc"], "flags": []},
}  # fmt: skip


@pytest.mark.parametrize("part", OTHERS)
def test_another_program_s_file_gets_one_sentence(part):
    (found,) = check(OTHERS[part])
    assert found.rule == "file/kind" and part in found.message


def test_a_config_with_keys_of_the_trainer_stays_a_config():
    config = {"train_batch_size": 8, "learning_rate": 1e-4, "weight_decay": 0.1, "optimizer": {"type": "SGD"}}
    assert {f.path for f in errors(config)} == {"learning_rate", "weight_decay"}


@pytest.mark.parametrize(
    "text, names",
    [
        ('{"train_batch_size": BATCH,\n"zero_optimization": {"stage": STAGE\n}}', "BATCH, STAGE"),
        (
            '{"train_batch_size": CONFIG_BATCH,\n"fp16": {"enabled": FP16_ON,\n"loss_scale": 0}}',
            "CONFIG_BATCH, FP16_ON",
        ),
        ('{"train_batch_size": {{ batch }}, "zero_optimization": {"stage": {{ stage }}}}', "{{ batch }}, {{ stage }}"),
        ('{"train_batch_size": ${BATCH}, "gradient_clipping": 1.0}', "${BATCH}"),
        ('{"train_batch_size": "$BATCH", "zero_optimization": {"stage": "<stage>"}}', "$BATCH, <stage>"),
        ('{"train_batch_size": "BATCH_SIZE", "gradient_clipping": 1.0}', "BATCH_SIZE"),
        ('{"train_batch_size": %(batch)s, "gradient_clipping": 1.0}', "%(batch)s"),
    ],
)
def test_a_template_is_said_once(text, names):
    (found,) = errors(text)
    assert names in found.message and "template" in found.message


@pytest.mark.parametrize(
    "text",
    ["{train_batch_size: 2, optimizer: {type: SGD\n params: {lr: 0.1}}}", '{"train_batch_size": 2,\n"x": TRUE\n}'],
)
def test_capitals_alone_make_no_template(text):
    assert not [f for f in check(text) if "template" in f.message]


def test_keys_with_one_cure_are_one_error():
    bf16 = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
    (found,) = errors({"train_batch_size": 2, "bf16": bf16, "zero_optimization": {"stage": 1}})
    assert "4 unknown keys, loss_scale, loss_scale_window" in found.message and "no loss" in found.fix
    assert len(found.edits) == 4


@pytest.mark.parametrize("count, limit", [(3_000, 1.0), (60_000, 20.0)])
def test_thousands_of_unknown_keys_take_no_time(count, limit):
    """A similar name is looked for a few times, not for each. (Before: 8 s and 65 s.)"""
    text = json.dumps({"train_batch_size": 2, **{f"k{i}": i for i in range(count)}})
    start = time.process_time()
    (found,) = errors(text)
    assert f"{count} unknown keys" in found.message and time.process_time() - start < limit


# --- cures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, part",
    [
        ("flops_profiler.warm_up", "profile_step"),
        ("pipeline.micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("pipeline.num_micro_batches", "gradient_accumulation_steps"),
        ("fp16.dynamic_loss_scale", '"loss_scale": 0'),
        ("fp16.init_scale", "initial_scale_power"),
        ("fp16.opt_level", "Apex"),
        ("checkpoint.save_interval", "engine.save_checkpoint"),
        ("zero_optimization.zero_allow_untested_optimizer", "top level"),
        ("zero_optimization.stage3_save_16bit_model", "stage3_gather_16bit_weights_on_model_save"),
        ("bf16.accumulate_grads_in_fp32", "data_types.grad_accum_dtype"),
        ("cuda_visible_devices", "--include"),
        ("dataloader_settings", "dataloader_drop_last"),
        ("disable_fused_adam", "torch_adam"),
        ("activation_checkpointing.enabled", "no switch"),
        ("scheduler.params.warmup_ratio", "warmup_num_steps"),
        ("wandb.entity", "team"),
        ("tensor_parallel.tp_size", "autotp_size"),
        ("overlap_comm", "belongs in zero_optimization"),
        ("loss_scale", "belongs in fp16"),
    ],
)
def test_a_wrong_key_gets_the_right_cure(path, part):
    config = {"train_batch_size": 2, "scheduler": {"type": "WarmupLR", "params": {}}}
    node = config
    *parents, name = path.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = 1
    (found,) = [f for f in errors(config, mode="deepspeed") if f.path == path]
    assert part in found.fix


def test_the_table_of_cures_names_no_key_that_deepspeed_has():
    for section, table in WRONG.items():
        node = schema()
        for name in section.split(".") if section else ():
            node = unwrap(node["properties"][name])
        wrong = {name for names in table for name in names.split()}
        constructors = section in ("optimizer.params", "scheduler.params")  # what is wrong there depends on the type
        assert constructors or not wrong & set(node["properties"]), section
