"""The scheduler section."""

import difflib

from config.rules.finding import add, delete, is_number, put, rename, rules_of
from config.rules.names import cure
from config.rules.optimizer import Chosen
from config.rules.schema_file import schema

RULES, rule = rules_of("scheduler")
ENGINE, SCHEDULES = "deepspeed/runtime/engine.py", "deepspeed/runtime/lr_schedules.py"
AT = "scheduler.params"
HF_NAMES = {"linear": "WarmupDecayLR", "cosine": "WarmupCosineLR", "constant_with_warmup": "WarmupLR",
            "warmupcosinedecaylr": "WarmupCosineLR", "warmuplineardecaylr": "WarmupDecayLR"}  # fmt: skip


def section_of(c):
    """(type, parameters) when the section has a type that is known, else (None, {})."""
    section = c.section("scheduler")
    kind, params = section.get("type"), section.get("params")
    return (kind, params if isinstance(params, dict) else {}) if known(kind) else (None, {})


def known(kind):
    table = schema()["x-deepspeed"]["schedulers"]
    return (table.get(kind) or table.get(f"torch.{kind}")) if isinstance(kind, str) else None


def ours(kind):
    return kind in schema()["x-deepspeed"]["schedulers"]


@rule("deepspeed/runtime/config.py", "def get_scheduler_name", "scheduler without type")
def no_type(c):
    """Without a type DeepSpeed takes the section for absent."""
    section = c.get("scheduler")
    if isinstance(section, dict) and section.get("type") is None and "scheduler.type" not in c.unfilled:
        fix, edit = 'Add "type": "WarmupLR".', None
        if "name" in section:
            fix, edit = 'Rename "name" to "type".', rename("scheduler.name", "type")
        message = "Without a type the whole section is ignored: the learning rate is constant."
        yield c.error("scheduler.type", message, fix, edit)


@rule(ENGINE, "DeepSpeed does not recognize LR scheduler", "cosine by its HF name")
def unknown_type(c):
    """DeepSpeed's five, or a class of torch.optim.lr_scheduler, letter for letter."""
    kind = c.section("scheduler").get("type")
    if kind is None or known(kind):
        return
    near = {n.lower(): n for n in schema()["x-deepspeed"]["schedulers"] if not n.startswith("torch.")}
    low = str(kind).lower()[:40]
    sure = HF_NAMES.get(low) or near.get(low)
    guess = sure or next(iter(difflib.get_close_matches(str(kind)[:40], near.values(), 1)), None)
    fix = f'Did you mean "{guess}"?' if guess else f"One of {', '.join(near.values())}."
    message = f"DeepSpeed does not recognize LR scheduler {str(kind)[:40]}: AssertionError."
    yield c.error("scheduler.type", message, fix, put("scheduler.type", near[low]) if low in near else None)


@rule(ENGINE, "scheduler(optimizer, **scheduler_params)", "scheduler without params")
def no_params(c):
    """The parameters are unpacked without a look whether there are any."""
    section = c.section("scheduler")
    if known(section.get("type")) and section.get("params") is None and "params" not in section:
        message = "No params: DeepSpeed raises TypeError (argument after ** must be a mapping, not NoneType)."
        yield c.error("scheduler.params", message, 'Add "params": {...}.')


@rule(ENGINE, "scheduler(optimizer, **scheduler_params)", "warmup_steps")
def unknown_params(c):
    """The parameters go to the constructor as they are."""
    kind, params = section_of(c)
    for name in params:
        if name in known(kind)["params"]:
            continue
        fix, edit = cure(known(kind)["params"], name, ("scheduler", "params", name))
        if kind == "WarmupLR" and name == "total_num_steps":
            fix, edit = "WarmupLR never decays: use WarmupDecayLR or WarmupCosineLR, or leave it out.", None
        if kind == "WarmupCosineLR" and name.startswith(("warmup_m", "lr")):
            fix, edit = (
                "It scales optimizer.params.lr by warmup_min_ratio ... 1 ... cos_min_ratio.",
                delete(f"{AT}.{name}"),
            )
        yield c.error(f"{AT}.{name}", f"{kind} raises TypeError (unexpected keyword).", fix, edit)


@rule(ENGINE, "scheduler(optimizer, **scheduler_params)", "WarmupDecayLR without total")
def missing_params(c):
    """Parameters without a default."""
    kind, params = section_of(c)
    if kind and isinstance(c.get("scheduler.params"), dict):
        missing = [n for n in known(kind)["required"] if n not in params and f"{AT}.{n}" not in c.unfilled]
        if missing:
            yield c.error(f"{AT}.{missing[0]}", f"{kind} needs {', '.join(missing)}: DeepSpeed raises TypeError.")


@rule(ENGINE, "self._scheduler_from_config(self.optimizer)", "torch scheduler with ZeRO")
def torch_scheduler_on_a_wrapper(c):
    """torch's schedulers check that they get a torch.optim.Optimizer."""
    kind, _ = section_of(c)
    wrapped = (c.stage > 0 and not c.stage_unknown) or c.fp16 or c.bf16
    if kind and not ours(kind) and wrapped:
        message = f"torch's {kind} wants a torch optimizer and gets DeepSpeed's wrapper: TypeError at initialize()."
        fix = "Use WarmupCosineLR or WarmupDecayLR, or pass the scheduler in code."
        yield c.error("scheduler.type", message, fix)


@rule(SCHEDULES, "warmup_num_steps: int = 1000", "default warmup")
def default_warmup(c):
    """All three warm-ups have the same default."""
    kind, params = section_of(c)
    absent = "warmup_num_steps" not in params and f"{AT}.warmup_num_steps" not in c.unfilled
    if kind in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR") and absent:
        yield c.note(f"{AT}.warmup_num_steps", "Absent: it warms up over the default, 1000 optimizer steps.")


