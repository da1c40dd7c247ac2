"""offload_optimizer, offload_param, NVMe and aio."""

from config.rules.finding import delete, is_number, put, rules_of, truthy

RULES, rule = rules_of("offload")
STAGE12, STAGE3 = "deepspeed/runtime/zero/stage_1_and_2.py", "deepspeed/runtime/zero/stage3.py"
CONFIG = "deepspeed/runtime/zero/config.py"
OLD = {"optimizer": "cpu_offload", "param": "cpu_offload_param"}
LARGE_EMBEDDING = 151_936 * 4_096  # Qwen's vocabulary by the width of a 7B model


def at(what):
    return f"zero_optimization.offload_{what}"


def offloaded(c):
    """(what, where it is written, its section, its device) of what is offloaded."""
    for what in ("optimizer", "param"):
        section, device = c.section(at(what)), c.offload(what)
        if device != "none" and not c.stage_unknown:
            yield what, at(what) if section else f"zero_optimization.{OLD[what]}", section, device


@rule(CONFIG, "Partial offloading only supported", "ratio at stage 2")
def ratio(c):
    """A part of the step on the host needs stage 3, and DeepSpeed's Adams on both sides."""
    for what in ("optimizer", "param"):
        share = c.section(at(what)).get("ratio", 1.0)
        if not is_number(share) or not 0 <= share < 1 or c.stage_unknown:
            continue
        if c.stage < 3:
            yield c.error(f"{at(what)}.ratio", "Partial offload works at stage 3 only: DeepSpeed raises.", "1.0")
        elif c.offload(what) != "none" and c.other_than_cpu_adam():
            message = "Partial offload works with DeepSpeedCPUAdam only: DeepSpeed raises AssertionError."
            yield c.error(f"{at(what)}.ratio", message, c.other_than_cpu_adam())


@rule("deepspeed/runtime/config_utils.py", "Cannot provide deprecated parameter", "cpu_offload twice")
def old_and_new_name(c):
    """The old switch is converted into the new section, which must not be there; false counts as well."""
    for what, old in OLD.items():
        if f"offload_{what}" in c.zero and c.zero.get(old, "auto") != "auto":
            path = f"zero_optimization.{old}"
            yield c.error(path, f"Not together with offload_{what}: AssertionError.", "Delete it.", delete(path))


@rule("deepspeed/runtime/zero/offload_config.py", 'device: OffloadDeviceEnum = "none"', "offload without device")
def no_device(c):
    """The default device is none."""
    for what in ("optimizer", "param"):
        section = c.section(at(what))
        if section and "device" not in section and f"{at(what)}.device" not in c.unfilled:
            yield c.warning(f"{at(what)}.device", 'Without "device" nothing is offloaded.', 'Add "device": "cpu".')


@rule(CONFIG, "offload_param", "offload_param at stage 2")
def parameters_below_3(c):
    """Below stage 3 every rank holds all parameters on its device."""
    for what, where, _, _ in offloaded(c):
        if what == "param" and c.stage < 3:
            message = f"Ignored in silence at stage {c.stage}: only stage 3 offloads parameters."
            yield c.error(where, message, "Stage 3, or delete it.", delete(where))


@rule("deepspeed/runtime/engine.py", "def zero_use_cpu_optimizer", "offload_optimizer at stage 0")
def optimizer_at_0(c):
    """The switch is read for the optimizer's class before anybody looks at the stage."""
    for what, where, _, _ in offloaded(c):
        if what == "optimizer" and c.stage == 0:
            yield c.error(where, "ZeRO is off: nothing is offloaded, and Adam is swapped for DeepSpeedCPUAdam.")


@rule(STAGE12, "self.cpu_offload", "NVMe at stage 2")
def nvme_below_3(c):
    """Stages 1 and 2 know the host, not the drive."""
    for what, _, _, device in offloaded(c):
        if what == "optimizer" and device == "nvme" and 0 < c.stage < 3:
            message = f"At stage {c.stage} nvme silently means cpu; only stage 3 writes to NVMe."
            yield c.error(f"{at(what)}.device", message, "", put(f"{at(what)}.device", "cpu"))


