"""fp16, bf16, torch_autocast, loss scale, low-precision states, data types."""

from config.rules.finding import delete, is_number, rules_of, truthy
from config.rules.optimizer import Chosen

RULES, rule = rules_of("precision")
CONFIG, ENGINE = "deepspeed/runtime/config.py", "deepspeed/runtime/engine.py"
UNCOUNTED = ("sgd", "asgd", "rprop", "rmsprop", "adagrad", "adadelta", "lion")  # a step on zeros changes nothing
FLOAT32 = ("fp32", "float32", "torch.float32", "float")
FLOAT16 = ("fp16", "float16", "torch.float16", "half")


def bf16_name(c):
    return "bf16" if c.get("bf16") is not None else "bfloat16"


@rule(CONFIG, "bfloat16 and fp16 modes cannot be simultaneously enabled", "fp16 and bf16")
def fp16_and_bf16(c):
    """One precision at a time."""
    if c.fp16 and c.bf16:
        path = f"{bf16_name(c)}.enabled"
        yield c.error(path, "fp16 and bf16 are both on: DeepSpeed raises AssertionError.", "Keep one.")


@rule("deepspeed/runtime/precision_config.py", "BFLOAT16_OLD", "bfloat16 beside bf16")
def old_name_of_bf16(c):
    """bfloat16 is read only where bf16 is not there, and by DeepSpeed alone."""
    if "bfloat16" not in c.config:
        return
    if c.get("bf16") is not None:
        yield c.warning("bfloat16", "Not read, because bf16 is there.", "Delete it.", delete("bfloat16"))
    else:
        level = "warning" if c.hf else "note"
        yield c.find(level, "bfloat16", "The old name of bf16; transformers does not know it.", "Call it bf16.")


@rule("deepspeed/runtime/fp16/fused_optimizer.py", "class FP16_Optimizer", "fp16 without ZeRO")
def fp16_without_zero(c):
    """FP16_Optimizer divides the gradients by a loss scale that backward() never multiplied the loss with."""
    harmless = c.get("fp16.loss_scale") == 1 and Chosen(c).lower in UNCOUNTED
    if c.fp16 and not c.bf16 and c.stage == 0 and not c.stage_unknown and not harmless:
        message = (
            "fp16 without ZeRO: backward() scales the loss for ZeRO optimizers only, but the step still divides "
            "the gradients by the loss scale (65536): they arrive that much too small."
        )
        yield c.error("fp16.enabled", message, "Use ZeRO stage 1, or torch_autocast.")


@rule("deepspeed/runtime/fp16/unfused_optimizer.py", "class FP16_UnfusedOptimizer", "bf16 without ZeRO")
def bf16_without_zero(c):
    """The optimizer state is made by a real step on zero gradients, which Adam counts."""
    o = Chosen(c)
    counts = o.lower not in UNCOUNTED
    decays = o.lower != "lion" and o.params.get("weight_decay")  # which is a step as well, and a short one
    if c.bf16 and not c.fp16 and c.stage == 0 and not c.stage_unknown and (counts or decays):
        message = (
            "bf16 without ZeRO: creating the optimizer state runs a step on zero gradients, so Adam's step count "
            "starts at 1, so about ten early updates are too short (0.744, 0.858, 0.910 … of ZeRO-1's with the "
            "default betas)."
        )
        if not counts:
            message = "bf16 without ZeRO: creating the optimizer state decays the weights once before the first step."
        if c.pipeline:
            yield c.note(f"{bf16_name(c)}.enabled", f"Right for a PipelineModule. For any other model, {message}")
            return
        level = "warning" if c.on("compile.deepcompile") or not counts else "error"
        yield c.find(level, f"{bf16_name(c)}.enabled", message, "Use ZeRO stage 1, or torch_autocast.")


@rule(ENGINE, "def _do_optimizer_sanity_check", "hf: stage 0 and auto precision")
def auto_precision_without_zero(c):
    """The same two mistakes, once --fp16 or --bf16 is given on the command line."""
    found = [name for name in ("fp16", "bf16") if c.get(f"{name}.enabled") == "auto"]
    if c.hf and found and c.stage == 0 and not c.stage_unknown:
        message = (
            f"{' and '.join(found)} without ZeRO train wrongly: in fp16 the gradients arrive 65536 times too small, "
            "in bf16 about ten early updates are too short. Right only while the precision stays off."
        )
        yield c.warning(f"{found[0]}.enabled", message, "Use ZeRO stage 1.")


