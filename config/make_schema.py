"""Generate config/ds_config.schema.json: everything that DeepSpeed reads in its JSON config.

    python config/make_schema.py            # write the schema
    python config/make_schema.py --check    # exit 1 when it differs from the installed DeepSpeed (tests run this)

DeepSpeed ships no schema. Half of its config is pydantic models, and those are walked here: names, types, ranges,
defaults and the docstrings under the fields. The other half is plain `dict.get`, which nothing can enumerate, so
those keys are listed by hand in `plain_sections()`, with defaults imported from DeepSpeed where it has a constant.
Optimizers and schedulers take whatever their constructors take: `inspect.signature` knows.

Draft-07, because VS Code implements that one completely. Keys that start with `x-` are for check.py:
  x-unknown    what DeepSpeed does with a key it does not know: "reject" (pydantic) or "ignore" (dict.get)
  x-hf-auto    transformers or Accelerate replaces "auto" here, and nowhere else
  x-deepspeed  removed keys, optimizer and scheduler signatures (on the root)
"""

import argparse
import ast
import enum
import inspect
import json
import logging
import sys
import textwrap
import types
import typing
from pathlib import Path

logging.disable(logging.WARNING)  # deepspeed and torch announce themselves on import

import deepspeed
import torch
from deepspeed.autotuning import constants as tuning
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, available_preset_names
from deepspeed.module_inject.autotp_config import PartitionType
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.profiling import constants as profiling
from deepspeed.runtime import config as ds
from deepspeed.runtime import constants as base
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.data_pipeline import constants as data
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.model_checkpointing import constants as ckpt
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor import constants as aio
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import log_levels
from pydantic_core import PydanticUndefined

OUT = Path(__file__).with_name("ds_config.schema.json")

# transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig and accelerate.utils.dataclasses.DeepSpeedPlugin
HF_FILLS = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16.enabled",
    "bf16.enabled",
    "optimizer.params.lr",
    "optimizer.params.betas",
    "optimizer.params.eps",
    "optimizer.params.weight_decay",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.total_num_steps",
    "zero_optimization.stage",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.nvme_path",
]

# --- pydantic models ------------------------------------------------------------------------------------------------


def field_docs(model):
    """DeepSpeed documents a field with a string literal under it, which only the source still knows."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0].body
    docs = {}
    for stmt, nxt in zip(body, body[1:], strict=False):
        is_text = isinstance(nxt, ast.Expr) and isinstance(nxt.value, ast.Constant) and isinstance(nxt.value.value, str)
        if isinstance(stmt, ast.AnnAssign) and is_text:
            docs[stmt.target.id] = " ".join(nxt.value.value.split())
    return docs


def type_schema(tp):
    """The JSON Schema of a Python annotation; None for what cannot come from JSON (torch.dtype, an mpu object)."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin in (typing.Union, types.UnionType):
        parts = [type_schema(a) for a in args if a is not type(None)]
        merged = dict(parts[0])
        kinds = [k for p in parts for k in as_list(p["type"])] + (["null"] if type(None) in args else [])
        merged["type"] = kinds if len(kinds) > 1 else kinds[0]
        if "enum" in merged and type(None) in args:
            merged["enum"] = [*merged["enum"], None]
        return merged
    if origin is typing.Literal:
        return {"type": "string", "enum": list(args)}
    if origin in (list, tuple) or tp in (list, tuple):
        return {"type": "array", **({"items": type_schema(args[0])} if origin is list else {})}
    if origin is dict or tp is dict:
        return {"type": "object"}
    if inspect.isclass(tp) and issubclass(tp, DeepSpeedConfigModel):
        return model_schema(tp)
    if inspect.isclass(tp) and issubclass(tp, enum.Enum):
        values = list(dict.fromkeys(m.value for m in tp))
        return {"type": "integer" if isinstance(values[0], int) else "string", "enum": values}
    simple = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
    return {"type": simple[tp]} if tp in simple else None


def as_list(value):
    return value if isinstance(value, list) else [value]


