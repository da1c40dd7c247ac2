"""Sections that are read but have no effect as written, and defaults that surprise."""

import importlib.util

from config.rules.finding import add, rules_of, truthy
from config.rules.names import plain
from config.rules.schema_file import schema, unwrap

RULES, rule = rules_of("sections")
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": "", "comet": "comet_ml"}  # -> their package


def switches(c):
    """(name, section, its schema) of every section that has an "enabled" which is false by default."""
    for name, value in c.config.items():
        node = unwrap(schema()["properties"].get(name, {}))
        switch = unwrap(node.get("properties", {}).get("enabled", {}))
        if isinstance(value, dict) and switch.get("default") is False and not c.tuning:
            yield name, value, node["properties"]


@rule("deepspeed/monitor/config.py", "enabled: bool = False", "tensorboard not enabled")
def never_switched_on(c):
    """A section with settings and without its switch."""
    for name, section, keys in switches(c):
        others = [k for k in section if k in keys and k != "enabled"]
        misspelt = any(plain(k) in ("enable", "enabled") for k in section) or f"{name}.enabled" in c.unfilled
        if others and not misspelt:
            path = f"{name}.enabled"
            yield c.warning(path, 'Off: there is no "enabled": true in it.', 'Add "enabled": true.')


@rule("deepspeed/runtime/precision_config.py", "enabled: bool = False", "fp16 off with settings")
def switched_off(c):
    """Settings of a precision that is off."""
    for name, section, keys in switches(c):
        others = [k for k in section if k in keys and k != "enabled"]
        if section.get("enabled") is False and name in ("fp16", "bf16") and others:
            dots = " ..." * (len(others) > 3)
            yield c.note(f"{name}.enabled", f"Off, so {', '.join(others[:3])}{dots} do nothing.")


@rule("deepspeed/runtime/activation_checkpointing/checkpointing.py", "def configure(", "activation_checkpointing alone")
def activation_checkpointing(c):
    """Nothing in the engine reads the section."""
    active = c.section("activation_checkpointing")
    if active and c.mode != "lightning":  # whose strategy calls configure() with it
        message = (
            "Does nothing by itself: only deepspeed.checkpointing.configure() in your code reads it, and only "
            "deepspeed.checkpointing.checkpoint() obeys it."
        )
        level = "warning" if any(truthy(v) for v in active.values()) else "note"
        yield c.find(level, "activation_checkpointing", message, "HF models: model.gradient_checkpointing_enable().")


@rule("deepspeed/runtime/engine.py", "Train/Samples/lr", "monitor of a plain loop")
def monitors_write_little(c):
    """The engine knows the learning rate; the loss is yours."""
    on = [name for name in MONITORS if c.on(f"{name}.enabled")]
    if on and not c.hf:
        message = "Writes lr and a few more by itself; the loss of a plain loop needs engine.monitor.write_events()."
        yield c.note(on[0], message)


@rule("deepspeed/monitor/utils.py", "def check_wandb_availability", "wandb without its package")
def monitor_package(c):
    """A monitor imports its package at initialize(), on rank 0."""
    for name, package in MONITORS.items():
        if package and c.on(f"{name}.enabled") and importlib.util.find_spec(package) is None:
            message = f"Needs the package {package}, which is not installed here: DeepSpeed raises ImportError."
            yield c.note(f"{name}.enabled", message, f"pip install {package.replace('_', '-')}")


@rule("deepspeed/runtime/model_checkpointing/utils.py", "int(os.environ[CROSS_SIZE])", "a checkpoint writer")
def checkpoint_writer(c):
    """The writer wants to know the number of machines from its launcher."""
    if c.section("checkpoint.writer"):
        message = "Reads CROSS_SIZE and CROSS_RANK, which the deepspeed launcher alone sets: KeyError under torchrun."
        yield c.note("checkpoint.writer", message, "Start with the deepspeed launcher, or set both.")


@rule(
    "deepspeed/runtime/model_checkpointing/data_parallel_writer_factory.py",
    "self._uni_parallel_info.dp_rank if mpu_info is None",
    "a checkpoint writer for one rank",
)
def writer_without_data_parallel(c):
    """Without a mode the writer asks for a rank that its record does not have."""
    writer = c.section("checkpoint.writer")
    if writer and not writer.get("data_parallel") and c.stage < 3 and not c.stage_unknown:
        message = "Without data_parallel DeepSpeed 0.19.8 raises AttributeError (no attribute 'dp_rank')."
        yield c.error("checkpoint.writer.data_parallel", message, 'Add "data_parallel": "replica".')


@rule("deepspeed/runtime/constants.py", "GRADIENT_CLIPPING_DEFAULT = 1.", "clipping by default")
def clipping_by_default(c):
    """The default changed in 0.19.3."""
    if "gradient_clipping" in c.config or "gradient_clipping" in c.unfilled or c.mode == "lightning":
        return
    if c.hf:
        message = "Clipped to norm 1.0: without this key the Trainer's max_grad_norm is not passed on."
        yield c.note("gradient_clipping", message, '"gradient_clipping": "auto"', add("gradient_clipping", "auto"))
    else:
        message = "Gradients are clipped to norm 1.0 by default since 0.19.3."
        yield c.note("gradient_clipping", message, 'Off: "gradient_clipping": 0.0.')


@rule(
    "deepspeed/runtime/data_pipeline/config.py", "assert CURRICULUM_LEARNING_METRICS in", "random-LTD half configured"
)
def data_efficiency(c):
    """Parts of the data pipeline that cannot start without one of their keys."""
    for section, needed in (("data_sampling.curriculum_learning", "curriculum_metrics"),
                            ("data_sampling.dynamic_batching", "max_tokens"),
                            ("data_routing.random_ltd", "total_layer_num")):  # fmt: skip
        path = f"data_efficiency.{section}"
        if truthy(c.get(f"{path}.enabled")) and needed not in c.section(path) and f"{path}.{needed}" not in c.unfilled:
            yield c.error(f"{path}.{needed}", "Missing: DeepSpeed raises at initialize().")