@rule("deepspeed/runtime/zero/partition_parameters.py", "zero_quantized_weights", "autocast with quantized weights")
def autocast_and_quantized_weights(c):
    """ZeRO++'s quantized weights assume that the weights have the type of the model."""
    path = "zero_optimization.zero_quantized_weights"
    if c.on("torch_autocast.enabled") and c.on(path):
        yield c.error(path, "Not together with torch_autocast: DeepSpeed raises AssertionError.", "Keep one.")


@rule("deepspeed/runtime/torch_autocast.py", "def init_autocast_params", "bf16 and torch_autocast")
def autocast_and_cast_weights(c):
    """fp16 and bf16 cast the weights themselves."""
    if c.on("torch_autocast.enabled") and (c.fp16 or c.bf16):
        message = "On together with fp16/bf16, which cast the weights: nothing is left for autocast to do."
        yield c.error("torch_autocast.enabled", message, "Keep one.")


@rule("deepspeed/runtime/config.py", "TORCH_AUTOCAST_DTYPE", "autocast without dtype")
def autocast_without_dtype(c):
    """torch.autocast(dtype=None) takes PyTorch's own default."""
    if c.on("torch_autocast.enabled") and "dtype" not in c.section("torch_autocast"):
        message = "Without dtype PyTorch's own default applies: float16 on CUDA, and then without loss scaling."
        yield c.warning("torch_autocast.dtype", message, 'Add "dtype": "bfloat16".')


@rule("deepspeed/runtime/base_optimizer.py", "torch_autocast_gradscaler", "float16 autocast with ZeRO")
def float16_autocast_with_zero(c):
    """Clipping sees scaled gradients."""
    if c.on("torch_autocast.enabled") and c.stage > 0 and c.get("torch_autocast.dtype") in FLOAT16:
        message = (
            "float16 autocast with ZeRO: gradients are clipped before the loss scale is taken off them, and after an "
            "overflow the scale never falls."
        )
        yield c.error("torch_autocast.dtype", message, "ZeRO stage 0, or bfloat16.")


@rule(
    "deepspeed/runtime/torch_autocast.py",
    "Failed to import lower precision safe module",
    "autocast modules without package",
)
def autocast_modules(c):
    """Each name is imported: package, dot, class."""
    modules = c.get("torch_autocast.lower_precision_safe_modules")
    for i, module in enumerate(modules if isinstance(modules, list) else []):
        if isinstance(module, str) and "." not in module:
            path = f"torch_autocast.lower_precision_safe_modules.{i}"
            yield c.error(path, f"{module!r} cannot be imported: DeepSpeed raises ValueError.", f'"torch.nn.{module}"')


@rule("deepspeed/runtime/torch_autocast.py", "def autocast_if_enabled", "autocast to float32")
def autocast_to_float32(c):
    """The type that there is already."""
    if c.on("torch_autocast.enabled") and c.get("torch_autocast.dtype") in FLOAT32:
        yield c.warning("torch_autocast.dtype", "Autocast to float32 does nothing.", '"bfloat16"')


@rule(ENGINE, "def fp16_auto_cast", "auto_cast without fp16")
def auto_cast_alone(c):
    """auto_cast is read without a look at fp16.enabled."""
    casts = c.on("torch_autocast.enabled") and c.get("torch_autocast.dtype") not in FLOAT32  # the model's side as well
    alone = not c.fp16 and c.get("fp16.enabled") != "auto" and not casts
    if truthy(c.get("fp16.auto_cast")) and alone:
        message = "Works although fp16 is off: inputs become float16, the model stays as it is, and forward() raises."
        yield c.error("fp16.auto_cast", message, "Delete it.", delete("fp16.auto_cast"))


@rule("deepspeed/runtime/fp16/loss_scaler.py", "class DynamicLossScaler", "initial_scale_power 65536")
def scale_is_a_power(c):
    """initial_scale_power is an exponent of two, not the scale."""
    power = c.get("fp16.initial_scale_power", 16)
    if c.fp16 and is_number(power) and (power > 32 or power < 0):
        message = f"An exponent: the first loss scale is 2**{power}" + (", which overflows." if power >= 128 else ".")
        yield c.find("error" if power >= 128 else "warning", "fp16.initial_scale_power", message, "16 is usual.")