def model_schema(model):
    docs = field_docs(model)
    props = {}
    for name, field in model.model_fields.items():
        schema = type_schema(field.annotation)
        if schema is None:
            continue
        for meta in field.metadata:
            for attr, key in [("gt", "exclusiveMinimum"), ("ge", "minimum"), ("lt", "exclusiveMaximum"),
                              ("le", "maximum")]:  # fmt: skip
                if getattr(meta, attr, None) is not None:
                    schema[key] = getattr(meta, attr)
        default = field.get_default(call_default_factory=True)
        if default is not PydanticUndefined and isinstance(default, (bool, int, float, str, list, type(None))):
            schema["default"] = default if not isinstance(default, (int, str)) or isinstance(default, bool) else (
                type_of(default)(default))  # fmt: skip
        if docs.get(name) or field.description:
            schema["description"] = docs.get(name) or field.description
        extra = field.json_schema_extra or {}
        if extra.get("deprecated"):
            schema["deprecated"] = True
            schema["deprecationMessage"] = f"Deprecated: use {extra['new_param']}."
        names = [field.alias, name] if field.alias else [name]  # populate_by_name: both are read, but not together
        for key in names:
            props[key] = dict(schema) if key == names[0] else {**schema, "x-alias-of": names[0]}
    return section(props, unknown="reject")


def type_of(default):
    return int if isinstance(default, int) else str  # pp_int and str-enums down to plain JSON values


# --- plain dict.get keys --------------------------------------------------------------------------------------------


def section(props, unknown="ignore", description=None, **extra):
    text = {"description": description} if description else {}
    closed = {"additionalProperties": False, "x-unknown": unknown}
    return {"type": "object", **text, "properties": props, **closed, **extra}


def key(type_, default=None, description="", **extra):
    # no default is written for "not set": an editor would insert null, and many plain keys crash on null
    shown = {} if default is None else {"default": default}
    return {"type": type_, **shown, **({"description": description} if description else {}), **extra}


def any_case(*words, null=False, **extra):
    forms = list(dict.fromkeys(form(w) for w in words for form in (str.lower, str.upper, str.capitalize)))
    return {"type": ["string", "null"] if null else "string", "enum": forms + [None] * null, **extra}


def autoep_schema():
    props = {}
    for name, hint in typing.get_type_hints(AutoEPConfig).items():
        if name.startswith("_"):
            continue
        if name in ("load_balance_coeff", "expert_w3"):
            props[name] = {"type": "null"} if name == "load_balance_coeff" else {"type": ["string", "null"]}
            continue
        schema = type_schema(hint)
        default = AutoEPConfig.__dataclass_fields__[name].default
        props[name] = {**schema, **({} if default is None else {"default": default})}
    props["autoep_size"]["minimum"] = 1
    props["expert_tensor_parallel_size"].update({"minimum": 1, "maximum": 1})  # reserved; anything else raises
    props["preset_model"]["enum"] = [*available_preset_names(), None]
    return section(props, description="AutoEP expert parallelism (module_inject/auto_ep_config.py).", **NULLABLE)


NULLABLE = {"type": ["object", "null"]}
POSITIVE = {"minimum": 1}
DTYPES = ["fp32", "float32", "torch.float32", "float", "fp16", "float16", "torch.float16", "half", "bf16",
          "bfloat16", "torch.bfloat16"]  # fmt: skip  # runtime/config.py DtypeEnum


def plain_sections():
    """Keys that DeepSpeed reads with dict.get (runtime/config.py and the files imported from there)."""
    return {
        **batch_keys(),
        **step_keys(),
        **training_sections(),
        **model_sections(),
        **tool_sections(),
        **storage_sections(),
        **data_sections(),
        "expert_parallel": autoep_schema(),
    }