@rule(STAGE3, "os.path.join(offload_optimizer_config.nvme_path", "NVMe without path")
def nvme_path(c):
    """The swap files are made below nvme_path."""
    for what, _, section, device in offloaded(c):
        path = f"{at(what)}.nvme_path"
        if device == "nvme" and c.stage == 3 and not section.get("nvme_path") and path not in c.unfilled:
            message = "NVMe without a path: DeepSpeed raises (expected str, bytes or os.PathLike object, not NoneType)."
            yield c.error(path, message, 'Add "nvme_path": "/local_nvme".')


@rule(
    "deepspeed/runtime/swap_tensor/partitioned_param_swapper.py",
    "More elements",
    "NVMe parameters with the default buffer",
)
def nvme_buffer(c):
    """One buffer holds one rank's share of a parameter, and the embedding is the largest."""
    for what, _, section, device in offloaded(c):
        size = section.get("buffer_size", 100_000_000)
        if what == "param" and device == "nvme" and c.stage == 3 and is_number(size) and size < LARGE_EMBEDDING:
            source = "" if "buffer_size" in section else "by default "
            if c.world_size and size * c.world_size >= LARGE_EMBEDDING:
                continue
            message = (
                f"The buffer holds {source}{size:,.0f} elements: a rank's share of an embedding may be more "
                f"(151,936 x 4,096 on one rank: {LARGE_EMBEDDING:,}), and then the first gather raises "
                '"More elements ... than buffer size".'
            )
            yield c.note(f"{at(what)}.buffer_size", message, "Vocabulary x width / ranks, or more.")


@rule("deepspeed/runtime/engine.py", "if not self.super_offload(", "super_offload at stage 2")
def super_offload_below_3(c):
    """SuperOffload is an optimizer of stage 3."""
    for what, _, section, _ in offloaded(c):
        if truthy(section.get("super_offload")) and 0 < c.stage < 3:
            message = f"Does nothing at stage {c.stage}: read at stage 3 only."
            yield c.warning(f"{at(what)}.super_offload", message)


@rule("deepspeed/runtime/zero/offload_config.py", "pin_memory: bool = True", "offload with default pin_memory")
def pinned_by_default(c):
    """Pinned memory cannot be swapped out; it is the default since 0.19.5."""
    for what, where, section, _ in offloaded(c):
        if "pin_memory" not in section and section and (what == "param") <= (c.stage == 3) and c.stage:
            message = "pin_memory is on by default since 0.19.5; with little host memory set it to false."
            yield c.note(f"{where}.pin_memory", message)


@rule(
    "deepspeed/runtime/engine.py",
    "You are using ZeRO-Offload with a client provided optimizer",
    "offload and an optimizer from the code",
)
def optimizer_from_the_code(c):
    """An optimizer that comes from the program must be DeepSpeed's own CPU Adam."""
    if c.mode in ("trainer", "accelerate", "hf") or not c.optimizer_in_code():
        return  # Accelerate swaps AdamW for DeepSpeedCPUAdam by itself
    if (
        c.offload("optimizer") != "none"
        and not c.stage_unknown
        and c.get("zero_force_ds_cpu_optimizer", True) is not False
    ):
        message = (
            "The optimizer comes from your code: with offload it must be deepspeed.ops.adam.DeepSpeedCPUAdam (or "
            "DeepSpeedCPULion); a torch optimizer raises ZeRORuntimeException."
        )
        fix = 'Make a DeepSpeedCPUAdam, or add an optimizer section, or "zero_force_ds_cpu_optimizer": false (slow).'
        yield c.warning(at("optimizer"), message, fix)


@rule("deepspeed/runtime/swap_tensor/aio_config.py", "def get_aio_config", "aio without nvme")
def aio_alone(c):
    """Asynchronous I/O serves the drive alone."""
    devices = [c.offload("optimizer"), c.offload("param")]
    if c.get("aio") and "nvme" not in devices and not c.tuning:
        yield c.note("aio", "Does nothing without offload to nvme.")
