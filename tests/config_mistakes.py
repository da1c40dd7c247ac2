"""The table behind config/check.py: mistakes people make, configs that are fine, and what DeepSpeed does with each.

    python tests/config_mistakes.py out.json [name ...]   # runs them through DeepSpeed on one gloo rank (about 30 s)

A mistake says which finding check.py must report, and what DeepSpeed 0.19.8 really does:
  Raises(text)             initialize() raises, and the error holds this text
  Raises(text, "step")     initialize() accepts it, the first training step raises
  Gives(expression=value)  nothing is raised; afterwards the engine `e` has this value
  Source(file)             cannot be run on CPU, or is done by a framework; the file that says so
test_config_check.py compares both columns, the second by really running it.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


@dataclass
class Raises:
    text: str
    when: str = "initialize"


@dataclass
class Gives:
    values: dict  # expression over the engine `e` -> value, both as text


@dataclass
class Source:
    file: str


@dataclass
class Mistake:
    name: str
    config: object  # a dict, or the text of the file
    finding: tuple  # (level, path, a part of the message or the fix)
    really: object
    check: dict = field(default_factory=dict)  # arguments of check(): mode, world_size


@dataclass
class Valid:
    name: str
    config: object
    remarks: tuple = ()  # "level path" of every warning and note that check.py reports
    run: str = "train"  # "train" two steps, or only "parse" what needs a GPU, several ranks or a package
    check: dict = field(default_factory=dict)


PLAIN, HF = {"mode": "deepspeed"}, {"mode": "hf"}
ADAMW = {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}}  # torch_adam: nothing to compile on CPU

OFFLOAD = {"device": "cpu", "pin_memory": True}
LIGHTNING = "lightning/pytorch/strategies/deepspeed.py"
AUTO_BATCH = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
              "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}  # fmt: skip


def cfg(**changes):
    """A config that is fine, with changes. None removes a key."""
    base = {"train_batch_size": 2, "gradient_clipping": 1.0, "optimizer": ADAMW, **changes}
    return {k: v for k, v in base.items() if v is not None}


def zero(stage, **more):
    more.setdefault("stage3_gather_16bit_weights_on_model_save", True) if stage == 3 else None
    return {"zero_optimization": {"stage": stage, **more}}


def adamw(**params):
    return {"optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True, **params}}}


def optim(type_, **params):
    return {"optimizer": {"type": type_, "params": params}}


def sched(type_, **params):
    return {"scheduler": {"type": type_, "params": params}}


def text(**changes):
    return json.dumps(cfg(**changes))


M = Mistake
MUST_BE_MAPPING = "argument after ** must be a mapping"
EXTRA = "Extra inputs are not permitted"
STAGE = "e.zero_optimization_stage()"
LR = "e.basic_optimizer.param_groups[0]['lr']"

MISTAKES = [
    # --- top level: nothing is checked by DeepSpeed ---
    M("zero_optimisation", cfg(zero_optimisation={"stage": 2}),
      ("error", "zero_optimisation", "'zero_optimization'"), Gives({STAGE: "0"})),
    M("gradient_cliping", cfg(gradient_clipping=None, gradient_cliping=0.5),
      ("error", "gradient_cliping", "'gradient_clipping'"), Gives({"e.gradient_clipping()": "1.0"})),
    M("gradient_acumulation_steps",
      {"train_micro_batch_size_per_gpu": 2, "gradient_acumulation_steps": 4, "optimizer": ADAMW},
      ("error", "gradient_acumulation_steps", "'gradient_accumulation_steps'"),
      Gives({"e.gradient_accumulation_steps()": "1"})),
    M("gradient_accumulation", {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation": 4, "optimizer": ADAMW},
      ("error", "gradient_accumulation", "gradient_accumulation_steps"),
      Gives({"e.gradient_accumulation_steps()": "1"})),
    M("bfloat_16", cfg(bfloat_16={"enabled": True}),
      ("error", "bfloat_16", "'bfloat16'"), Gives({"e.bfloat16_enabled()": "False"})),
    M("BF16 in capitals", cfg(BF16={"enabled": True}),
      ("error", "BF16", "'bf16'"), Gives({"e.bfloat16_enabled()": "False"})),
    M("lr_scheduler", cfg(lr_scheduler={"type": "WarmupLR", "params": {}}),
      ("error", "lr_scheduler", "scheduler"), Gives({"e.lr_scheduler": "None"})),
    M("activation_checkpoint", cfg(activation_checkpoint={"partition_activations": True}),
      ("error", "activation_checkpoint", "activation_checkpointing"),
      Gives({"e._config.activation_checkpointing_config.partition_activations": "False"})),
    M("stage at top level", cfg(stage=3), ("error", "stage", "zero_optimization"), Gives({STAGE: "0"})),
    M("offload_optimizer at top level", cfg(**zero(2), offload_optimizer={"device": "cpu"}),
      ("error", "offload_optimizer", "zero_optimization"), Gives({"e.zero_use_cpu_optimizer()": "False"})),
    M("learning_rate at top level", cfg(learning_rate=0.5),
      ("error", "learning_rate", "optimizer.params.lr"), Gives({LR: "0.001"})),
    M("weight_decay at top level", cfg(weight_decay=0.5),
      ("error", "weight_decay", "optimizer.params.weight_decay"),
      Gives({"e.basic_optimizer.param_groups[0]['weight_decay']": "0.01"})),
    M("per_device_train_batch_size", cfg(per_device_train_batch_size=8),
      ("error", "per_device_train_batch_size", "train_micro_batch_size_per_gpu"),
      Gives({"e.train_micro_batch_size_per_gpu()": "2"})),
    M("mixed_precision", cfg(mixed_precision="bf16"),
      ("error", "mixed_precision", "bf16.enabled"), Gives({"e.bfloat16_enabled()": "False"})),
    M("max_grad_norm at top level", cfg(max_grad_norm=0.3),
      ("error", "max_grad_norm", "gradient_clipping"), Gives({"float(e.gradient_clipping())": "1.0"})),
    M("unheard of", cfg(turbo_mode=True), ("error", "turbo_mode", "ignores it"), Gives({STAGE: "0"})),
    # --- sections that ignore ---
    M("lr beside params", cfg(optimizer={"type": "SGD", "lr": 0.5, "params": {}}),
      ("error", "optimizer.lr", "optimizer.params.lr"), Gives({LR: "0.001"})),
    M("param for params", cfg(optimizer={"type": "SGD", "param": {"lr": 0.5}}),
      ("error", "optimizer.param", "'params'"), Gives({LR: "0.001"})),
    M("optimizer without type", cfg(optimizer={"name": "AdamW", "params": {"lr": 0.1}}),
      ("error", "optimizer.type", "ignored"), Raises("must provide optimizer during init", "step")),
    M("scheduler without type", cfg(scheduler={"name": "WarmupLR", "params": {}}),
      ("error", "scheduler.type", "ignored"), Gives({"e.lr_scheduler": "None"})),
    M("scheduler parameter beside params",
      cfg(scheduler={"type": "WarmupLR", "params": {}, "warmup_num_steps": 5}),
      ("error", "scheduler.warmup_num_steps", "scheduler.params"), Gives({"e.lr_scheduler.warmup_num_steps": "1000"})),
    M("partitioned_activations", cfg(activation_checkpointing={"partitioned_activations": True}),
      ("error", "activation_checkpointing.partitioned_activations", "partition_activations"),
      Gives({"e._config.activation_checkpointing_config.partition_activations": "False"})),
    M("flops_profiler.enable", cfg(flops_profiler={"enable": True}),
      ("error", "flops_profiler.enable", "enabled"), Gives({"e.flops_profiler_enabled()": "False"})),
    M("checkpoint.load_univeral", cfg(checkpoint={"load_univeral": True}),
      ("error", "checkpoint.load_univeral", "'load_universal'"), Gives({"e.load_universal_checkpoint()": "False"})),
    M("aio.blocksize", cfg(aio={"blocksize": 1}),
      ("error", "aio.blocksize", "'block_size'"), Gives({"e.aio_config()['block_size']": "1048576"})),
    M("csv_logger", cfg(csv_logger={"enabled": True}),
      ("error", "csv_logger", "csv_monitor"), Gives({"e._config.monitor_config.enabled": "False"})),
    M("Muon typo", cfg(**zero(1), **optim("Muon", lr=0.01, muonlr=0.5, torch_adam=True)),
      ("error", "optimizer.params.muonlr", "'muon_lr'"), Source("runtime/engine.py _muon_param_groups")),
    # --- sections that reject ---
    M("zero: stag", cfg(zero_optimization={"stag": 2}),
      ("error", "zero_optimization.stag", "'stage'"), Raises(EXTRA)),
    M("zero: stag auto", cfg(zero_optimization={"stag": "auto"}),
      ("error", "zero_optimization.stag", "'stage'"), Gives({STAGE: "0"})),
    M("zero: aio inside", cfg(**zero(3, aio={"block_size": 1048576})),
      ("error", "zero_optimization.aio", "top level"), Raises(EXTRA)),
    M("zero: comment key", cfg(**zero(1, _comment="mine")),
      ("error", "zero_optimization._comment", "raises"), Raises(EXTRA)),
    M("fp16: opt_level", cfg(fp16={"enabled": False, "opt_level": "O2"}),
      ("error", "fp16.opt_level", "raises"), Raises(EXTRA)),
    M("bf16: check_overflow", cfg(bf16={"enabled": True, "check_overflow": True}, **zero(1)),
      ("error", "bf16.check_overflow", "check_grad_overflow"), Raises(EXTRA)),
    M("tensorboard: output_dir", cfg(tensorboard={"enabled": False, "output_dir": "logs"}),
      ("error", "tensorboard.output_dir", "output_path"), Raises(EXTRA)),
    M("wandb: entity", cfg(wandb={"enabled": False, "entity": "me"}),
      ("error", "wandb.entity", "team"), Raises(EXTRA)),
    M("tensor_parallel: tp_size", cfg(tensor_parallel={"tp_size": 2}),
      ("error", "tensor_parallel.tp_size", "autotp_size"), Raises(EXTRA)),
    M("tensor_parallel: dtype", cfg(tensor_parallel={"autotp_size": 0, "dtype": "bf16"}),
      ("error", "tensor_parallel.dtype", "raises"), Raises("Input should be an instance of dtype")),
    M("compile: enabled", cfg(compile={"enabled": True}),
      ("error", "compile.enabled", "raises"), Raises(EXTRA)),
    M("both names of a stage-3 key", cfg(**zero(3, stage3_prefetch_bucket_size=10000, prefetch_bucket_size=20000)),
      ("error", "zero_optimization.prefetch_bucket_size", "same as"), Raises(EXTRA)),
    # --- removed ---
    *[M(f"removed: {key}", cfg(**{key: value}), ("error", key, "Removed"), Raises("removed"))
      for key, value in [("amp", {"enabled": False}), ("elasticity", {"enabled": False}), ("sparse_gradients", False),
                         ("nebula", {}), ("compression_training", {}), ("quantize_training", {}), ("eigenvalue", {}),
                         ("sparse_attention", {}), ("graph_harvesting", False), ("curriculum_learning", {}),
                         ("progressive_layer_drop", {})]],
    M("removed: mics_shard_size", cfg(**zero(3, mics_shard_size=8)),
      ("error", "zero_optimization.mics_shard_size", "Removed"), Raises("removed")),
    M("removed: OneBitAdam", cfg(**optim("OneBitAdam", lr=0.1)),
      ("error", "optimizer.type", "Removed"), Raises("not a supported DeepSpeed Optimizer")),
    M("removed: OneBitLamb", cfg(**optim("OneBitLamb", lr=0.1)),
      ("error", "optimizer.type", "Lamb"), Raises("not a supported DeepSpeed Optimizer")),
    M("legacy_stage1", cfg(**zero(1, legacy_stage1=True)),
      ("error", "zero_optimization.legacy_stage1", "No longer"), Raises("is not supported in deepspeed >= 0.5.9")),
    # --- types ---
    M("fp16: true", cfg(fp16=True), ("error", "fp16", '{"enabled": true}'), Raises(MUST_BE_MAPPING)),
    M("zero_optimization: 2", cfg(zero_optimization=2), ("error", "zero_optimization", '{"stage": 2}'),
      Raises(MUST_BE_MAPPING)),
    M("zero_optimization: true", cfg(zero_optimization=True), ("warning", "zero_optimization", "stage 1"),
      Gives({STAGE: "1"})),
    M("optimizer: name only", cfg(optimizer="AdamW"), ("error", "optimizer", "section"), Raises("no attribute 'keys'")),
    M("torch_autocast: true", cfg(torch_autocast=True), ("error", "torch_autocast", "section"),
      Raises("no attribute 'get'")),
    M("offload_param: false", cfg(**zero(3, offload_param=False)),
      ("error", "zero_optimization.offload_param", "section"), Raises("Input should be a valid dictionary")),
    M("null for a section", '{"train_batch_size": 2, "tensorboard": null}',
      ("error", "tensorboard", "null"), Raises("Input should be a valid dictionary")),
    M("batch as a string", cfg(train_batch_size="2"), ("error", "train_batch_size", "integer"),
      Raises("unsupported operand type")),
    M("batch auto", cfg(train_batch_size="auto"), ("error", "train_batch_size", "--for trainer"),
      Raises("unsupported operand type"), PLAIN),
    M("accumulation 2.5", {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2.5, "optimizer": ADAMW},
      ("error", "gradient_accumulation_steps", "fraction"), Gives({"e.train_batch_size()": "5.0"})),
    M("clipping as a string", cfg(gradient_clipping="1.0"), ("error", "gradient_clipping", "number"),
      Raises("'>' not supported", "step")),
    M("clipping auto", cfg(gradient_clipping="auto"), ("error", "gradient_clipping", "--for trainer"),
      Raises("'>' not supported", "step"), PLAIN),
    M("clipping null", text()[:-1].replace('"gradient_clipping": 1.0', '"gradient_clipping": null') + "}",
      ("error", "gradient_clipping", "null"), Raises("'>' not supported", "step")),
    M("wall_clock_breakdown as a string", cfg(wall_clock_breakdown="false"), ("error", "wall_clock_breakdown", "true"),
      Raises("unsupported operand type(s) for |")),
    M("prescale_gradients as a string", cfg(prescale_gradients="false"),
      ("error", "prescale_gradients", "counts as true"),
      Gives({"e.postscale_gradients()": "False"})),
    M("enabled as a string", cfg(bf16={"enabled": "true"}, **zero(1)), ("warning", "bf16.enabled", "converted"),
      Gives({"e.bfloat16_enabled()": "True"})),
    M("1 for true", cfg(**zero(1, overlap_comm=1)), ("warning", "zero_optimization.overlap_comm", "true"),
      Gives({"e.zero_overlap_comm()": "True"})),
    M("stage as a string", cfg(zero_optimization={"stage": "2"}), ("warning", "zero_optimization.stage", "converted"),
      Gives({STAGE: "2"})),
    M("stage: true", cfg(zero_optimization={"stage": True}), ("error", "zero_optimization.stage", "number 1"),
      Gives({STAGE: "1"})),
    M("bucket as 5e8 in quotes", cfg(**zero(1, reduce_bucket_size="5e8")),
      ("error", "zero_optimization.reduce_bucket_size", "integer"), Raises("unable to parse string as an integer")),
    M("lr as a string", cfg(**adamw(lr="1e-3")), ("error", "optimizer.params.lr", "number"),
      Raises("'<=' not supported")),
    M("warmup as a string", cfg(**sched("WarmupLR", warmup_num_steps="100")),
      ("error", "scheduler.params.warmup_num_steps", "integer"), Raises("must be a positive integer")),
    M("autotp_size as a string", cfg(tensor_parallel={"autotp_size": "2"}),
      ("error", "tensor_parallel.autotp_size", "integer"), Raises("'>' not supported")),
    M("prof_ops as a string", cfg(comms_logger={"enabled": False, "prof_ops": "all_reduce"}),
      ("error", "comms_logger.prof_ops", "list"), Raises("Input should be a valid list")),
    # --- hjson's traps ---
    M("Python's True", text()[:-1] + ', "prescale_gradients": False,\n"steps_per_print": 1}',
      ("error", "prescale_gradients", "comma included"), Gives({"e.postscale_gradients()": "False"})),
    M("unquoted word", text()[:-1] + ', "zero_optimization": {"stage": 2, "offload_optimizer": {"device": cpu,\n}}}',
      ("error", "zero_optimization.offload_optimizer.device", "'cpu'"), Raises("Input should be 'none', 'cpu' or")),
    M("unquoted name", text()[:-1] + ', "tensorboard": {"enabled": false, "job_name": run1,\n"output_path": "x"}}',
      ("error", "tensorboard.job_name", "comma included"),
      Gives({"e._config.monitor_config.tensorboard.job_name": "run1,"})),
    M("duplicate key", '{"train_batch_size": 2,\n "bf16": {"enabled": true,\n "enabled": false}}',
      ("error", "bf16.enabled", "twice"), Raises("Duplicate keys in DeepSpeed config")),
    M("unclosed brace", '{"train_batch_size": 2', ("error", "", "never closed"), Raises("Bad key name (eof)")),
    M("a list", "[1, 2]", ("error", "", "list"), Raises("no attribute 'get'")),
    # --- ranges ---
    M("stage 4", cfg(zero_optimization={"stage": 4}), ("error", "zero_optimization.stage", "0, 1, 2, 3"),
      Raises("Input should be 0, 1, 2, 3")),
    M("batch 0", cfg(train_batch_size=0), ("error", "train_batch_size", ">= 1"), Raises("has to be greater than 0")),
    M("batch negative", cfg(train_batch_size=-2), ("error", "train_batch_size", ">= 1"),
      Raises("has to be greater than 0")),
    M("clipping negative", cfg(gradient_clipping=-1.0), ("error", "gradient_clipping", "not clip"),
      Gives({"e.gradient_clipping()": "-1"})),
    M("steps_per_print 0", cfg(steps_per_print=0), ("error", "steps_per_print", "ZeroDivisionError"),
      Raises("modulo by zero", "step")),
    M("lr negative", cfg(**adamw(lr=-0.1)), ("error", "optimizer.params.lr", ">= 0"), Raises("Invalid learning rate")),
    M("lr 0", cfg(**adamw(lr=0)), ("error", "optimizer.params.lr", "nothing is trained"), Gives({LR: "0"})),
    M("lr 3", cfg(**adamw(lr=3)), ("warning", "optimizer.params.lr", "very large"), Gives({LR: "3"})),
    M("betas 1.0", cfg(**adamw(betas=[0.9, 1.0])), ("error", "optimizer.params.betas.1", "< 1"),
      Raises("Invalid beta parameter")),
    M("one beta", cfg(**adamw(betas=[0.9])), ("error", "optimizer.params.betas", "Needs 2"),
      Raises("list index out of range")),
    M("bucket 0", cfg(**zero(1, reduce_bucket_size=0)), ("error", "zero_optimization.reduce_bucket_size", "> 0"),
      Raises("Input should be greater than 0")),
    M("initial_scale_power 65536", cfg(fp16={"enabled": True, "initial_scale_power": 65536}, **zero(1)),
      ("error", "fp16.initial_scale_power", "2**65536"), Raises("int too big", "step")),
    M("loss_scale dynamic", cfg(fp16={"enabled": True, "loss_scale": "dynamic"}, **zero(1)),
      ("error", "fp16.loss_scale", "number"), Raises("fp16.loss_scale must be a number")),
    M("loss_scale_window 0", cfg(fp16={"enabled": True, "loss_scale_window": 0}, **zero(1)),
      ("error", "fp16.loss_scale_window", "> 0"), Raises("fp16.loss_scale_window must be > 0")),
    M("device gpu", cfg(**zero(3, offload_param={"device": "gpu"})),
      ("error", "zero_optimization.offload_param.device", "none, cpu, nvme"), Raises("Input should be 'none', 'cpu'")),
    M("communication_data_type float16", cfg(communication_data_type="float16"),
      ("error", "communication_data_type", "fp16"), Raises("Invalid communication_data_type")),
    M("tag_validation Strict", cfg(checkpoint={"tag_validation": "Strict"}),
      ("error", "checkpoint.tag_validation", "warn"), Raises("invalid tag_validation")),
    M("log_level loud", cfg(log_level="loud"), ("error", "log_level", "debug"), Raises("valid logging levels")),
    M("autocast dtype fp8", cfg(torch_autocast={"enabled": True, "dtype": "fp8"}),
      ("error", "torch_autocast.dtype", "bfloat16"), Raises("is not a valid DtypeEnum")),
    M("autocast modules without package",
      cfg(torch_autocast={"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["Linear"]}),
      ("error", "torch_autocast.lower_precision_safe_modules.0", "torch.nn.Linear"),
      Raises("Failed to import lower precision safe module")),
    # --- batch arithmetic ---
    M("no batch size", cfg(train_batch_size=None), ("error", "train_micro_batch_size_per_gpu", "No batch size"),
      Raises("Either train_batch_size or train_micro_batch_size_per_gpu"), PLAIN),
    M("no batch size, perhaps Lightning's", cfg(train_batch_size=None),
      ("warning", "train_micro_batch_size_per_gpu", "Lightning"),
      Raises("Either train_batch_size or train_micro_batch_size_per_gpu")),
    M("three batch numbers", cfg(train_batch_size=16, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=2),
      ("note", "train_batch_size", "exactly 2 ranks"), Raises("16 != 4 * 2 * 1")),
    M("batch numbers disagree", cfg(train_batch_size=16, train_micro_batch_size_per_gpu=4,
                                    gradient_accumulation_steps=2),
      ("error", "train_batch_size", "16 != "), Raises("16 != 4 * 2 * 1"), {"world_size": 1}),
    M("no world size fits", cfg(train_batch_size=16, train_micro_batch_size_per_gpu=3, gradient_accumulation_steps=2),
      ("error", "train_batch_size", "any number of ranks"), Raises("16 != 3 * 2 * 1")),
    M("micro batch above the total", cfg(train_batch_size=2, train_micro_batch_size_per_gpu=3),
      ("error", "train_batch_size", "any number of ranks"), Raises("has to be greater than 0")),
    M("no multiple on the ranks there are", cfg(train_batch_size=16, train_micro_batch_size_per_gpu=3),
      ("error", "train_batch_size", "15, or leave"), Raises("16 != 3 * 5 * 1"), {"world_size": 1}),
    M("AutoTP over more ranks than there are", cfg(tensor_parallel={"autotp_size": 2}),
      ("error", "tensor_parallel.autotp_size", "does not divide"), Raises("AssertionError"), {"world_size": 1}),
    # --- "auto" without Hugging Face ---
    M("stage auto", cfg(zero_optimization={"stage": "auto"}), ("error", "zero_optimization.stage", "default, 0"),
      Gives({STAGE: "0"}), PLAIN),
    M("bf16 auto", cfg(bf16={"enabled": "auto"}, **zero(1)), ("error", "bf16.enabled", "default, false"),
      Gives({"e.bfloat16_enabled()": "False"}), PLAIN),
    M("bucket auto", cfg(**zero(1, reduce_bucket_size="auto")),
      ("warning", "zero_optimization.reduce_bucket_size", "500000000"),
      Gives({"e.zero_reduce_bucket_size()": "500000000"}), PLAIN),
    M("lr auto", cfg(**adamw(lr="auto")), ("error", "optimizer.params.lr", "--for trainer"),
      Raises("'<=' not supported"), PLAIN),
    M("total_num_steps auto", cfg(**sched("WarmupDecayLR", total_num_steps="auto", warmup_max_lr=0.001)),
      ("error", "scheduler.params.total_num_steps", "--for trainer"), Raises("'<' not supported"), PLAIN),
    M("steps_per_print auto", cfg(steps_per_print="auto"), ("error", "steps_per_print", "crashes"),
      Raises("unsupported operand type(s) for %", "step")),
    # --- Hugging Face ---
    M("hf: nobody fills allgather_bucket_size", cfg(**zero(2, allgather_bucket_size="auto")),
      ("error", "zero_optimization.allgather_bucket_size", "Nobody"), Raises("not found in kwargs"), {"mode": "hf"}),
    M("hf: nobody fills zenflow", cfg(**zero(2, zenflow={"select_strategy": "auto"}, offload_optimizer={
        "device": "cpu", "pin_memory": True})),
      ("error", "zero_optimization.zenflow.select_strategy", "Nobody"), Raises("not found in kwargs"), {"mode": "hf"}),
    M("hf: nobody fills wall_clock_breakdown", cfg(**zero(1), wall_clock_breakdown="auto"),
      ("error", "wall_clock_breakdown", "Nobody"), Raises("not found in kwargs"), {"mode": "hf"}),
    M("hf: comments", text(**zero(1))[:-1] + "\n // mine\n}", ("error", "", "json.load"), Raises("Expecting"),
      {"mode": "hf"}),
    M("hf: no zero_optimization", cfg(), ("error", "zero_optimization", "Accelerate raises"),
      Raises("Please specify the ZeRO optimization config"), {"mode": "hf"}),
    M("hf: stage 0 and auto precision", {**AUTO_BATCH, **zero(0), "bf16": {"enabled": "auto"}},
      ("warning", "bf16.enabled", "ten early updates"), Source("runtime/engine.py _do_optimizer_sanity_check"), HF),
    M("hf: no accumulation key", {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", **zero(2)},
      ("error", "gradient_accumulation_steps", "8 updates"), Source("accelerate/utils/dataclasses.py"), HF),
    M("hf: scheduler in the file", {**AUTO_BATCH, **zero(2), **sched("WarmupLR", warmup_num_steps="auto")},
      ("warning", "scheduler", "--lr_scheduler_type"), Source("transformers/integrations/deepspeed.py"), HF),
    M("hf: optimizer in the file", {**AUTO_BATCH, **zero(2), **optim("Lion", lr="auto")},
      ("warning", "optimizer", "--optim"), Source("transformers/integrations/deepspeed.py"), HF),
    M("hf: numbers that must match", {**AUTO_BATCH, **zero(2), "train_micro_batch_size_per_gpu": 4},
      ("note", "train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
      Source("transformers/integrations/deepspeed.py"), HF),
    M("hf: WarmupDecayLR without its maximum", {**AUTO_BATCH, **zero(2), **sched(
        "WarmupDecayLR", total_num_steps="auto", warmup_num_steps="auto")},
      ("error", "scheduler.params.warmup_max_lr", "0.001"), Source("runtime/lr_schedules.py WarmupDecayLR"), HF),
    M("accelerate: betas auto", {**AUTO_BATCH, **zero(2), **optim("AdamW", lr="auto", betas="auto")},
      ("error", "optimizer.params.betas", "Accelerate does not"), Source("accelerate/accelerator.py"),
      {"mode": "accelerate"}),
    M("lightning: accumulation key", cfg(gradient_accumulation_steps=2, **zero(2)),
      ("error", "gradient_accumulation_steps", "MisconfigurationException"), Source(LIGHTNING),
      {"mode": "lightning"}),
    M("lightning: clipping in the file", cfg(**zero(2)), ("note", "gradient_clipping", "gradient_clip_val"),
      Source(LIGHTNING), {"mode": "lightning"}),
    M("lightning: optimizer in the file", cfg(**zero(2)), ("note", "optimizer", "configure_optimizers"),
      Source(LIGHTNING), {"mode": "lightning"}),
    M("lightning: total batch", cfg(**zero(2)), ("warning", "train_batch_size", "product"), Source(LIGHTNING),
      {"mode": "lightning"}),
    # --- combinations ---
    M("fp16 and bf16", cfg(fp16={"enabled": True}, bf16={"enabled": True}, **zero(1)),
      ("error", "bf16.enabled", "both on"), Raises("cannot be simultaneously enabled")),
    M("fp16 without ZeRO", cfg(fp16={"enabled": True}, **optim("SGD", lr=1.0)),
      ("error", "fp16.enabled", "too small"), Gives({"moved < 0.001": "True"})),
    M("bf16 without ZeRO", cfg(bf16={"enabled": True}),
      ("error", "bf16.enabled", "step count"),
      Gives({"int(next(iter(e.basic_optimizer.state.values()))['step'])": "3"})),
    M("bf16 and torch_autocast", cfg(bf16={"enabled": True}, torch_autocast={"enabled": True, "dtype": "bfloat16"},
                                     **zero(1)),
      ("error", "torch_autocast.enabled", "together"), Gives({"next(m.parameters()).dtype": "torch.bfloat16"})),
    M("float16 autocast with ZeRO", cfg(torch_autocast={"enabled": True, "dtype": "float16"}, **zero(1)),
      ("error", "torch_autocast.dtype", "clipped"), Gives({"float(e.get_global_grad_norm()) > 1000": "True"})),
    M("autocast without dtype", cfg(torch_autocast={"enabled": True}, **zero(1)),
      ("warning", "torch_autocast.dtype", "float16 on CUDA"), Gives({"e.torch_autocast_dtype()": "None"})),
    M("fp16 master weights without offload", cfg(fp16={"enabled": True, "fp16_master_weights_and_grads": True},
                                                 **zero(2)),
      ("error", "fp16.fp16_master_weights_and_grads", "offload"), Raises("Master weights feature requires")),
    M("bf16 master weights without ZeRO", cfg(bf16={"enabled": True, "bf16_master_weights_and_grads": True}),
      ("error", "bf16.bf16_master_weights_and_grads", "stage 1, 2 or 3"), Raises("only supported with ZeRO Stage 1")),
    M("bf16 states alone", cfg(bf16={"enabled": True, "bf16_optimizer_states": True}, **zero(1)),
      ("error", "bf16.bf16_optimizer_states", "Requires"), Raises("requires bf16_master_weights_and_grads")),
    M("param_dtype against the mode", cfg(data_types={"param_dtype": "bf16"}),
      ("error", "data_types.param_dtype", "conflicts"), Raises("conflicts with the enabled precision mode")),
    M("grad_accum_dtype at ZeRO-0", cfg(data_types={"grad_accum_dtype": "bf16"}),
      ("error", "data_types.grad_accum_dtype", "NotImplementedError"), Raises("unsupported mix of")),
    M("offload_param at stage 2", cfg(**zero(2, offload_param={"device": "cpu", "pin_memory": True})),
      ("error", "zero_optimization.offload_param", "only stage 3"),
      Gives({"type(e.optimizer).__name__": "DeepSpeedZeroOptimizer"})),
    M("offload_optimizer at stage 0", cfg(**zero(0, offload_optimizer={"device": "cpu", "pin_memory": True})),
      ("error", "zero_optimization.offload_optimizer", "ZeRO is off"),
      Gives({"e.zero_use_cpu_optimizer()": "True", STAGE: "0"})),
    M("NVMe at stage 2", cfg(**zero(2, offload_optimizer={"device": "nvme", "nvme_path": "/tmp", "pin_memory": True})),
      ("error", "zero_optimization.offload_optimizer.device", "silently means cpu"),
      Gives({"e.optimizer.cpu_offload": "True", "e.zero_nvme_offload_optimizer()": "False"})),
    M("NVMe without path", cfg(**zero(3, offload_optimizer={"device": "nvme", "pin_memory": True})),
      ("error", "zero_optimization.offload_optimizer.nvme_path", "without a path"), Raises("not NoneType")),
    M("ratio at stage 2", cfg(**zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5, "pin_memory": True})),
      ("error", "zero_optimization.offload_optimizer.ratio", "stage 3 only"), Raises("Partial offloading only")),
    M("offload without device", cfg(**zero(2, offload_optimizer={"pin_memory": True})),
      ("warning", "zero_optimization.offload_optimizer.device", "nothing is offloaded"),
      Gives({"e.zero_use_cpu_optimizer()": "False"})),
    M("cpu_offload", cfg(**zero(2, cpu_offload=True)),
      ("warning", "zero_optimization.cpu_offload", "offload_optimizer"),
      Gives({"e.zero_use_cpu_optimizer()": "True"})),
    M("cpu_offload twice", cfg(**zero(2, cpu_offload=True, offload_optimizer={"device": "cpu", "pin_memory": True})),
      ("error", "zero_optimization.cpu_offload", "Not together"), Raises("Cannot provide deprecated parameter")),
    M("offload and an optimizer from the code", cfg(optimizer=None, **zero(2, offload_optimizer=OFFLOAD)),
      ("warning", "zero_optimization.offload_optimizer", "DeepSpeedCPUAdam"),
      Source("runtime/engine.py _configure_optimizer")),
    M("NVMe parameters with the default buffer", cfg(**zero(3, offload_param={
        "device": "nvme", "nvme_path": "/d", "pin_memory": True})),
      ("note", "zero_optimization.offload_param.buffer_size", "embedding"),
      Source("runtime/swap_tensor/partitioned_param_swapper.py")),
    M("super_offload at stage 2", cfg(**zero(2, offload_optimizer=OFFLOAD | {"super_offload": True})),
      ("warning", "zero_optimization.offload_optimizer.super_offload", "stage 3 only"),
      Gives({"type(e.optimizer).__name__": "DeepSpeedZeroOptimizer"})),
    M("offload with default pin_memory", cfg(**zero(2, offload_optimizer={"device": "cpu"})),
      ("note", "zero_optimization.offload_optimizer.pin_memory", "default"),
      Gives({"e._config.zero_config.offload_optimizer.pin_memory": "True"})),
    M("elastic checkpoint at stage 3", cfg(**zero(3, elastic_checkpoint=True)),
      ("warning", "zero_optimization.elastic_checkpoint", "Ignored"), Source("runtime/zero/stage3.py")),
    M("bucket in megabytes", cfg(**zero(1, reduce_bucket_size=500)),
      ("warning", "zero_optimization.reduce_bucket_size", "elements"), Gives({"e.zero_reduce_bucket_size()": "500"})),
    M("autocast to float32", cfg(torch_autocast={"enabled": True, "dtype": "float32"}, **zero(1)),
      ("warning", "torch_autocast.dtype", "does nothing"), Gives({"e.torch_autocast_dtype()": "torch.float32"})),
    M("odd static loss scale", cfg(fp16={"enabled": True, "loss_scale": 100}, **zero(1)),
      ("note", "fp16.loss_scale", "power of two"), Gives({"e.loss_scale()": "100.0"})),
    M("autotp pass alone", cfg(compile={"deepcompile": True, "passes": ["autotp"]}),
      ("error", "compile.passes", "autotp_size"), Source("compile/config.py")),
    M("ZeRO without stage", cfg(zero_optimization={"overlap_comm": True}),
      ("warning", "zero_optimization.stage", "stays off"), Gives({STAGE: "0"})),
    M("stage3 keys at stage 2", cfg(**zero(2, stage3_max_live_parameters=100000)),
      ("warning", "zero_optimization.stage3_max_live_parameters", "stage 3 only"), Gives({STAGE: "2"})),
    M("prescale at stage 2", cfg(prescale_gradients=True, **zero(2)),
      ("error", "prescale_gradients", "reduce_scatter"), Raises("pre-scale gradients is not yet supported")),
    M("compute_grad_norm with clipping", cfg(**zero(1, compute_grad_norm=False)),
      ("error", "zero_optimization.compute_grad_norm", "gradient_clipping 0"), Raises("requires gradient_clipping=0")),
    M("ZenFlow without offload", cfg(**zero(2, zenflow={"topk_ratio": 0.1})),
      ("error", "zero_optimization.zenflow", "offload"), Raises("Zenflow must be used with cpu offload")),
    M("ZenFlow without interval", cfg(**zero(2, zenflow={"select_strategy": "step"}, offload_optimizer={
        "device": "cpu", "pin_memory": True})),
      ("error", "zero_optimization.zenflow.select_interval", "number"), Raises("select_interval must be a number")),
    M("ZenFlow selects too often", cfg(**optim("AdamW", lr=0.1), **zero(2, zenflow={
        "select_strategy": "step", "select_interval": 2, "update_interval": 4}, offload_optimizer=OFFLOAD)),
      ("error", "zero_optimization.zenflow.select_interval", "below update_interval"),
      Raises("Select interval must be greater or equal")),
    M("AutoEP preset", cfg(**zero(1), expert_parallel={"enabled": True, "preset_model": "mixtrel"}),
      ("error", "expert_parallel.preset_model", "'mixtral'"), Raises("Unknown preset_model")),
    M("AutoTP partition type", cfg(**zero(1), tensor_parallel={"autotp_size": 1, "partition_config": {"layer_specs": [
        {"patterns": ["x"], "partition_type": "rows"}]}}),
      ("error", "tensor_parallel.partition_config.layer_specs.0.partition_type", "'row'"),
      Source("module_inject/autotp_config.py from_dict")),
    M("hf: a float batch size", text(**zero(1)).replace('"train_batch_size": 2', '"train_batch_size": 2.0'),
      ("warning", "train_batch_size", "stays a float"), Gives({"type(e.train_batch_size()).__name__": "float"}), {
          "mode": "hf"}),
    M("master weights with torch_adam", cfg(bf16={"enabled": True, "bf16_master_weights_and_grads": True}, **zero(
        2, offload_optimizer=OFFLOAD)),
      ("error", "bf16.bf16_master_weights_and_grads", "torch_adam"), Raises("Master weights feature requires")),
    M("master weights in BF16_Optimizer", cfg(bf16={"enabled": True, "bf16_master_weights_and_grads": True}, **zero(1),
                                              data_types={"grad_accum_dtype": "fp32"}),
      ("warning", "bf16.bf16_master_weights_and_grads", "Ignored"),
      Gives({"type(e.optimizer).__name__": "BF16_Optimizer"})),
    M("cpu_offload false beside its successor", cfg(**zero(2, cpu_offload=False, offload_optimizer=OFFLOAD)),
      ("error", "zero_optimization.cpu_offload", "Not together"), Raises("Cannot provide deprecated parameter")),
    M("no gradient norm in BF16_Optimizer", cfg(gradient_clipping=0.0, bf16={"enabled": True}, **zero(
        1, compute_grad_norm=False), data_types={"grad_accum_dtype": "fp32"}),
      ("error", "zero_optimization.compute_grad_norm", "fp32 accumulation"), Raises("FP32 gradient accumulation")),
    M("ratio with torch_adam", cfg(**zero(3, offload_optimizer=OFFLOAD | {"ratio": 0.3})),
      ("error", "zero_optimization.offload_optimizer.ratio", "torch_adam"), Raises("Hybrid Optimizer Only Supports")),
    M("cpu_offload beside null", cfg(**zero(2, cpu_offload=True, offload_optimizer=None)),
      ("error", "zero_optimization.cpu_offload", "Not together"), Raises("Cannot provide deprecated parameter")),
    M("ZenFlow with torch_adam", cfg(**zero(2, zenflow={"update_interval": 4}, offload_optimizer=OFFLOAD)),
      ("error", "zero_optimization.zenflow", "torch_adam"), Raises("unexpected keyword argument 'torch_adam'")),
    M("ZenFlow with bias_correction", cfg(**optim("AdamW", lr=0.1, bias_correction=True), **zero(2, zenflow={
        "update_interval": 4}, offload_optimizer=OFFLOAD)),
      ("error", "zero_optimization.zenflow", "bias_correction"), Raises("argument 'bias_correction'")),
    M("quantized gradients without reduce_scatter", cfg(**zero(3, zero_quantized_gradients=True, reduce_scatter=False)),
      ("error", "zero_optimization.reduce_scatter", "quantized"), Raises("reduce_scatter should also be enabled")),
    M("ZenFlow at stage 0", cfg(**zero(0, zenflow={"update_interval": 4}, offload_optimizer=OFFLOAD)),
      ("error", "zero_optimization.zenflow", "stage 0"), Raises("reduce_gradients", "step")),
    M("auto_cast without fp16", cfg(fp16={"enabled": False, "auto_cast": True}),
      ("error", "fp16.auto_cast", "although fp16 is off"), Raises("must have the same dtype", "step")),
    M("odd bucket", cfg(**zero(2, allgather_bucket_size=200000001)),
      ("error", "zero_optimization.allgather_bucket_size", "odd"), Raises("must be a multiple of nccl_start")),
    M("ratio above 1", cfg(**zero(3, offload_optimizer={"device": "cpu", "ratio": 30, "pin_memory": True})),
      ("error", "zero_optimization.offload_optimizer.ratio", "<= 1"), Raises("less than or equal to 1")),
    M("random-LTD half configured", cfg(data_efficiency={"enabled": True, "data_routing": {
        "enabled": True, "random_ltd": {"enabled": True}}}),
      ("error", "data_efficiency.data_routing.random_ltd.total_layer_num", "Missing"), Raises("total_layer_num")),
    M("hf: a float number of steps", text(**zero(1), **sched("WarmupLR", warmup_num_steps=100.0)),
      ("error", "scheduler.params.warmup_num_steps", "float"), Raises("must be a positive integer"), {"mode": "hf"}),
    M("sum at stage 3", cfg(gradient_allreduce_op="sum", **zero(3)),
      ("error", "gradient_allreduce_op", "stage 3"), Raises("not supported with ZeRO stage 3")),
    M("unmanaged accumulation with overlap", cfg(managed_gradient_accumulation=False, **zero(1, overlap_comm=True)),
      ("error", "managed_gradient_accumulation", "overlap_comm"), Raises("supports ZeRO overlap_comm only")),
    M("pipeline with ZeRO-2", cfg(pipeline={"activation_checkpoint_interval": 1}, **zero(2)),
      ("warning", "pipeline", "refuses"), Source("runtime/pipe/engine.py:77")),
    M("a batch that becomes a float", {"train_batch_size": 2, "sequence_parallel_size": 1, "optimizer": ADAMW},
      ("warning", "sequence_parallel_size", "float"),
      Gives({"type(e.train_micro_batch_size_per_gpu()).__name__": "float"})),
    M("a checkpoint writer", cfg(checkpoint={"writer": {"type": "python", "data_parallel": "replica"}}),
      ("note", "checkpoint.writer", "CROSS_SIZE"), Raises("KeyError: 'CROSS_SIZE'")),
    M("a checkpoint writer for one rank", cfg(checkpoint={"writer": {"type": "python"}}),
      ("error", "checkpoint.writer.data_parallel", "dp_rank"),
      Source("runtime/model_checkpointing/data_parallel_writer_factory.py")),
    M("pipeline.stages", cfg(pipeline={"stages": 4}),
      ("warning", "pipeline.stages", "nowhere"), Source("runtime/pipe/engine.py reads four other keys")),
    M("steps of curriculum missing", cfg(data_efficiency={"enabled": True, "data_sampling": {
        "enabled": True, "curriculum_learning": {"enabled": True}}}),
      ("error", "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics", "Missing"),
      Raises("curriculum_metrics must be specified")),
    M("autocast with quantized weights", cfg(torch_autocast={"enabled": True, "dtype": "bfloat16"},
                                             **zero(3, zero_quantized_weights=True)),
      ("error", "zero_optimization.zero_quantized_weights", "Not together"),
      Raises("Cannot enable both torch autocast and zero quantized weights")),
    M("quantized weights on CPU", cfg(**zero(3, zero_quantized_weights=True)),
      ("note", "zero_optimization.zero_quantized_weights", "CUDA only"), Raises("not been implemented on CPU")),
    M("GPUDirect on CPU", cfg(aio={"use_gds": True}), ("note", "aio.use_gds", "CUDA only"),
      Raises("GDS currently only supported for CUDA")),
    # --- optimizers and schedulers ---
    M("weightdecay", cfg(**adamw(weightdecay=0.1)), ("error", "optimizer.params.weightdecay", "'weight_decay'"),
      Raises("unexpected keyword argument 'weightdecay'")),
    M("learning_rate in params", cfg(**optim("AdamW", learning_rate=0.1, torch_adam=True)),
      ("error", "optimizer.params.learning_rate", "lr"), Raises("unexpected keyword argument 'learning_rate'")),
    M("max_grad_norm in params", cfg(**adamw(max_grad_norm=1.0)),
      ("error", "optimizer.params.max_grad_norm", "gradient_clipping"), Raises("please switch to using")),
    M("momentum for AdamW", cfg(**adamw(momentum=0.9)), ("error", "optimizer.params.momentum", "TypeError"),
      Raises("unexpected keyword argument 'momentum'")),
    M("bias_correction for torch", cfg(**adamw(bias_correction=True)),
      ("error", "optimizer.params.bias_correction", "torch.AdamW"), Raises("unexpected keyword argument")),
    M("fused for FusedAdam", cfg(**optim("AdamW", lr=0.1, fused=True)),
      ("error", "optimizer.params.fused", "torch_adam"), Raises("unexpected keyword argument 'fused'")),
    M("set_grad_none for CPUAdam", cfg(**zero(2, offload_optimizer={"device": "cpu", "pin_memory": True}),
                                       **optim("AdamW", lr=0.1, set_grad_none=True)),
      ("error", "optimizer.params.set_grad_none", "DeepSpeedCPUAdam"), Raises("unexpected keyword argument")),
    M("FusedAdam as type", cfg(**optim("FusedAdam", lr=0.1)), ("error", "optimizer.type", "AdamW"),
      Raises("not a supported DeepSpeed Optimizer")),
    M("sgd in lower case", cfg(**optim("sgd", lr=0.1)), ("error", "optimizer.type", "SGD"),
      Raises("not a supported DeepSpeed Optimizer")),
    M("SGD with ZeRO", cfg(**zero(1), **optim("SGD", lr=0.1)), ("error", "optimizer.type", "untested"),
      Raises("untested ZeRO Optimizer")),
    M("AdamW made Adam", cfg(**adamw(adam_w_mode=False)), ("warning", "optimizer.params.adam_w_mode", "Ignored"),
      Gives({"type(e.basic_optimizer).__name__": "AdamW"})),
    M("scheduler without params", cfg(scheduler={"type": "WarmupLR"}), ("error", "scheduler.params", "No params"),
      Raises(MUST_BE_MAPPING)),
    M("cosine by its HF name", cfg(**sched("cosine")), ("error", "scheduler.type", "WarmupCosineLR"),
      Raises("does not recognize LR scheduler")),
    M("warmup_steps", cfg(**sched("WarmupLR", warmup_steps=10)),
      ("error", "scheduler.params.warmup_steps", "warmup_num_steps"), Raises("unexpected keyword argument")),
    M("WarmupDecayLR without total", cfg(**sched("WarmupDecayLR", warmup_max_lr=0.001)),
      ("error", "scheduler.params.total_num_steps", "needs"), Raises("missing 1 required positional argument")),
    M("WarmupDecayLR forgets lr", cfg(**adamw(lr=0.1), **sched("WarmupDecayLR", total_num_steps=9, warmup_num_steps=2)),
      ("error", "scheduler.params.warmup_max_lr", "0.001"), Gives({"e.lr_scheduler.max_lrs": "[0.001]"})),
    M("WarmupCosineLR with an lr", cfg(**sched("WarmupCosineLR", total_num_steps=9, warmup_max_lr=0.1)),
      ("error", "scheduler.params.warmup_max_lr", "scales"), Raises("unexpected keyword argument")),
    M("warmup 0", cfg(**sched("WarmupLR", warmup_num_steps=0)),
      ("error", "scheduler.params.warmup_num_steps", ">= 1"), Raises("must be a positive integer")),
    M("total_num_steps for WarmupLR", cfg(**sched("WarmupLR", total_num_steps=100)),
      ("error", "scheduler.params.total_num_steps", "never decays"), Raises("unexpected keyword argument")),
    M("warmup longer than the run", cfg(**sched("WarmupDecayLR", total_num_steps=10, warmup_num_steps=100,
                                                 warmup_max_lr=0.001)),
      ("warning", "scheduler.params.warmup_num_steps", "never"), Gives({"e.lr_scheduler.warmup_num_steps": "100"})),
    M("warmup_type cosine", cfg(**sched("WarmupLR", warmup_type="cosine")),
      ("error", "scheduler.params.warmup_type", "log"), Gives({"e.lr_scheduler.warmup_type": "log"})),
    M("torch scheduler with ZeRO", cfg(**zero(1), **sched("CosineAnnealingLR", T_max=10)),
      ("error", "scheduler.type", "wrapper"), Raises("is not an Optimizer")),
    M("LBFGS", cfg(**optim("LBFGS", lr=0.1)), ("error", "optimizer.type", "closure"),
      Raises("missing 1 required positional argument: 'closure'", "step")),
    M("SparseAdam", cfg(**optim("SparseAdam", lr=0.1)), ("error", "optimizer.type", "sparse"),
      Raises("does not support dense gradients", "step")),
    M("MuAdam without its package", cfg(**optim("MuAdam", lr=0.1)), ("note", "optimizer.type", "mup package"),
      Raises("UnboundLocalError")),
    M("optimizer without params", cfg(optimizer={"type": "SGD"}), ("warning", "optimizer.params", "default learning"),
      Gives({LR: "0.001"})),
    M("no lr", cfg(**optim("AdamW", eps=1e-8, torch_adam=True)), ("note", "optimizer.params.lr", "default"),
      Gives({LR: "0.001"})),
    M("Adam is AdamW", cfg(**optim("Adam", lr=0.001, weight_decay=0.1, torch_adam=True)),
      ("note", "optimizer.type", "decoupled"), Gives({"type(e.basic_optimizer).__name__": "AdamW"})),
    M("two eps for AdamW", cfg(**adamw(eps=[1e-8, 1e-3])), ("error", "optimizer.params.eps", "one number"),
      Raises("'<=' not supported")),
    M("weight decay 10", cfg(**adamw(weight_decay=10)), ("warning", "optimizer.params.weight_decay", "very large"),
      Gives({"e.basic_optimizer.param_groups[0]['weight_decay']": "10"})),
    M("amsgrad for FusedAdam", cfg(**optim("AdamW", lr=0.1, amsgrad=True)),
      ("error", "optimizer.params.amsgrad", "torch_adam"), Raises("does not support the AMSGrad variant")),
    M("Adafactor with ZeRO", cfg(**zero(1), **optim("Adafactor", lr=0.01), zero_allow_untested_optimizer=True),
      ("error", "optimizer.type", "matrix"),
      Gives({"[s for s in next(iter(e.basic_optimizer.state.values())) if 'var' in s]": "['variance']"})),
    M("Rprop under a schedule", cfg(**zero(1), **optim("Rprop", lr=0.01), zero_allow_untested_optimizer=True, **sched(
        "WarmupLR", warmup_num_steps=2, warmup_max_lr=0.02)),
      ("warning", "scheduler.type", "step size"), Source("torch/optim/rprop.py")),
    M("Nesterov without momentum", cfg(**optim("SGD", lr=0.1, nesterov=True)),
      ("error", "optimizer.params.nesterov", "momentum"), Raises("Nesterov momentum requires")),
    M("Muon at stage 3", cfg(**zero(3), **optim("Muon", lr=0.01, torch_adam=True)),
      ("error", "optimizer.type", "reduce_scatter"), Raises("Muon and reduce scatter cannot be used together")),
    M("ReduceLROnPlateau", cfg(**optim("SGD", lr=0.1), **sched("ReduceLROnPlateau")),
      ("error", "scheduler.type", "metric"), Gives({"float(e.lr_scheduler.best)": "2.0"})),
    M("OneCycleLR for Adagrad", cfg(**optim("Adagrad", lr=0.1), **sched("OneCycleLR", max_lr=0.1, total_steps=9)),
      ("error", "scheduler.params.cycle_momentum", "none"), Raises("cycle_momentum")),
    M("Lamb with a static scale", cfg(**optim("Lamb", lr=0.1), fp16={"enabled": True, "loss_scale": 8}, **zero(
        1), zero_allow_untested_optimizer=True),
      ("error", "fp16.loss_scale", "dynamic"), Raises("lamb optimizer requires dynamic loss scaling")),
    M("schedule against lr", cfg(**sched("WarmupLR", warmup_max_lr=0.01, warmup_num_steps=2)),
      ("note", "scheduler.params.warmup_max_lr", "never used"), Gives({"e.lr_scheduler.max_lrs": "[0.01]"})),
    M("default warmup", cfg(**sched("WarmupLR", warmup_max_lr=0.001)),
      ("note", "scheduler.params.warmup_num_steps", "1000"), Gives({"e.lr_scheduler.warmup_num_steps": "1000"})),
    M("falling warmup", cfg(**sched("WarmupLR", warmup_min_lr=0.1, warmup_max_lr=0.001, warmup_num_steps=2)),
      ("warning", "scheduler.params.warmup_min_lr", "falls"), Gives({"e.lr_scheduler.min_lrs": "[0.1]"})),
    M("very large warmup_max_lr", cfg(**sched("WarmupLR", warmup_max_lr=2, warmup_num_steps=2)),
      ("warning", "scheduler.params.warmup_max_lr", "very large"), Gives({"e.lr_scheduler.max_lrs": "[2]"})),
    M("OneCycle upside down", cfg(**sched("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.001)),
      ("warning", "scheduler.params.cycle_min_lr", "upside down"), Gives({"e.lr_scheduler.min_lrs": "[0.1]"})),
    M("optimizer in code, WarmupDecayLR without its maximum", cfg(optimizer=None, **sched(
        "WarmupDecayLR", total_num_steps=500, warmup_num_steps=5)),
      ("warning", "scheduler.params.warmup_max_lr", "0.001"), Source("runtime/lr_schedules.py WarmupDecayLR")),
    # --- sections that do nothing ---
    M("activation_checkpointing alone", cfg(activation_checkpointing={"partition_activations": True}),
      ("warning", "activation_checkpointing", "configure()"),
      Gives({"deepspeed.checkpointing.is_configured()": "False"})),
    M("tensorboard not enabled", cfg(tensorboard={"output_path": "/tmp/tb"}),
      ("warning", "tensorboard.enabled", "Off"), Gives({"e.monitor.enabled": "False"})),
    M("fp16 not enabled", cfg(fp16={"loss_scale": 0, "initial_scale_power": 8}),
      ("warning", "fp16.enabled", "Off"), Gives({"e.fp16_enabled()": "False"})),
    M("bfloat16 beside bf16", cfg(bf16={"enabled": False}, bfloat16={"enabled": True}, **zero(1)),
      ("warning", "bfloat16", "Not read"), Gives({"e.bfloat16_enabled()": "False"})),
    M("no optimizer", cfg(optimizer=None, **zero(3)), ("note", "optimizer", "first step"),
      Raises("DeepSpeedZeRoOffload", "step")),
    M("no gather flag", cfg(zero_optimization={"stage": 3}),
      ("warning", "zero_optimization.stage3_gather_16bit_weights_on_model_save", "save_16bit_model"),
      Gives({"e.save_16bit_model('/tmp/never')": "False"})),
    M("hf: max_grad_norm is not passed on", cfg(gradient_clipping=None, **zero(1)),
      ("note", "gradient_clipping", "max_grad_norm"), Gives({"e.gradient_clipping()": "1.0"}), {"mode": "hf"}),
    M("fp16 off with settings", cfg(fp16={"enabled": False, "loss_scale": 8}), ("note", "fp16.enabled", "loss_scale"),
      Gives({"e.fp16_enabled()": "False"})),
    M("monitor of a plain loop", cfg(csv_monitor={"enabled": True, "output_path": "csv", "job_name": "x"}),
      ("note", "csv_monitor", "write_events"), Gives({"e.monitor.enabled": "True"})),
    M("wandb without its package", cfg(wandb={"enabled": True}), ("note", "wandb.enabled", "pip install wandb"),
      Raises("No module named 'wandb'")),
    M("aio without nvme", cfg(aio={"block_size": 4096}), ("note", "aio", "without offload to nvme"),
      Gives({"e.aio_config()['block_size']": "4096"})),
    M("clipping by default", cfg(gradient_clipping=None), ("note", "gradient_clipping", "1.0 by default"),
      Gives({"e.gradient_clipping()": "1.0"})),
]  # fmt: skip

V = Valid
AUTO_ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
FP16 = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1}  # fmt: skip
BF16 = {"bf16": {"enabled": True}}
HF_SECTIONS = ("warning scheduler", "note optimizer", "note optimizer.params.betas", "note optimizer.params.eps")
CLIP = "note gradient_clipping"
NO_OPTIMIZER = "note optimizer"
GATHER = "warning zero_optimization.stage3_gather_16bit_weights_on_model_save"


def warmup(type_="WarmupLR", **more):
    more.setdefault("total_num_steps", "auto") if type_ == "WarmupDecayLR" else None
    return sched(type_, warmup_min_lr="auto", warmup_max_lr="auto", warmup_num_steps="auto", **more)


VALID = [
    V("smallest", {"train_batch_size": 2, "optimizer": ADAMW}, (CLIP,)),
    V("micro batch only", cfg(train_batch_size=None, train_micro_batch_size_per_gpu=2)),
    V("two batch numbers", cfg(train_batch_size=None, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2)),
    V("all three", cfg(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1), ("note train_batch_size",)),
    V("all three, world size known", cfg(train_batch_size=64, train_micro_batch_size_per_gpu=4,
                                         gradient_accumulation_steps=2), (), "parse", {"world_size": 8}),
    V("null counts as absent", cfg()
      | {"gradient_accumulation_steps": None, "steps_per_print": None}),
    V("$schema and remarks", cfg(**{"$schema": "./ds_config.schema.json", "_comment": "mine", "//": "mine too"})),
    V("ZeRO-1 fp32", cfg(**zero(1))),
    V("ZeRO-1 bf16", cfg(**BF16, **zero(1))),
    V("ZeRO-2 bf16, tuned", cfg(**BF16, **zero(
        2, contiguous_gradients=True, overlap_comm=True, reduce_scatter=True, reduce_bucket_size=5e8,
        allgather_bucket_size=5e8, allgather_partitions=True, round_robin_gradients=True))),
    V("ZeRO-3 bf16, tuned", cfg(**BF16, **zero(
        3, overlap_comm=True, contiguous_gradients=True, sub_group_size=1e9, reduce_bucket_size=16777216,
        stage3_prefetch_bucket_size=15099494, stage3_param_persistence_threshold=40960,
        stage3_max_live_parameters=1e9, stage3_max_reuse_distance=1e9))),
    V("ZeRO-3 by field names", cfg(zero_optimization={
        "stage": 3, "prefetch_bucket_size": 1000000, "gather_16bit_weights_on_model_save": True})),
    V("ZeRO-3 without gather flag", cfg(zero_optimization={"stage": 3}), (GATHER,)),
    V("ZeRO true, as in Getting Started",
      {"train_batch_size": 8, "gradient_accumulation_steps": 1, **optim("Adam", lr=0.00015),
       "fp16": {"enabled": True}, "zero_optimization": True}, ("warning zero_optimization", CLIP), "parse"),
    V("fp16 spelled out", cfg(fp16=FP16 | {"initial_scale_power": 8}, **zero(2))),
    V("fp16 static scale", cfg(fp16={"enabled": True, "loss_scale": 128}, **zero(1))),
    V("fp16 there but off", cfg(fp16=FP16 | {"enabled": False}), ("note fp16.enabled",)),
    V("bf16 low-precision states", cfg(bf16={"enabled": True, "bf16_master_weights_and_grads": True,
                                             "bf16_optimizer_states": True}, **zero(2))),
    V("bf16 with fp32 accumulation", cfg(**BF16, **zero(1), data_types={"grad_accum_dtype": "fp32"})),
    V("torch_autocast", cfg(torch_autocast={"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": [
        "torch.nn.Linear", "torch.nn.Conv2d"]}, **zero(1))),
    V("offload to CPU", cfg(**zero(3, offload_optimizer=OFFLOAD, offload_param=OFFLOAD))),
    V("offload with defaults", cfg(**zero(2, offload_optimizer={"device": "cpu"})),
      ("note zero_optimization.offload_optimizer.pin_memory",), "parse"),
    V("offload, device none", cfg(**zero(2, offload_optimizer={"device": "none"}, offload_param={"device": "none"}))),
    V("offload null", cfg(**zero(3, offload_param=None, offload_optimizer=None))),
    V("NVMe", cfg(**zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 4,
                                               "pin_memory": True, "fast_init": False},
                         offload_param={"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 5,
                                        "buffer_size": 1e8, "max_in_cpu": 1e9, "pin_memory": True}),
                  aio={"block_size": 1048576, "queue_depth": 8, "thread_count": 1, "single_submit": False,
                       "overlap_events": True}), (
        "warning aio.thread_count", "note zero_optimization.offload_param.buffer_size"), "parse"),
    V("cpu_offload, as in the MoE tutorial", cfg(**zero(2, cpu_offload=True, allgather_bucket_size=50000000)),
      ("warning zero_optimization.cpu_offload",)),
    V("twin-flow ratio", cfg(**optim("AdamW", lr=0.001), **zero(3, offload_optimizer=OFFLOAD | {"ratio": 0.3})),
      (), "parse"),
    V("ZenFlow", cfg(**optim("AdamW", lr=0.001), **BF16, **zero(2, offload_optimizer=OFFLOAD, zenflow={
        "topk_ratio": 0.05, "select_strategy": "auto", "select_interval": "auto", "update_interval": 4,
        "full_warm_up_rounds": 0, "overlap_step": True})), (), "parse"),
    V("ZeRO++", cfg(train_batch_size=32, **zero(
        3, zero_hpz_partition_size=8, zero_quantized_weights=True, zero_quantized_gradients=True)),
      ("note zero_optimization.zero_quantized_weights",), "parse", {"world_size": 16}),
    V("leaf modules", cfg(**zero(3, leaf_module={"classes": ["torch.nn.Linear"], "names": "experts"}))),
    V("client optimizer", cfg(optimizer=None), (NO_OPTIMIZER,), "parse"),
    V("Adam as it is documented", cfg(**optim("Adam", lr=0.001, betas=[0.8, 0.999], eps=1e-8, weight_decay=3e-7)),
      ("note optimizer.type",), "parse"),
    V("torch Adam", cfg(**optim("Adam", lr=0.001, torch_adam=True, adam_w_mode=False, weight_decay=0.1, fused=True))),
    V("lower case type", cfg(**optim("adamw", lr=0.001, torch_adam=True))),
    V("Muon", cfg(**zero(1), **optim("Muon", lr=0.01, momentum=0.9, weight_decay=0.0, muon_lr=0.02, adam_lr=0.001,
                                     ns_method="gram", betas=[0.9, 0.95], eps=1e-10)), (), "parse"),
    V("Lion offloaded", cfg(**zero(2, offload_optimizer=OFFLOAD), **optim("Lion", lr=0.0001, betas=[0.95, 0.98])),
      (), "parse"),
    V("SGD without ZeRO", cfg(**optim("SGD", lr=1.5, momentum=0.9, nesterov=True))),
    V("SGD allowed", cfg(zero_allow_untested_optimizer=True, **zero(2), **optim("SGD", lr=0.1))),
    V("Lamb", cfg(**optim("Lamb", lr=0.011, weight_decay=0.01, bias_correction=False, max_coeff=0.3, min_coeff=0.01)),
      (), "parse"),
    V("WarmupLR", cfg(**sched("WarmupLR", warmup_min_lr=0, warmup_max_lr=0.001, warmup_num_steps=1000))),
    V("WarmupDecayLR", cfg(**sched("WarmupDecayLR", total_num_steps=1000, warmup_max_lr=0.001, warmup_num_steps=100,
                                   warmup_type="linear", last_batch_iteration=-1))),
    V("WarmupCosineLR", cfg(**sched("WarmupCosineLR", total_num_steps=1000, warmup_min_ratio=0, warmup_num_steps=100,
                                    cos_min_ratio=0.001, warmup_type="linear"))),
    V("OneCycle, as in its tutorial", cfg(**sched(
        "OneCycle", cycle_first_step_size=1000, cycle_first_stair_count=500, cycle_second_step_size=1000,
        cycle_second_stair_count=500, decay_step_size=1000, cycle_min_lr=0.0001, cycle_max_lr=0.001,
        decay_lr_rate=0.001, cycle_min_mom=0.85, cycle_max_mom=0.99, decay_mom_rate=0.0))),
    V("LRRangeTest, as in its tutorial", cfg(**sched(
        "LRRangeTest", lr_range_test_min_lr=0.0001, lr_range_test_step_size=200, lr_range_test_step_rate=5,
        lr_range_test_staircase=False))),
    V("torch scheduler without ZeRO", cfg(**sched("StepLR", step_size=10, gamma=0.5))),
    V("profilers and logging", cfg(
        steps_per_print=10, wall_clock_breakdown=True, memory_breakdown=False, dump_state=False, log_level="INFO",
        flops_profiler={"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True,
                        "output_file": None},
        comms_logger={"enabled": False, "verbose": False, "prof_all": True, "debug": False,
                      "prof_ops": ["all_reduce"]})),
    V("monitors", cfg(tensorboard={"enabled": True, "output_path": "/tmp/tb", "job_name": "x"},
                      csv_monitor={"enabled": True, "output_path": "/tmp/csv/", "job_name": "x"},
                      wandb={"enabled": False, "team": "t", "group": "g", "project": "p"}),
      ("note tensorboard",), "parse"),
    V("activation checkpointing", cfg(activation_checkpointing={
        "partition_activations": True, "cpu_checkpointing": True, "contiguous_memory_optimization": False,
        "number_checkpoints": None, "synchronize_checkpoint_boundary": False, "profile": False}),
      ("warning activation_checkpointing",)),
    V("checkpoint", cfg(checkpoint={"tag_validation": "Warn", "load_universal": False, "use_node_local_storage": False,
                                    "parallel_write": {"pipeline_stage": False},
                                    "writer": {"type": "fast", "decoupled": True, "data_parallel": "replica"}}),
      ("note checkpoint.writer",), "parse"),
    V("communication", cfg(communication_data_type="FP32", prescale_gradients=True, gradient_predivide_factor=2.0,
                           gradient_allreduce_op="mean", dataloader_drop_last=True, disable_allgather=False)),
    V("pipeline", cfg(**zero(1), pipeline={"activation_checkpoint_interval": 1, "use_reentrant": False})),
    V("pipeline bf16 without ZeRO", cfg(**BF16, pipeline={"activation_checkpoint_interval": 1}),
      ("note bf16.enabled",), "parse"),
    V("AutoTP", cfg(train_batch_size=8, train_micro_batch_size_per_gpu=1, **BF16, **zero(2), tensor_parallel={
        "autotp_size": 4, "preset_model": "llama", "partition_config": {"use_default_specs": False, "layer_specs": [
            {"patterns": [".*\\.o_proj\\.weight$"], "partition_type": "row"}]}}), (), "parse", {"world_size": 8}),
    V("AutoTP, batch of the data-parallel groups", cfg(train_batch_size=2, train_micro_batch_size_per_gpu=1, **zero(1),
                                                      tensor_parallel={"autotp_size": 4}),
      ("warning train_batch_size",), "none", {"world_size": 8}),
    V("Ulysses", cfg(train_batch_size=None, train_micro_batch_size_per_gpu=1, **zero(3), sequence_parallel_size=2,
                     seq_parallel_communication_data_type="bf16"), (), "parse"),
    V("AutoSP", {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}, "gradient_clipping": 1.0,
                 "compile": {"deepcompile": True, "passes": ["autosp"]}, "gradient_accumulation_steps": 1,
                 "train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "sequence_parallel_size": 2},
      ("warning bf16.enabled", NO_OPTIMIZER, "note compile.deepcompile"), "parse", {"world_size": 2}),
    V("AutoEP", cfg(**BF16, **zero(1), expert_parallel={
        "enabled": True, "autoep_size": 8, "preset_model": "qwen3_5_moe", "load_balance_coeff": None,
        "top_k": "auto", "expert_w3": None}), (), "parse"),
    V("hybrid engine, as in DeepSpeed-Chat", cfg(
        **zero(3, memory_efficient_linear=False, stage3_max_live_parameters=3e7), prescale_gradients=False,
        hybrid_engine={"enabled": True, "max_out_tokens": 512, "inference_tp_size": 1, "pin_parameters": True,
                       "release_inference_cache": False, "tp_gather_partition_size": 8}), (), "parse"),
    V("random-LTD and curriculum", cfg(data_efficiency={
        "enabled": True, "seed": 1234,
        "data_routing": {"enabled": True, "random_ltd": {
            "enabled": True, "total_layer_num": 24, "random_ltd_layer_num": 22, "random_ltd_layer_id": [1, 2],
            "model_mask_name": "attention_mask", "model_type": "decoder", "hidden_state_order": "seq_batch_dim",
            "random_ltd_schedule": {"min_value": 128, "max_value": 2048, "schedule_type": "fixed_linear",
                                    "schedule_config": {"require_steps": 200000, "seq_per_step": 16}}}},
        "data_sampling": {"enabled": True, "num_epochs": 1, "num_workers": 0, "curriculum_learning": {
            "enabled": True, "data_cluster_path": "/x", "curriculum_metrics": {"rarity": {
                "index_to_sample_path": "/x", "difficulty_type": "percentile"}}}}}), (), "parse"),
    V("autotuning", {"train_micro_batch_size_per_gpu": "auto", "fp16": {"enabled": True}, "gradient_clipping": 1.0,
                     "zero_optimization": {"stage": [0, 1, 2, 3], "reduce_bucket_size": [5e7, 5e8]},
                     "autotuning": {"enabled": True, "fast": False, "max_train_batch_size": None, "arg_mappings": {
                         "train_micro_batch_size_per_gpu": "--per_device_train_batch_size"}}}, (
        "note autotuning.arg_mappings",), "none"),
    V("timers and others", cfg(timers={"throughput": {"enabled": True, "synchronized": False}}, vocabulary_size=50304,
                               disable_python_gc=False, use_data_before_expert_parallelism=False,
                               managed_gradient_accumulation=True)),
    V("comments, trailing commas, no quotes", """
        // DeepSpeed reads hjson
        { train_batch_size: 2,   # two
          gradient_clipping: 1.0 /* default */
          'zero_optimization': {"stage": 1, "overlap_comm": true,},
          optimizer: {type: AdamW
                      params: {"lr": 1e-3, "torch_adam": true, "betas": [0.9, 0.95,]}},
        }"""),
    V("no braces", "train_batch_size: 2\ngradient_clipping: 1.0\noptimizer: {type: SGD\nparams: {lr: 0.1}}\n"),
    V("2.0 is 2 in hjson", '{"train_micro_batch_size_per_gpu": 2.0, "gradient_accumulation_steps": 1.0, '
      '"gradient_clipping": 1.0, "optimizer": {"type": "SGD", "params": {"lr": 1e-1}}}'),
    # --- Hugging Face: what their documentation shows ---
    V("hf ZeRO-2", {"fp16": FP16 | {"enabled": "auto"}, "optimizer": AUTO_ADAMW, **warmup(), **AUTO_BATCH,
                    **zero(2, offload_optimizer=OFFLOAD, allgather_partitions=True, allgather_bucket_size=2e8,
                           overlap_comm=True, reduce_scatter=True, reduce_bucket_size=2e8, contiguous_gradients=True),
                    "steps_per_print": 2000, "wall_clock_breakdown": False}, HF_SECTIONS, "parse", HF),
    V("hf ZeRO-3", {"fp16": FP16 | {"enabled": "auto"}, "bf16": {"enabled": "auto"}, "optimizer": AUTO_ADAMW,
                    **warmup("WarmupDecayLR"), **AUTO_BATCH,
                    **zero(3, offload_optimizer=OFFLOAD, offload_param=OFFLOAD, overlap_comm=True, sub_group_size=1e9,
                           reduce_bucket_size="auto", stage3_prefetch_bucket_size="auto",
                           stage3_param_persistence_threshold="auto", stage3_max_live_parameters=1e9,
                           stage3_gather_16bit_weights_on_model_save="auto")}, HF_SECTIONS, "parse", HF),
    V("hf: no optimizer, stage 3 autos at stage 2", {**AUTO_BATCH, "bf16": {"enabled": "auto"}, **zero(
        2, reduce_bucket_size="auto", stage3_prefetch_bucket_size="auto")}, (), "parse", HF),
    V("Accelerate template", {"fp16": FP16, "optimizer": {"type": "AdamW", "params": {
        "lr": "auto", "weight_decay": "auto", "torch_adam": True, "adam_w_mode": True}}, **warmup("WarmupDecayLR"),
        **AUTO_BATCH, "gradient_accumulation_steps": 1, **zero(2, reduce_bucket_size="auto")},
      ("warning scheduler", "note optimizer", "note gradient_accumulation_steps"), "parse", HF),
    V("Accelerate fills the stage", {**AUTO_BATCH, **BF16, "zero_optimization": {
        "stage": "auto", "offload_optimizer": {"device": "auto", "nvme_path": "auto", "pin_memory": True},
        "stage3_gather_16bit_weights_on_model_save": "auto"}}, (), "parse", HF),
    V("hf AutoTP", {"bf16": {"enabled": "auto"}, "optimizer": AUTO_ADAMW, **warmup("WarmupDecayLR"), **AUTO_BATCH,
                    "zero_optimization": {"stage": 2, "gather_16bit_weights_on_model_save": True},
                    "tensor_parallel": {"autotp_size": 4}, "steps_per_print": 1}, HF_SECTIONS, "parse", HF),
]  # fmt: skip


# --- what DeepSpeed really does -------------------------------------------------------------------------------------


def hf_fill(path):
    """What TrainingArguments(deepspeed=path) and Accelerator.prepare() do to a config before DeepSpeed sees it."""
    from types import SimpleNamespace as Args

    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "2"
    args = Args(world_size=1, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_grad_norm=1.0,
                learning_rate=0.001, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.0,
                save_on_each_node=False, fp16=False, fp16_full_eval=False, bf16=False, bf16_full_eval=False,
                get_warmup_steps=lambda total: 10)  # fmt: skip
    config = HfTrainerDeepSpeedConfig(path)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config.config.setdefault(key, "auto")  # keep the Trainer's own comparison of both numbers out of this
    config.fill_match = lambda key, value, *rest, **more: HfTrainerDeepSpeedConfig.fill_match(
        config, key, value, must_match=False)  # fmt: skip
    config.trainer_config_process(args)
    config.trainer_config_finalize(args, Args(config=Args(hidden_size=8)), 100)
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    filled = {"gradient_clipping": 1.0, "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
              "train_micro_batch_size_per_gpu": 2, "train_batch_size": 2,
              "zero_optimization.reduce_bucket_size": 64, "zero_optimization.stage3_prefetch_bucket_size": 57,
              "zero_optimization.stage3_param_persistence_threshold": 80}  # fmt: skip
    plugin.deepspeed_config_process(must_match=False, **filled)
    return plugin.deepspeed_config


def run_one(case, deepspeed, torch, folder):
    """Returns {"when": ..., "error": ...} or {"when": "trained", "values": {...}}."""
    path = folder / "ds_config.json"
    path.write_text(case.config if isinstance(case.config, str) else json.dumps(case.config))
    wanted = list(case.really.values) if isinstance(getattr(case, "really", None), Gives) else []
    torch.manual_seed(0)
    m = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    before = [p.detach().clone() for p in m.parameters()]
    when = "initialize"
    e = None
    try:
        config = hf_fill(str(path)) if case.check.get("mode") == "hf" else str(path)
        if getattr(case, "run", "") == "parse":
            from deepspeed.runtime.config import DeepSpeedConfig

            ranks = case.check.get("world_size", 1) // (case.config.get("sequence_parallel_size", 1) or 1) or 1
            DeepSpeedConfig(config, mpu=FakeMpu(ranks))
            return {"when": "parsed"}
        e, *_ = deepspeed.initialize(model=m, model_parameters=m.parameters(), config=config)
        when = "step"
        for _ in range(2):
            x = torch.randn(2, 8).to(next(m.parameters()).dtype)
            loss = e(x).float().pow(2).mean()
            e.backward(loss)
            e.step()
        if e.zero_optimization_stage() < 3:
            moved = max(
                (p.detach().float() - b).abs().max().item() for p, b in zip(m.parameters(), before, strict=True)
            )
        names = dict(locals())
        return {"when": "trained", "values": {w: str(eval(w, {"deepspeed": deepspeed}, names)) for w in wanted}}
    except BaseException as error:
        return {"when": when, "error": f"{type(error).__name__}: {error}"}
    finally:
        if e is not None:
            e.destroy()


class FakeMpu:
    """DeepSpeedConfig asks an mpu for the number of data-parallel ranks: here, any number without launching them."""

    def __init__(self, ranks):
        self.get_data_parallel_world_size = lambda: ranks


def main():
    out, only = Path(sys.argv[1]).absolute(), sys.argv[2:]
    sys.path.insert(0, str(REPO))
    os.chdir(out.parent)  # monitors of some configs write where they are
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29655")
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no compiler on CPU, see common/
    get_accelerator().is_fp16_supported = lambda: True  # some CPUs say no; what a GPU user would see is the question
    CPUAdamBuilder.load = lambda self, verbose=True: type("NoKernel", (), {"__getattr__": lambda *_: lambda *_: None})()
    deepspeed.init_distributed("gloo")
    folder = out.parent
    results = {}
    for case in [*MISTAKES, *VALID]:
        skip = isinstance(getattr(case, "really", None), Source) or getattr(case, "run", "") == "none"
        if not skip and (not only or case.name in only):
            results[case.name] = run_one(case, deepspeed, torch, folder)
    out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