def batch_keys():
    """The batch, and when a step is taken."""
    batch = "train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x data-parallel ranks. "
    return {
        "$schema": key("string", description="Where this schema is, for editors. DeepSpeed ignores it at top level."),
        "train_batch_size": key(["integer", "null"], None, batch + "Give two of the three.", **POSITIVE),
        "train_micro_batch_size_per_gpu": key(["integer", "null"], None, batch + "Give two of the three.", **POSITIVE),
        "gradient_accumulation_steps": key(
            ["integer", "null"], None, batch + "1 when it cannot be derived.", **POSITIVE
        ),
        "managed_gradient_accumulation": key(
            "boolean",
            base.MANAGED_GRADIENT_ACCUMULATION_DEFAULT,
            "false: every engine.step() updates the weights, and you decide when to call it.",
        ),
    }


def step_keys():
    """Communication, clipping, printing, parallel sizes: single values at the top level."""
    comm_dtype = any_case("fp32", "fp16", "bf16", null=True)
    return {
        "steps_per_print": key(["integer", "null"], None, "Print progress every N optimizer steps."),
        "dump_state": key("boolean", base.DUMP_STATE_DEFAULT, "Print the engine's state after initialization."),
        "disable_python_gc": key("boolean", base.DISABLE_PYTHON_GC_DEFAULT, "No automatic cyclic garbage collection."),
        "disable_allgather": key("boolean", base.DISABLE_ALLGATHER_DEFAULT, "Read, and then used by nothing."),
        "communication_data_type": {**comm_dtype, "description": "Data type of the gradient reduction."},  # fmt: skip
        "seq_parallel_communication_data_type": {
            **comm_dtype,
            "default": "fp32",
            "description": "Data type of the gradient reduction under sequence parallelism.",
        },  # fmt: skip
        "prescale_gradients": key("boolean", base.PRESCALE_GRADIENTS_DEFAULT, "Divide before the all-reduce."),
        "gradient_predivide_factor": key("number", base.GRADIENT_PREDIVIDE_FACTOR_DEFAULT, exclusiveMinimum=0),
        "gradient_allreduce_op": any_case(
            *base.GRADIENT_ALLREDUCE_OP_SUPPORTED, default=base.GRADIENT_ALLREDUCE_OP_DEFAULT
        ),  # fmt: skip
        "gradient_clipping": key(
            "number", base.GRADIENT_CLIPPING_DEFAULT, "Clip to this global norm; 0 turns clipping off.", minimum=0
        ),
        "zero_allow_untested_optimizer": key("boolean", base.ZERO_ALLOW_UNTESTED_OPTIMIZER_DEFAULT),
        "zero_force_ds_cpu_optimizer": key("boolean", base.ZERO_FORCE_DS_CPU_OPTIMIZER_DEFAULT),
        "wall_clock_breakdown": key("boolean", base.WALL_CLOCK_BREAKDOWN_DEFAULT, "Time forward, backward and step."),
        "memory_breakdown": key("boolean", base.MEMORY_BREAKDOWN_DEFAULT, "Print memory use at many points."),
        "dataloader_drop_last": key("boolean", base.DATALOADER_DROP_LAST_DEFAULT),
        "log_level": any_case(*log_levels, null=True),
        "vocabulary_size": key(["integer", "null"], None, "Only warns when it is no multiple of 8."),
        "use_data_before_expert_parallelism": key("boolean", base.USE_DATA_BEFORE_EXPERT_PARALLEL_DEFAULT),
        "sequence_parallel_size": key("integer", None, "Ulysses: ranks that share one sequence.", **POSITIVE),
        "data_parallel_size": key("integer", None, "With sequence_parallel_size: the device mesh.", **POSITIVE),
        "allgather_size": key("number", None, "Only read with the deprecated `zero_optimization: true`."),
    }


