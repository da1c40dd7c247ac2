"""The Trainer, Accelerate and Lightning: what each fills in, and what it does in silence."""

from config.rules.finding import add, delete, is_number, put, rules_of

RULES, rule = rules_of("frameworks")
ACCELERATE, PREPARE = "accelerate/utils/dataclasses.py", "accelerate/accelerator.py"
TRAINER, LIGHTNING = "transformers/integrations/deepspeed.py", "lightning/pytorch/strategies/deepspeed.py"
MUST_MATCH = {  # keys that the Trainer compares with TrainingArguments
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.betas": "adam_beta1, adam_beta2",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    "scheduler.params.total_num_steps": "the number of steps of the run",
    "train_batch_size": "their product",
}
STEPS = "gradient_accumulation_steps"


@rule(ACCELERATE, 'self.hf_ds_config.config["gradient_accumulation_steps"] = 1', "hf: no accumulation key")
def accumulation_absent(c):
    """Accelerate's plugin, which the Trainer uses as well, writes 1 for an absent key."""
    if not c.hf or STEPS in c.config or STEPS in c.unfilled or c.tuning:
        return
    message = (
        f"Absent means 1 here: a run that asks for more in its arguments takes a step after every micro-batch"
        f"{' (Accelerate asked for 4: 8 updates from 8 micro-batches)' if c.mode != 'trainer' else ''}"
    )
    if c.get("train_batch_size") is not None:
        message += ", or fails, as train_batch_size is then not micro-batch x 1 x ranks"
    yield c.error(STEPS, message + ".", f'Add "{STEPS}": "auto".', add(STEPS, "auto"))


@rule(TRAINER, 'if "scheduler" in config:', "hf: scheduler in the file")
def scheduler_wins(c):
    """The Trainer makes no scheduler of its own when the file has one."""
    if not c.hf or "scheduler" not in c.config:
        return
    kind = c.get("scheduler.type")
    if c.mode == "accelerate":
        message = "Your code must pass a DummyScheduler: any other scheduler raises ValueError in prepare()."
        yield c.note("scheduler", message)
        return
    flat = ", constant after its warm-up," if kind == "WarmupLR" else ""
    message = f"Wins over --lr_scheduler_type in silence: {kind}{flat} is trained, whatever is asked for."
    yield c.warning("scheduler", message, "Delete the section, unless you want exactly this.")


@rule(TRAINER, "optimizer = DummyOptim(params=model_parameters)", "hf: optimizer in the file")
def optimizer_wins(c):
    """The Trainer makes no optimizer of its own when the file has one."""
    if not c.hf or not isinstance(c.get("optimizer"), dict):
        return
    kind = c.get("optimizer.type")
    if c.mode == "accelerate":
        message = "Your code must pass a DummyOptim: any other optimizer raises ValueError in prepare()."
        yield c.note("optimizer", message)
    else:
        level = "note" if str(kind).lower() in ("adamw", "adam") else "warning"
        yield c.find(level, "optimizer", f"Wins over --optim in silence: {kind} is trained, whatever is asked for.")


@rule(PREPARE, '"optimizer.params.lr": optimizer.lr', "accelerate: betas auto")
def auto_betas(c):
    """Accelerate knows lr and weight_decay from DummyOptim, and nothing else."""
    for name in ("betas", "eps"):
        path = f"optimizer.params.{name}"
        if c.hf and c.mode != "trainer" and c.get(path) == "auto":
            message = "The Trainer fills this in, Accelerate does not: ValueError, not found in kwargs."
            fix = "Write the value, or leave the key out."
            yield c.error(path, message, fix, delete(path)) if c.mode == "accelerate" else c.note(path, message, fix)


@rule(TRAINER, "Please correct the following DeepSpeed config values that mismatch", "hf: numbers that must match")
def must_match(c):
    """The Trainer raises ValueError when a number here is not the one in TrainingArguments."""
    if c.mode not in ("trainer", "hf") or c.tuning:
        return
    fixed = [path for path in MUST_MATCH if is_number(c.get(path)) or isinstance(c.get(path), list)]
    if fixed:
        pairs = ", ".join(f"{path.split('.')[-1]} = {MUST_MATCH[path]}" for path in fixed[:4])
        message = f"Must be what TrainingArguments has, or the Trainer raises ValueError: {pairs}."
        yield c.note(fixed[0], message, 'Write "auto".')


@rule(ACCELERATE, "Please specify the ZeRO optimization config in the DeepSpeed config.", "hf: no zero_optimization")
def no_zero_section(c):
    """Accelerate's plugin insists on the section."""
    path = "zero_optimization"
    if c.hf and path not in c.config and not c.tuning:
        message = "No zero_optimization section: Accelerate raises ValueError."
        yield c.error(path, message, 'Add it, even as {"stage": 0}.', add(path, {"stage": 0}))
    elif c.mode != "deepspeed" and isinstance(c.get(path), bool):
        who = "transformers and Accelerate" if c.hf else "Lightning"
        edit = put(path, {"stage": int(c.get(path))})
        yield c.error(path, f"{who} cannot read this form.", 'Write {"stage": 1}.', edit)


@rule(
    LIGHTNING,
    "Do not set `gradient_accumulation_steps` in the DeepSpeed config",
    "lightning: accumulation key",
)
def lightning_accumulation(c):
    """Lightning writes the accumulation itself and refuses a file that has it."""
    if c.mode == "lightning" and STEPS in c.config:
        message = "Lightning raises MisconfigurationException: Trainer(accumulate_grad_batches=...) decides."
        yield c.error(STEPS, message, "Delete it.", delete(STEPS))


@rule(
    LIGHTNING,
    '"gradient_clipping" not in self.config',
    "lightning: clipping in the file",
)
def lightning_clipping(c):
    """Lightning passes gradient_clip_val on only where the key is absent."""
    if c.mode == "lightning" and "gradient_clipping" in c.config:
        message = "Wins over Trainer(gradient_clip_val=...) in silence."
        yield c.note("gradient_clipping", message, "Leave it out.", delete("gradient_clipping"))


@rule("lightning/pytorch/strategies/deepspeed.py", 'if "optimizer" in self.config:', "lightning: optimizer in the file")
def lightning_optimizer(c):
    """With an optimizer in the file Lightning never calls configure_optimizers()."""
    if c.mode != "lightning":
        return
    if isinstance(c.get("optimizer"), dict):
        yield c.note("optimizer", "With it Lightning never calls configure_optimizers().")
    elif "scheduler" in c.config:
        message = (
            "Without an optimizer section it meets the scheduler of configure_optimizers(), and one of them loses."
        )
        yield c.warning("scheduler", message, "Return the scheduler from configure_optimizers().")


@rule("lightning/pytorch/strategies/deepspeed.py", "config = json.load(f)", "lightning: total batch")
def lightning_total(c):
    """Lightning writes micro-batch and accumulation; a total besides must be their product."""
    if c.mode == "lightning" and is_number(c.get("train_batch_size")):
        message = "Lightning writes micro-batch and accumulation itself: AssertionError unless the product agrees."
        yield c.warning("train_batch_size", message, "Delete it.", delete("train_batch_size"))
