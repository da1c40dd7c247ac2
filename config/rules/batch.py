"""The batch: three numbers that must agree with the number of ranks."""

from config.rules.finding import add, delete, is_number, rules_of

RULES, rule = rules_of("batch")
NAMES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
CONFIG = "deepspeed/runtime/config.py"


def numbers(c):
    """(total, micro, steps) when all that are given are positive integers and the total is there, else None."""
    total, micro, steps = (c.get(name) for name in NAMES)
    given = [v for v in (total, micro, steps) if v is not None]
    good = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in given) and total is not None
    if c.hf and good and steps is None:
        steps = 1  # Accelerate writes 1 before DeepSpeed could derive it
    return (total, micro, steps) if good else None


def ranks_of(c):
    """Data-parallel ranks as DeepSpeed counts them, None when the world size is not known."""
    sequence = c.get("sequence_parallel_size", 1)
    split = isinstance(sequence, int) and sequence > 1 and c.world_size
    return (c.world_size // sequence or None) if split else c.world_size


def shares(micro, steps):
    product = (micro or 1) * (steps or 1)
    return product, " x ".join(name for name, v in zip(NAMES[1:], (micro, steps), strict=True) if v)


@rule(CONFIG, "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided", "no batch size")
def no_batch(c):
    """Without a batch size nothing starts, unless a program puts one in: Lightning does, and some write it by hand."""
    if c.get(NAMES[0]) is not None or c.get(NAMES[1]) is not None or c.unfilled & set(NAMES[:2]):
        return
    if c.mode == "lightning":
        return
    level = "warning" if c.guessed else "error"
    message = "No batch size: DeepSpeed raises AssertionError at initialize()"
    message += ", unless the program fills one in, as Lightning does." if c.guessed else "."
    fix, value = ("Write", "auto") if c.hf else ("Give", 1)
    fix += ' train_micro_batch_size_per_gpu: "auto".' if c.hf else f" {NAMES[1]} or {NAMES[0]}."
    yield c.find(level, NAMES[1], message, fix, add(NAMES[1], value) if c.hf else None)


@rule(CONFIG, "Check batch related parameters. train_batch_size is not equal", "no world size fits")
def no_world_size_fits(c):
    """The total is no multiple of micro-batch times accumulation: it fails on any number of ranks."""
    if not (found := numbers(c)) or c.world_size:
        return
    total, micro, steps = found
    product, formula = shares(micro, steps)
    if total % product:
        message = f"{total} is no multiple of {product} ({formula}): AssertionError on any number of ranks."
        near = sorted({total - total % product or product, total + -total % product})
        yield c.error(NAMES[0], message, f"{' or '.join(map(str, near))}.")


@rule(CONFIG, "Check batch related parameters. train_batch_size is not equal", "batch numbers disagree")
def world_size_does_not_fit(c):
    """The three numbers and the ranks there are do not multiply."""
    if not (found := numbers(c)) or not (ranks := ranks_of(c)):
        return
    total, micro, steps = found
    product, formula = shares(micro, steps)

    def fits(count):
        return total == product * count if micro and steps else total % (product * count) == 0

    if fits(ranks):
        return
    tensor = c.get("tensor_parallel.autotp_size", 0)
    if isinstance(tensor, int) and tensor > 1 and ranks % tensor == 0 and fits(ranks // tensor):
        message = f"Fits only with an mpu passed: DeepSpeed counts all {ranks} ranks, tensor-parallel ones too."
        yield c.warning(NAMES[0], message)
    elif c.pipeline and any(ranks % k == 0 and fits(ranks // k) for k in range(2, ranks + 1)):
        stages = next(k for k in range(2, ranks + 1) if ranks % k == 0 and fits(ranks // k))
        yield c.note(NAMES[0], f"Fits {ranks} ranks with {stages} pipeline stages only.")
    else:
        message = f"train_batch_size {total} != {formula} x {ranks} ranks = {product * ranks}"
        if not (micro and steps):
            message = f"train_batch_size {total} is no multiple of {formula and formula + ' x '}{ranks} ranks"
        want = product * ranks if total < product * ranks or (micro and steps) else total - total % (product * ranks)
        fix = f"{want}, or leave train_batch_size out."
        yield c.error(NAMES[0], message + ": DeepSpeed raises AssertionError at initialize().", fix)


@rule(CONFIG, "Check batch related parameters. train_batch_size is not equal", "three batch numbers")
def one_world_size_only(c):
    """All three numbers are given, so exactly one number of ranks is right."""
    if not (found := numbers(c)) or ranks_of(c):
        return
    total, micro, steps = found
    if micro and steps and total % (micro * steps) == 0:
        groups = " data-parallel groups" if c.pipeline or c.get("sequence_parallel_size", 1) != 1 else " ranks"
        message = f"With all three batch numbers given this runs on exactly {total // (micro * steps)}{groups}."
        yield c.note(NAMES[0], message, "Leave train_batch_size out to run on any number.")


@rule(CONFIG, 'dist.get_world_size() / config["sequence_parallel_size"]', "a batch that becomes a float")
def float_batch(c):
    """The number of ranks is divided with /, and what is derived from a float is one."""
    given = [name for name in NAMES[1:] if c.get(name) is not None]
    if "sequence_parallel_size" in c.config and c.get(NAMES[0]) and not c.hf and len(given) < 2:
        missing = next(name for name in NAMES[1:] if name not in given)
        message = f"Makes the derived {missing} a float (4.0): range() and DataLoader refuse it."
        yield c.warning("sequence_parallel_size", message, f"Write {' and '.join(NAMES[1:])} both.")


@rule("deepspeed/utils/groups.py", "def _init_tp_mesh_device", "AutoTP over more ranks than there are")
def parallel_sizes_divide(c):
    """Tensor, sequence, expert and hpZ groups are cut out of the ranks there are."""
    for path in ("tensor_parallel.autotp_size", "sequence_parallel_size", "expert_parallel.autoep_size",
                 "zero_optimization.zero_hpz_partition_size"):  # fmt: skip
        size = c.get(path)
        if path.endswith("hpz_partition_size") and is_number(size) and c.world_size and size > c.world_size:
            continue  # silently cut down to the world size
        if c.world_size and isinstance(size, int) and size > 1 and c.world_size % size:
            yield c.error(path, f"{size} does not divide the {c.world_size} ranks.")


@rule("deepspeed/runtime/engine.py", "self.steps_per_print", "steps_per_print 0")
def report_interval(c):
    """global_steps % 0 at the first step."""
    every = c.get("steps_per_print")
    if every == 0 and is_number(every):
        message, fix = "0 crashes the first step with ZeroDivisionError.", "Leave it out to be quiet."
        yield c.error("steps_per_print", message, fix, delete("steps_per_print"))
    elif is_number(every) and every < 0:
        yield c.warning("steps_per_print", "A negative number does not silence the report.", "Leave it out.")