def training_sections():
    """What a step computes with: precision, optimizer, schedule."""
    return {
        "torch_autocast": section(
            {
                "enabled": key("boolean", base.TORCH_AUTOCAST_ENABLED_DEFAULT),
                "dtype": key("string", None, "Set it: without, torch.autocast's own default applies.", enum=DTYPES),
                "lower_precision_safe_modules": key("array", None, "Full names: torch.nn.Linear", items=key("string")),
            },
            description="torch.autocast with fp32 master weights (runtime/torch_autocast.py).",
        ),
        "data_types": section(
            {
                "grad_accum_dtype": {"type": ["string", "null"], "enum": [*DTYPES, None]},
                "param_dtype": {"type": ["string", "null"], "enum": [*DTYPES, None]},
                "buffer_dtype": {"type": ["string", "null"], "enum": [*DTYPES, None]},
                "keep_in_fp32_modules": {
                    "type": ["array", "string"],
                    "items": key("string"),
                    "default": "auto",
                    "x-only-string": "auto",
                },  # fmt: skip
            }
        ),
        "optimizer": section(
            {
                "type": {"anyOf": [{"enum": OPTIMIZER_TYPES}, {"type": "string"}], "description": "Optimizer name."},
                "params": {**section(optimizer_params(), unknown="reject"), **NULLABLE},
                "legacy_fusion": key("boolean", base.LEGACY_FUSION_DEFAULT),
            },
            description="Leave it out when you pass an optimizer to deepspeed.initialize().",
        ),
        "scheduler": section(
            {
                "type": {"anyOf": [{"enum": lr_schedules.VALID_LR_SCHEDULES}, {"type": "string"}]},
                "params": section(scheduler_params(), unknown="reject"),
            },
            description="Stepped by engine.step(). It overrides optimizer.params.lr.",
        ),
    }


def model_sections():
    """What some models ask for: recomputation, pipeline."""
    return {
        "activation_checkpointing": section(
            {
                "partition_activations": key("boolean", False),
                "number_checkpoints": key(["integer", "null", "boolean"]),
                "contiguous_memory_optimization": key("boolean", False),
                "synchronize_checkpoint_boundary": key("boolean", False),
                "profile": key("boolean", False),
                "cpu_checkpointing": key("boolean", False),
            },
            description="Read by deepspeed.checkpointing.configure() alone; does nothing without that call.",
        ),
        "pipeline": section(
            {
                "stages": key(["string", "integer"], "auto", "Unused: PipelineModule(num_stages=...) decides."),
                "partition": key("string", "best", "Unused: PipelineModule(partition_method=...) decides."),
                "seed_layers": key("boolean", False, "Unused: PipelineModule(seed_layers=...) decides."),
                "activation_checkpoint_interval": key("integer", 0, minimum=0),
                "pipe_partitioned": key("boolean", True),
                "grad_partitioned": key("boolean", True),
                "use_reentrant": key("boolean", True),
            },
            description="Only read when the model is a PipelineModule (runtime/pipe/engine.py).",
        ),
    }


def tool_sections():
    """Profiling and autotuning."""
    return {
        "flops_profiler": section(
            {
                "enabled": key("boolean", profiling.FLOPS_PROFILER_ENABLED_DEFAULT),
                "recompute_fwd_factor": key("number", profiling.FLOPS_PROFILER_RECOMPUTE_FWD_FACTOR_DEFAULT),
                "profile_step": key("integer", profiling.FLOPS_PROFILER_PROFILE_STEP_DEFAULT),
                "module_depth": key("integer", profiling.FLOPS_PROFILER_MODULE_DEPTH_DEFAULT),
                "top_modules": key("integer", profiling.FLOPS_PROFILER_TOP_MODULES_DEFAULT),
                "detailed": key("boolean", profiling.FLOPS_PROFILER_DETAILED_DEFAULT),
                "output_file": key(["string", "null"]),
            }
        ),
        "autotuning": section(
            {
                "enabled": key("boolean", tuning.AUTOTUNING_ENABLED_DEFAULT),
                "fast": key("boolean", tuning.AUTOTUNING_FAST_DEFAULT),
                "results_dir": key("string", tuning.AUTOTUNING_RESULTS_DIR_DEFAULT, minLength=1),
                "exps_dir": key("string", tuning.AUTOTUNING_EXPS_DIR_DEFAULT, minLength=1),
                "overwrite": key("boolean", tuning.AUTOTUNING_OVERWRITE_DEFAULT),
                "metric": any_case("latency", "throughput", "flops", default=tuning.AUTOTUNING_METRIC_DEFAULT),
                "metric_path": key(["string", "null"]),
                "start_profile_step": key("integer", tuning.AUTOTUNING_START_PROFILE_STEP_DEFAULT),
                "end_profile_step": key("integer", tuning.AUTOTUNING_END_PROFILE_STEP_DEFAULT),
                "tuner_type": key(
                    "string", tuning.AUTOTUNING_TUNER_TYPE_DEFAULT, enum=["gridsearch", "random", "model_based"]
                ),  # fmt: skip
                "tuner_early_stopping": key("integer", tuning.AUTOTUNING_TUNER_EARLY_STOPPING_DEFAULT),
                "tuner_num_trials": key("integer", tuning.AUTOTUNING_TUNER_NUM_TRIALS_DEFAULT),
                "arg_mappings": key(["object", "null"]),
                "model_info": key(["object", "null"]),
                "model_info_path": key(["string", "null"]),
                "mp_size": key("integer", tuning.AUTOTUNING_MP_SIZE_DEFAULT),
                "max_train_batch_size": key(["integer", "null"]),
                "min_train_batch_size": key("integer", tuning.AUTOTUNING_MIN_TRAIN_BATCH_SIZE_DEFAULT),
                "max_train_micro_batch_size_per_gpu": key("integer", 1024),
                "min_train_micro_batch_size_per_gpu": key("integer", 1),
                "num_tuning_micro_batch_sizes": key("integer", 3),
            }
        ),
        "timers": section({"throughput": model_schema(DeepSpeedThroughputTimerConfig)}),
    }


