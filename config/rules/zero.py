"""zero_optimization, without offload."""

import re

from config.rules.finding import delete, is_number, put, rules_of, truthy
from config.rules.schema_file import schema

RULES, rule = rules_of("zero")
CONFIG, ENGINE = "deepspeed/runtime/zero/config.py", "deepspeed/runtime/engine.py"
ZENFLOW = "deepspeed/runtime/zenflow/engine.py"
AT = "zero_optimization"
ZERO3_KEYS = re.compile(r"stage3_|zero_hpz|zero_quantized|sub_group_size$|leaf_module$|memory_efficient_linear$")
GATHER = "stage3_gather_16bit_weights_on_model_save"


@rule(CONFIG, "stage: ZeroStageEnum = 0", "ZeRO without stage")
def no_stage(c):
    """The default stage is 0."""
    if c.zero and "stage" not in c.zero and f"{AT}.stage" not in c.unfilled:
        yield c.warning(f"{AT}.stage", "No stage, so ZeRO stays off (stage 0).", 'Add "stage": 1, 2 or 3.')


@rule(ENGINE, "zero_stage == ZeroStageEnum.weights", "stage3 keys at stage 2")
def stage3_key_below_3(c):
    """Many keys are read at stage 3 alone."""
    known = schema()["properties"][AT]["properties"]
    zero = {} if c.stage_unknown else c.zero
    idle = [k for k in zero if ZERO3_KEYS.match(k) and k in known and zero[k] not in ("auto", known[k].get("default"))]
    if c.stage < 3 and idle:
        others = f" (and {', '.join(idle[1:])})" if idle[1:] else ""
        yield c.warning(f"{AT}.{idle[0]}", f"Does nothing at stage {c.stage}: read at stage 3 only{others}.")


@rule(CONFIG, 'alias="stage3_prefetch_bucket_size"', "both names of a stage-3 key")
def both_names(c):
    """Keys with and without stage3_ are one field under two names."""
    for key in c.zero:
        other = key.removeprefix("stage3_")
        if key.startswith("stage3_") and other in c.zero:
            message = f"The same as {key}: DeepSpeed raises when both are there."
            yield c.error(f"{AT}.{other}", message, "Keep one.", delete(f"{AT}.{other}"))


@rule(ENGINE, "zero_gather_16bit_weights_on_model_save", "no gather flag")
def no_gather_on_save(c):
    """At stage 3 nobody has the whole weights to save."""
    keys = [k for k in c.zero if k.endswith(("bit_weights_on_model_save", "fp16_weights_on_model_save"))]
    if c.stage_unknown or c.stage != 3 or any(truthy(c.zero[k]) or c.zero[k] == "auto" for k in keys):
        return
    message = "save_16bit_model() writes nothing and returns False; the HF Trainer saves a ZeRO checkpoint instead."
    fix = f'Add "{GATHER}": true, or convert checkpoints with zero_to_fp32.py.'
    yield c.warning(f"{AT}.{GATHER}", message, fix)


@rule(ENGINE, "is not supported in deepspeed >= 0.5.9", "legacy_stage1")
def legacy_stage1(c):
    """The old implementation of stage 1 is gone."""
    if truthy(c.zero.get("legacy_stage1")):
        path, level = f"{AT}.legacy_stage1", "error" if c.stage or c.stage_unknown else "warning"
        yield c.find(level, path, "No longer supported: with ZeRO DeepSpeed raises.", "Delete it.", delete(path))


@rule(CONFIG, "elastic_checkpoint", "elastic checkpoint at stage 3")
def elastic_checkpoint(c):
    """Stage 3 never had it."""
    if c.stage == 3 and truthy(c.zero.get("elastic_checkpoint")):
        yield c.warning(f"{AT}.elastic_checkpoint", "Ignored at stage 3.", "Use Universal Checkpointing.")


@rule("deepspeed/runtime/zero/stage_1_and_2.py", "nccl_start_alignment_factor", "odd bucket")
def odd_bucket(c):
    """Stages 1 and 2 cut the bucket in halves for NCCL."""
    bucket = c.zero.get("allgather_bucket_size", 2)
    if c.stage in (1, 2) and not c.stage_unknown and isinstance(bucket, int) and bucket % 2:
        path = f"{AT}.allgather_bucket_size"
        yield c.error(path, f"{bucket} is odd: DeepSpeed raises AssertionError.", "Even.", put(path, bucket + 1))