@rule("deepspeed/runtime/fp16/loss_scaler.py", "class LossScaler(", "odd static loss scale")
def static_scale(c):
    """Multiplying by a power of two only shifts the exponent."""
    scale = c.get("fp16.loss_scale", 0)
    if not (is_number(scale) and scale > 0):
        return
    if scale != 1 and (scale < 1 or int(scale) & (int(scale) - 1) or scale != int(scale)):
        yield c.note("fp16.loss_scale", f"A static scale of {scale} is no power of two and rounds the gradients.")


@rule("deepspeed/runtime/precision_config.py", "fp16.loss_scale_window must be > 0", "loss_scale_window 0")
def dynamic_scale(c):
    """The window and the floor of a dynamic scale are positive."""
    if c.fp16 and c.get("fp16.loss_scale", 0) == 0:
        for name in ("loss_scale_window", "min_loss_scale"):
            value = c.get(f"fp16.{name}", 1)
            if is_number(value) and value <= 0:
                yield c.error(f"fp16.{name}", f"{value} must be > 0 with dynamic loss scaling: DeepSpeed raises.")


@rule(
    "deepspeed/runtime/zero/stage_1_and_2.py", "Master weights feature requires", "fp16 master weights without offload"
)
def master_weights(c):
    """Low-precision master weights live in the optimizers of ZeRO, and on the host unless the states are bf16."""
    states = truthy(c.get("bf16.bf16_optimizer_states"))
    for path in ("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"):
        if not truthy(c.get(path)) or c.stage_unknown:
            continue
        if c.stage == 0:
            yield c.error(path, "Needs ZeRO stage 1, 2 or 3: DeepSpeed raises AssertionError.")
        elif path[0] == "b" and c.bf16_optimizer():
            yield c.warning(path, "Ignored: stage 1 with grad_accum_dtype fp32 runs in BF16_Optimizer.", "Use stage 2.")
        elif c.offload("optimizer") == "none" and not (path[0] == "b" and states):
            fix = 'Add "offload_optimizer": {"device": "cpu"}' + " or bf16_optimizer_states" * (path[0] == "b") + "."
            yield c.error(path, "Needs optimizer offload with DeepSpeedCPUAdam: DeepSpeed raises AssertionError.", fix)
        elif c.offload("optimizer") != "none" and c.other_than_cpu_adam():
            yield c.error(path, "Needs DeepSpeedCPUAdam: DeepSpeed raises AssertionError.", c.other_than_cpu_adam())


@rule(CONFIG, "requires bf16_master_weights_and_grads", "bf16 states alone")
def low_precision_states(c):
    """bf16 moments come with bf16 master weights only."""
    path = "bf16.bf16_optimizer_states"
    if truthy(c.get(path)) and not truthy(c.get("bf16.bf16_master_weights_and_grads")):
        yield c.error(path, "Requires bf16_master_weights_and_grads: DeepSpeed raises.")


def asked_and_has(c, name):
    """(the type as it is written, the same as fp16/bf16/fp32, the model's type)."""
    model = "fp16" if c.fp16 else "bf16" if c.bf16 else "fp32"
    raw = str(c.get(f"data_types.{name}", model)).removeprefix("torch.")
    names = {"float": "fp32", "float32": "fp32", "half": "fp16", "float16": "fp16", "bfloat16": "bf16"}
    return raw, names.get(raw, raw), model


@rule(ENGINE, "conflicts with the ", "param_dtype against the mode")
def param_dtype(c):
    """fp16 and bf16 say already which type the parameters have."""
    raw, asked, model = asked_and_has(c, "param_dtype")
    if asked in ("fp16", "bf16", "fp32") and asked != model and not c.hf:
        message = f"{raw} conflicts with the model's type, {model}: DeepSpeed raises AssertionError."
        yield c.error("data_types.param_dtype", message, "Leave it out.", delete("data_types.param_dtype"))


@rule(ENGINE, "unsupported mix of", "grad_accum_dtype at ZeRO-0")
def grad_accum_dtype(c):
    """Without ZeRO there is no place for gradients of another type than the model's."""
    _, asked, model = asked_and_has(c, "grad_accum_dtype")
    other = asked in ("fp16", "bf16", "fp32") and asked != model and not c.hf
    if other and c.stage == 0 and not c.stage_unknown:
        message = f"At ZeRO-0 gradients accumulate in the model's type ({model}): NotImplementedError."
        level = "note" if c.pipeline else "error"  # a PipelineModule has an optimizer for it
        yield c.find(level, "data_types.grad_accum_dtype", message)