def storage_sections():
    """Checkpoints and asynchronous I/O."""
    return {
        "checkpoint": section(
            {
                "tag_validation": any_case("warn", "ignore", "fail", default=ckpt.CHECKPOINT_TAG_VALIDATION_DEFAULT),
                "load_universal": key("boolean", base.LOAD_UNIVERSAL_CHECKPOINT_DEFAULT),
                "use_node_local_storage": key("boolean", base.USE_NODE_LOCAL_STORAGE_CHECKPOINT_DEFAULT),
                "checkpoint_serialization": key("boolean", ckpt.CHECKPOINT_SERIALIZATION_DEFAULT),
                "parallel_write": section({"pipeline_stage": key("boolean", False)}),
                "writer": section(
                    {
                        "type": any_case("mock", "python", "fast", null=True),
                        "io_buffer_size": key("integer", ckpt.CHECKPOINT_IO_BUFFER_SIZE_DEFAULT),
                        "io_buffer_double": key("boolean", ckpt.CHECKPOINT_IO_BUFFER_DOUBLE_DEFAULT),
                        "io_multiplier": key("integer", ckpt.CHECKPOINT_IO_MULTIPLIER_DEFAULT),
                        "show_statistics": key("boolean", ckpt.CHECKPOINT_IO_STATISTICS_DEFAULT),
                        "data_parallel": any_case("replica", "socket", "machine", null=True),
                        "decoupled": key("boolean", ckpt.CHECKPOINT_WRITER_DECOUPLED_DEFAULT),
                    },
                    **NULLABLE,
                ),
            }
        ),
        "datastates_ckpt": key("object", description="DataStates-LLM checkpoints; needs that package."),
        "aio": section(
            {
                "block_size": key("integer", aio.AIO_BLOCK_SIZE_DEFAULT, minimum=1),
                "queue_depth": key("integer", aio.AIO_QUEUE_DEPTH_DEFAULT, minimum=1),
                "intra_op_parallelism": key("integer", aio.AIO_INTRA_OP_PARALLELISM_DEFAULT, minimum=1),
                "single_submit": key("boolean", aio.AIO_SINGLE_SUBMIT_DEFAULT),
                "overlap_events": key("boolean", aio.AIO_OVERLAP_EVENTS_DEFAULT),
                "use_gds": key("boolean", aio.AIO_USE_GDS_DEFAULT, "GPUDirect Storage: CUDA only."),
            },
            description="Asynchronous I/O for NVMe offload.",
            **NULLABLE,
        ),
    }