@rule("deepspeed/runtime/zero/stage_1_and_2.py", "compute_grad_norm", "compute_grad_norm with clipping")
def no_gradient_norm(c):
    """Leaving out the norm leaves out what needs it."""
    path = f"{AT}.compute_grad_norm"
    if str(c.zero.get("compute_grad_norm")).lower() not in ("false", "0") or c.stage_unknown:
        return
    clip = c.get("gradient_clipping", 1.0)
    if c.stage not in (1, 2):
        yield c.error(path, "false works with stage 1 and 2 only: DeepSpeed raises.")
    elif is_number(clip) and clip > 0:
        source = "" if "gradient_clipping" in c.config else " by default"
        message = f"false needs gradient_clipping 0, and it is {clip}{source}: DeepSpeed raises ValueError."
        yield c.error(path, message, 'Add "gradient_clipping": 0.0.')
    elif c.bf16_optimizer():
        yield c.error(path, "false does not go with bf16 and fp32 accumulation: ValueError.")
    elif c.offload("optimizer") != "none" or c.zero.get("zenflow"):
        yield c.error(path, "false does not go with offload_optimizer or zenflow: ValueError.")


@rule("deepspeed/runtime/zero/stage_1_and_2.py", "pre-scale gradients is not yet supported", "prescale at stage 2")
def prescaled_gradients(c):
    """reduce_scatter averages as it goes."""
    scatters = c.zero.get("reduce_scatter", True) and c.get("gradient_allreduce_op", "mean") != "sum"
    if c.stage >= 2 and scatters and not c.stage_unknown:
        for key, neutral in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
            if c.get(key, neutral) not in (neutral, "auto"):
                message = f"ZeRO-{c.stage} with reduce_scatter cannot do that: AssertionError."
                yield c.error(key, message, "Delete it.", delete(key))


@rule(CONFIG, "reduce_bucket_size: int", "bucket in megabytes")
def bucket_of_a_few(c):
    """Buckets are counted in elements."""
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        if is_number(c.zero.get(key)) and 0 < c.zero[key] < 1000:
            message = f"{c.zero[key]} elements, not megabytes: a message for every few numbers."
            yield c.warning(f"{AT}.{key}", message, "5e8")


@rule(
    "deepspeed/runtime/zero/stage3.py",
    "when enable all_to_all_reduce, reduce_scatter should also be enabled",
    "quantized gradients without reduce_scatter",
)
def quantized_gradients(c):
    """They are quantized on their way to the rank that keeps them."""
    if c.stage == 3 and truthy(c.zero.get("zero_quantized_gradients")) and c.zero.get("reduce_scatter") is False:
        message = "zero_quantized_gradients at stage 3 asks for reduce_scatter: AssertionError."
        yield c.error(f"{AT}.reduce_scatter", message, "Delete it.", delete(f"{AT}.reduce_scatter"))


@rule(ZENFLOW, "def configure_zenflow", "ZenFlow without offload")
def zenflow(c):
    """ZenFlow is an optimizer step on the host that runs beside the GPU's."""
    settings = c.zero.get("zenflow")
    at = f"{AT}.zenflow"
    if not isinstance(settings, dict) or c.stage_unknown:
        return
    if c.stage == 0:
        message = "At stage 0 there is no ZenFlow optimizer, yet its update_interval replaces the accumulation steps."
        yield c.error(at, f"{message} The first step crashes.", "ZeRO stage 1 to 3 with optimizer offload.")
    elif c.offload("optimizer") == "none":
        message = "ZenFlow needs optimizer offload: DeepSpeed raises ValueError."
        yield c.error(at, message, 'Add "offload_optimizer": {"device": "cpu"}.')
    elif c.other_than_cpu_adam():
        message = "ZenFlow builds its own AdamW from these optimizer params: TypeError."
        yield c.error(at, message, c.other_than_cpu_adam())
    elif c.get("optimizer.params.bias_correction") is not None:
        yield c.error(at, "ZenFlow's AdamW knows no bias_correction: TypeError.", "Delete it from optimizer.params.")


@rule(ZENFLOW, "select_interval", "ZenFlow without interval")
def zenflow_interval(c):
    """The interval is a number where the strategy counts, and "auto" where it does not."""
    settings = c.zero.get("zenflow")
    if isinstance(settings, dict) and not c.stage_unknown:
        automatic = settings.get("select_strategy", "auto") == "auto"
        if automatic == isinstance(settings.get("select_interval", "auto"), int):
            message = 'A number goes with select_strategy "step" or "epoch", and "auto" with "auto": DeepSpeed raises.'
            yield c.error(f"{AT}.zenflow.select_interval", message)


@rule(
    ZENFLOW,
    "Select interval must be greater or equal to update",
    "ZenFlow selects too often",
)
def zenflow_order(c):
    """What is selected is updated at least once before the next selection."""
    settings = c.zero.get("zenflow")
    settings = settings if isinstance(settings, dict) else {}
    select, update = settings.get("select_interval"), settings.get("update_interval")
    counted = settings.get("select_strategy") == "step" and c.stage and not c.stage_unknown
    if counted and is_number(select) and is_number(update) and select < update:
        message = f"{select} is below update_interval {update}: DeepSpeed raises ValueError."
        yield c.error(f"{AT}.zenflow.select_interval", message, f"{update} or more.")