@rule(ENGINE, "self.lr_scheduler.step(self.train_batch_size())", "ReduceLROnPlateau")
def needs_a_metric(c):
    """engine.step() has no loss to give: it tries the batch size instead."""
    kind, _ = section_of(c)
    if kind == "ReduceLROnPlateau":
        message = "Its metric is the batch size, which never improves: lr falls again and again, whatever the loss is."
        yield c.error("scheduler.type", message, "Make it in your code, and step it there.")


@rule("torch/optim/rprop.py", "step_size", "Rprop under a schedule")
def rprop_under_a_schedule(c):
    """ZeRO makes the optimizer's state by a step of its own, before the schedule has set lr."""
    if section_of(c)[0] and Chosen(c).backend == "torch.Rprop" and c.stage > 0 and not c.stage_unknown:
        message = "Rprop takes lr once, as its first step size, and with ZeRO that is before the schedule has begun."
        yield c.warning("scheduler.type", message, "Leave the schedule out: Rprop finds its own step sizes.")


@rule("torch/optim/lr_scheduler.py", "with `cycle_momentum` option enabled", "OneCycleLR for Adagrad")
def cycled_momentum(c):
    """torch's cycles move the momentum as well, by default."""
    kind, params = section_of(c)
    backend = Chosen(c).backend
    without = ("torch.Adagrad", "torch.Adadelta", "torch.Rprop", "torch.ASGD", "torch.Adafactor")
    if kind in ("OneCycleLR", "CyclicLR") and params.get("cycle_momentum", True) and backend in without:
        message = f"{kind} cycles the momentum, and {backend} has none: ValueError."
        yield c.error(f"{AT}.cycle_momentum", message, 'Add "cycle_momentum": false.')


@rule(SCHEDULES, "class WarmupDecayLR", "warmup longer than the run")
def warmup_longer_than_run(c):
    """The run is over before the learning rate is up."""
    kind, params = section_of(c)
    warmup, total = params.get("warmup_num_steps", 1000), params.get("total_num_steps")
    if kind in ("WarmupDecayLR", "WarmupCosineLR") and is_number(warmup) and is_number(total) and 0 < total < warmup:
        if f"{AT}.warmup_num_steps" in c.unfilled:
            return
        source = "" if "warmup_num_steps" in params else " (the default)"
        message = f"{warmup} warmup steps{source} in a run of {total}: lr never gets to its maximum."
        yield c.warning(f"{AT}.warmup_num_steps", message)


@rule(SCHEDULES, "warmup_max_lr: float = 0.001", "WarmupDecayLR forgets lr")
def climbs_to_its_default(c):
    """WarmupDecayLR's maximum is its own, 0.001, where WarmupLR takes the optimizer's."""
    kind, params = section_of(c)
    path = f"{AT}.warmup_max_lr"
    if kind != "WarmupDecayLR" or params.get("warmup_max_lr", None) is not None or path in c.unfilled:
        return
    if "warmup_max_lr" in params and not c.hf:
        return  # null is reported as such
    lr = c.get("optimizer.params.lr")
    message = "WarmupDecayLR without warmup_max_lr climbs to its own default, 0.001, not to "
    if is_number(lr):
        if lr != 0.001:
            yield c.error(path, f"{message}the optimizer's {lr}.", f'Add "warmup_max_lr": {lr}.', add(path, lr))
    elif c.hf:
        yield c.error(
            path, f"{message}the learning rate of your arguments.", 'Add "warmup_max_lr": "auto".', add(path, "auto")
        )
    elif c.optimizer_in_code():
        yield c.warning(path, f"{message}the lr of the optimizer in your code.", "Add the lr as warmup_max_lr.")


@rule(SCHEDULES, "def update_lr", "schedule against lr")
def schedule_wins(c):
    """The scheduler overwrites lr in every parameter group before the first step."""
    kind, params = section_of(c)
    lr, top = c.get("optimizer.params.lr"), params.get("warmup_max_lr")
    if kind in ("WarmupLR", "WarmupDecayLR") and is_number(lr) and is_number(top) and lr != top:
        yield c.note(f"{AT}.warmup_max_lr", f"The schedule wins: lr goes to {top}, and {lr} is never used.")


@rule(SCHEDULES, "self.min_lrs", "falling warmup")
def falling_warmup(c):
    """Warm-up from min to max, whichever is larger."""
    _, params = section_of(c)
    top, low = params.get("warmup_max_lr"), params.get("warmup_min_lr", 0)
    if is_number(top) and is_number(low) and low > top:
        message = f"{low} is above warmup_max_lr {top}: lr falls during warmup."
        yield c.warning(f"{AT}.warmup_min_lr", message)


@rule(SCHEDULES, "class OneCycle", "OneCycle upside down")
def cycle_upside_down(c):
    """The cycle goes from min to max and back."""
    kind, params = section_of(c)
    low, high = params.get("cycle_min_lr"), params.get("cycle_max_lr")
    if kind == "OneCycle" and is_number(low) and is_number(high) and low > high:
        yield c.warning(f"{AT}.cycle_min_lr", f"{low} is above cycle_max_lr {high}: upside down.")


@rule(SCHEDULES, "class WarmupLR", "very large warmup_max_lr")
def large_maximum(c):
    """As optimizer/large-lr."""
    _, params = section_of(c)
    top = params.get("warmup_max_lr")
    if is_number(top) and top >= 1 and Chosen(c).lower not in ("sgd", "adadelta", "rprop"):
        yield c.warning(f"{AT}.warmup_max_lr", f"{top} is a very large learning rate.")