def data_sections():
    """Curriculum learning, dynamic batching, random-LTD."""
    return {
        "data_efficiency": section(
            {
                "enabled": key("boolean", data.DATA_EFFICIENCY_ENABLED_DEFAULT),
                "seed": key("integer", data.DATA_EFFICIENCY_SEED_DEFAULT),
                "data_sampling": data_sampling(),
                "data_routing": data_routing(),
            }
        ),
    }


def data_sampling():
    return section(
        {
            "enabled": key("boolean", data.DATA_SAMPLING_ENABLED_DEFAULT),
            "num_epochs": key("integer", data.DATA_SAMPLING_NUM_EPOCHS_DEFAULT),
            "num_workers": key("integer", data.DATA_SAMPLING_NUM_WORKERS_DEFAULT),
            "pin_memory": key("boolean", data.DATA_SAMPLING_PIN_MEMORY_DEFAULT),
            "curriculum_learning": section(
                {
                    "enabled": key("boolean", data.CURRICULUM_LEARNING_ENABLED_DEFAULT),
                    "data_cluster_path": key("string"),
                    "curriculum_metrics": key("object"),
                },
                additionalProperties=True,
            ),
            "dynamic_batching": section(
                {
                    "enabled": key("boolean", data.DYNAMIC_BATCHING_ENABLED_DEFAULT),
                    "metrics_path": key("string"),
                    "lr_scaling_method": key("string", data.DYNAMIC_BATCHING_LR_SCALING_METHOD_DEFAULT),
                    "min_batch_size": key("integer", data.DYNAMIC_BATCHING_MIN_BATCH_SIZE_DEFAULT),
                    "max_batch_size": key("integer"),
                    "sequence_picking_order": key("string", "dataloader"),
                    "max_tokens": key("integer"),
                    "verbose": key("boolean", False),
                }
            ),
        }
    )


def data_routing():
    schedule = section(
        {k: {} for k in ("min_value", "max_value", "schedule_type", "schedule_config", "current_value")},
        description="Sequence length schedule of random-LTD.",
        additionalProperties=True,
    )
    return section(
        {
            "enabled": key("boolean", data.DATA_ROUTING_ENABLED_DEFAULT),
            "random_ltd": section(
                {
                    "enabled": key("boolean", data.RANDOM_LTD_ENABLED_DEFAULT),
                    "total_layer_num": key("integer"),
                    "random_ltd_layer_num": key("integer"),
                    "random_ltd_layer_id": key("array", items=key("integer")),
                    "model_mask_name": key(["string", "null"]),
                    "model_type": key("string"),
                    "micro_batch_size": key("integer"),
                    "global_batch_size": key("integer"),
                    "hidden_state_order": key("string"),
                    "random_ltd_schedule": schedule,
                    "layer_token_lr_schedule": key("object"),
                }
            ),
        }
    )


# --- optimizers and schedulers --------------------------------------------------------------------------------------


def subclasses(module, parent):
    found = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, parent) and c is not parent}
    return {n: c for n, c in sorted(found.items()) if not n.startswith("_")}


TORCH_OPTIMIZERS = subclasses(torch.optim, torch.optim.Optimizer)
DS_OPTIMIZERS = {
    "FusedAdam": FusedAdam, "DeepSpeedCPUAdam": DeepSpeedCPUAdam, "DeepSpeedCPUAdagrad": DeepSpeedCPUAdagrad,
    "FusedLamb": FusedLamb, "FusedLion": FusedLion, "DeepSpeedCPULion": DeepSpeedCPULion}  # fmt: skip
MUON_PARAMS = sorted(
    {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS}
    | {"muon_lr", "adam_lr", "torch_adam", "adam_w_mode", "per_head_muon", "fp32_optimizer_states"}
)
OPTIMIZER_TYPES = ["Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", "MuAdam", "MuAdamW", "MuSGD"] + [
    n for n in TORCH_OPTIMIZERS if n.lower() not in ds.DEEPSPEED_OPTIMIZERS]  # fmt: skip
SCHEDULERS = {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}
TORCH_SCHEDULERS = subclasses(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)


def signature(cls, skip):
    params = [p for p in list(inspect.signature(cls.__init__).parameters.values())[1:] if p.name not in skip]
    named = [p for p in params if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {"params": [p.name for p in named], "required": [p.name for p in named if p.default is p.empty]}


def guess_type(name, default):
    if isinstance(default, bool):
        return key("boolean", default)
    if isinstance(default, (int, float)):
        return key("number", default)
    return {}


def optimizer_params():
    known = {
        "lr": key("number", None, "Learning rate.", minimum=0),
        "betas": key(
            "array", [0.9, 0.999], minItems=2, maxItems=2, items=key("number", minimum=0, exclusiveMaximum=1)
        ),  # fmt: skip
        "eps": {"type": ["number", "array"], "minimum": 0, "default": 1e-8},
        "weight_decay": key("number", None, "Decoupled (AdamW) unless adam_w_mode is false.", minimum=0),
        "momentum": key("number", None, minimum=0),
        "muon_lr": key("number", minimum=0),
        "adam_lr": key("number", minimum=0),
        "torch_adam": key("boolean", False, "torch.optim.Adam(W) instead of FusedAdam: nothing to compile."),
        "adam_w_mode": key("boolean", ds.ADAM_W_MODE_DEFAULT, "false: L2 regularisation; only with type Adam."),
        "fp32_optimizer_states": key(["boolean", "null"], None, "DeepSpeedCPUAdam: moments in fp32."),
        "per_head_muon": key("boolean", False),
        "ns_method": key("string", "gram", enum=["gram", "standard"]),
    }
    for cls in [*DS_OPTIMIZERS.values(), *TORCH_OPTIMIZERS.values()]:
        for p in list(inspect.signature(cls.__init__).parameters.values())[2:]:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                guessed = guess_type(p.name, p.default)
                if guessed.get("type") == "boolean" and p.name in ("foreach", "fused"):
                    guessed = {}
                known.setdefault(p.name, {k: v for k, v in guessed.items() if k != "default"})
    for name in ("max_grad_norm", "adamw_mode"):  # in a constructor, but the engine refuses or supplies them
        known.pop(name, None)
    return dict(sorted(known.items()))


def scheduler_params():
    number_or_list = ["number", "array"]
    known = {
        "warmup_min_lr": key(number_or_list, 0.0, minimum=0),
        "warmup_max_lr": key([*number_or_list, "null"], None, "WarmupLR: optimizer's lr; WarmupDecayLR: 0.001!"),
        "warmup_num_steps": key("integer", 1000, minimum=1),
        "warmup_type": key("string", "log", enum=["log", "linear"]),
        "total_num_steps": key("number", None, "Required by WarmupDecayLR and WarmupCosineLR.", exclusiveMinimum=0),
        "warmup_min_ratio": key("number", 0.0, minimum=0),
        "cos_min_ratio": key("number", 0.0001, minimum=0),
        "last_batch_iteration": key("integer", -1),
        "lr_range_test_min_lr": key(number_or_list, 0.001, minimum=0),
        "lr_range_test_step_size": key("integer", 2000, minimum=1),
        "lr_range_test_step_rate": key("number", 1.0),
        "lr_range_test_staircase": key("boolean", False),
        "cycle_min_lr": key(number_or_list, minimum=0),
        "cycle_max_lr": key(number_or_list, minimum=0),
        "cycle_first_step_size": key("number", 2000, exclusiveMinimum=0),
        "cycle_second_step_size": key(["number", "null"], minimum=0),
        "cycle_second_stair_count": key(["integer", "null"]),
        "cycle_momentum": key("boolean", True),
    }
    for cls in [*SCHEDULERS.values(), *TORCH_SCHEDULERS.values()]:
        for p in list(inspect.signature(cls.__init__).parameters.values())[2:]:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                ours = cls in SCHEDULERS.values()
                known.setdefault(p.name, guess_type(p.name, p.default) if ours else {})
    return dict(sorted(known.items()))


# --- the whole ------------------------------------------------------------------------------------------------------


def add_what_was_tried(props):
    """What the annotations do not say; each line was tried on DeepSpeed."""
    zero, fp16, tp = (props[n]["properties"] for n in ("zero_optimization", "fp16", "tensor_parallel"))
    fp16["loss_scale"]["minimum"] = 0
    zero["leaf_module"].update(NULLABLE)
    for name in ("classes", "names", "name_suffixes"):
        zero["leaf_module"]["properties"][name]["type"] = ["array", "string"]
    zen = zero["zenflow"]["properties"]
    zen["select_strategy"]["enum"] = ["auto", "step", "epoch"]
    for name in ("select_interval", "update_interval"):
        zen[name]["x-only-string"] = "auto"
        zen[name]["minimum"] = 1
    tp["autotp_size"].update({"minimum": 0, "x-no-coercion": True})
    tp["preset_model"]["enum"] = ["llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3", None]
    kinds = any_case(*[p.value for p in PartitionType])
    layer = {"patterns": key("array", items=key("string")), "partition_type": kinds,
             "shape": {}, "partition_dim": key(["integer", "null"]), "model_types": key(["array", "null"]),
             "gather_output": key("boolean", False), "grad_allreduce": key("boolean", False)}  # fmt: skip
    tp["partition_config"] = {
        **section({"use_default_specs": key("boolean", True), "layer_specs": key("array", items=section(layer))}),
        **NULLABLE,
    }
    props["comet"]["properties"]["mode"]["enum"] = ["get", "create", "get_or_create", None]


def build():
    props = plain_sections()
    models = {
        "zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig, "wandb": WandbConfig, "csv_monitor": CSVConfig, "comet": CometConfig,
        "comms_logger": CommsLoggerConfig, "compile": CompileConfig, "hybrid_engine": ds.HybridEngineConfig,
        "tensor_parallel": TPTrainingConfig, "weight_quantization": WeightQuantConfig}  # fmt: skip
    for name, model in models.items():
        props[name] = model_schema(model)
    props["bf16"].update(NULLABLE)  # get_bfloat16_config falls back to "bfloat16" on null
    props["bfloat16"] = {**props["bf16"], "description": "Old name of bf16; not read when bf16 is there."}

    add_what_was_tried(props)
    for path in HF_FILLS:
        *parents, name = path.split(".")
        node = props
        for part in parents:
            node = node[part]["properties"]
        inner = node[name]
        outer = {k: inner.pop(k) for k in ("default", "description") if k in inner}
        node[name] = {"anyOf": [inner, {"const": "auto"}], **outer, "x-hf-auto": True}

    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"DeepSpeed {deepspeed.__version__} config",
        "description": "Generated by config/make_schema.py from the installed DeepSpeed. Do not edit.",
        "type": "object",
        "properties": dict(sorted(props.items())),
        "patternProperties": {"^(_|//|#)": {}},  # people write comments as keys; at top level DeepSpeed ignores them
        "additionalProperties": False,
        "x-unknown": "ignore",
        "x-deepspeed": {
            "version": deepspeed.__version__,
            "removed": {"": ds._REMOVED_TOP_LEVEL_CONFIG_KEYS, "zero_optimization": ds._REMOVED_ZERO_CONFIG_KEYS},
            "optimizers": {n: signature(c, {"params", "model_params"}) for n, c in DS_OPTIMIZERS.items()}
            | {f"torch.{n}": signature(c, {"params"}) for n, c in TORCH_OPTIMIZERS.items()}
            | {"Muon": {"params": MUON_PARAMS, "required": []}},
            "schedulers": {n: signature(c, {"optimizer"}) for n, c in SCHEDULERS.items()}
            | {f"torch.{n}": signature(c, {"optimizer"}) for n, c in TORCH_SCHEDULERS.items()},
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    text = json.dumps(build(), indent=1, ensure_ascii=False) + "\n"
    if not parser.parse_args().check:
        OUT.write_text(text, encoding="utf-8")
        print(f"wrote {OUT} ({len(text) / 1024:.0f} KiB)")
    elif not OUT.exists() or OUT.read_text(encoding="utf-8") != text:
        sys.exit(f"{OUT.name} differs from DeepSpeed {deepspeed.__version__}: run python config/make_schema.py")


if __name__ == "__main__":
    main()
