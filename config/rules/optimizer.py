"""The optimizer section: which constructor DeepSpeed will call, and what it makes of these parameters."""

import difflib

from config.rules.finding import delete, is_number, put, rename, rules_of, shown, truthy
from config.rules.names import cure, plain
from config.rules.schema_file import schema

RULES, rule = rules_of("optimizer")
ENGINE = "deepspeed/runtime/engine.py"
REMOVED = {"onebitadam": "AdamW", "zerooneadam": "AdamW", "onebitlamb": "Lamb"}
ALIASES = {"fusedadam": "AdamW", "deepspeedcpuadam": "AdamW", "cpuadam": "AdamW", "fusedlamb": "Lamb",
           "fusedlion": "Lion", "cpulion": "Lion", "deepspeedcpulion": "Lion", "paged_adamw": "AdamW",
           "adamw_torch": "AdamW", "adamw_hf": "AdamW", "adamw_torch_fused": "AdamW", "adamw8bit": "AdamW",
           "adam8bit": "AdamW", "adamw_8bit": "AdamW", "adamw_bnb_8bit": "AdamW", "paged_adamw_8bit": "AdamW",
           "paged_adamw_32bit": "AdamW"}  # fmt: skip
MUP = ("muadam", "muadamw", "musgd")
OTHER_LR_SCALE = ("adadelta", "lbfgs", "musgd", "sgd", "rprop")  # learning rates of 1 and more are normal there


class Chosen:
    """What the section asks for. `backend` is None for an unknown type, `allowed` what its constructor takes."""

    def __init__(self, c):
        section = c.get("optimizer")
        self.section = section if isinstance(section, dict) else {}
        kind, params = self.section.get("type"), self.section.get("params")
        self.kind = kind if isinstance(kind, str) else None
        self.params = params if isinstance(params, dict) else {}
        self.lower = str(kind).lower()
        self.backend, self.allowed = self.constructor(c) if self.kind else (None, set())

    def constructor(self, c):
        """runtime/engine.py _configure_basic_optimizer."""
        table = schema()["x-deepspeed"]["optimizers"]
        name, on_cpu = self.lower, c.offload("optimizer") != "none"
        if name in ("adam", "adamw"):
            chosen = "DeepSpeedCPUAdam" if on_cpu else "FusedAdam"
            if self.params.get("torch_adam"):
                adam = name == "adam" and self.params.get("adam_w_mode", True) is False
                chosen = "torch.Adam" if adam else "torch.AdamW"
            popped = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
            return chosen, set(table[chosen]["params"]) - {"adamw_mode"} | popped
        chosen = {
            "adagrad": "DeepSpeedCPUAdagrad" if on_cpu else "torch.Adagrad",
            "lamb": "FusedLamb",
            "lion": "DeepSpeedCPULion" if on_cpu else "FusedLion",
            "muon": "Muon",
        }.get(name, f"torch.{self.kind}")
        return (chosen, set(table[chosen]["params"])) if chosen in table else (None, set())

    def tested_with_zero(self):
        """runtime/zero/utils.py: the optimizers that ZeRO was tested with."""
        if self.lower in MUP:
            return False
        own = not str(self.backend).startswith("torch.") and self.backend != "FusedLamb"
        return own or self.backend in ("torch.Adam", "torch.AdamW", "torch.Adagrad")


@rule(ENGINE, "must provide optimizer during init", "no optimizer")
def from_the_code(c):
    """No section: the optimizer is an argument of initialize()."""
    if c.optimizer_in_code() and "optimizer" not in c.config and not c.hf and c.mode != "lightning":
        message = "No optimizer here: pass one to deepspeed.initialize(), or "
        effect = {0: "backward() raises.", 3: "the first step crashes."}.get(c.stage, "ZeRO raises at initialize().")
        yield c.note("optimizer", message + effect)


@rule("deepspeed/runtime/config.py", "def get_optimizer_name", "optimizer without type")
def no_type(c):
    """Without a type DeepSpeed takes the section for absent."""
    section = c.get("optimizer")
    if not isinstance(section, dict) or isinstance(section.get("type"), str) or "optimizer.type" in c.unfilled:
        return
    if section.get("type") is not None:
        yield c.error("optimizer.type", f"{shown(section['type'])} is not a name: DeepSpeed crashes.", '"AdamW"')
    else:
        fix, edit = 'Add "type": "AdamW".', None
        if "name" in section:
            fix, edit = 'Rename "name" to "type".', rename("optimizer.name", "type")
        yield c.error(
            "optimizer.type", "Without a type the whole section is ignored: there is no optimizer.", fix, edit
        )


@rule(ENGINE, "is not a supported DeepSpeed Optimizer", "FusedAdam as type")
def unknown_type(c):
    """DeepSpeed has six optimizers by name; anything else is looked up in torch.optim, letter for letter."""
    o = Chosen(c)
    if o.kind is None or o.backend or o.lower in MUP:
        return
    names = {n.split(".")[-1] for n in schema()["x-deepspeed"]["optimizers"]} - {"FusedAdam", "FusedLamb", "FusedLion"}
    names |= {"Lamb", "Lion"}
    same = next((n for n in sorted(names) if plain(n) == plain(o.kind)), None)
    near = [same] if same else difflib.get_close_matches(o.kind[:40], sorted(names), 1)
    edit = put("optimizer.type", same or ALIASES.get(o.lower)) if same or o.lower in ALIASES else None
    if o.lower in REMOVED:
        fix = f'Removed from DeepSpeed 0.19. Use "{REMOVED[o.lower]}".'
    elif o.lower in ALIASES:
        fix = f"Use {ALIASES[o.lower]}: DeepSpeed picks the implementation itself."
        if "8bit" in o.lower or "paged" in o.lower:
            fix, edit = "8-bit and paged optimizers are made in your code, or by the Trainer's --optim.", None
    else:
        fix = (
            f'Did you mean "{near[0]}"?'
            if near
            else "Use AdamW, Adam, Adagrad, Lamb, Lion, Muon or a torch.optim class."
        )
    message = f"{o.kind} is not a supported DeepSpeed optimizer: AssertionError."
    yield c.error("optimizer.type", message, fix, edit)


@rule(ENGINE, "from mup import MuAdam", "MuAdam without its package")
def mup_package(c):
    """The import is tried, and its failure only logged."""
    o = Chosen(c)
    if o.lower in MUP:
        message = f"{o.kind} needs the mup package; without it DeepSpeed raises UnboundLocalError."
        yield c.note("optimizer.type", message)


@rule(ENGINE, "self.optimizer_params()", "optimizer without params")
def no_params(c):
    """Every constructor has a default learning rate, and almost nobody wants it."""
    o = Chosen(c)
    if o.backend and not o.params and not isinstance(o.section.get("params"), str):
        message = "No params: the optimizer trains with its default learning rate."
        yield c.warning("optimizer.params", message, '"params": {...}')


@rule(ENGINE, "is not supported as an optimizer parameter", "max_grad_norm in params")
def clipping_in_params(c):
    """Clipping is the engine's."""
    o = Chosen(c)
    if "max_grad_norm" in o.params and (o.backend or o.lower in MUP):
        path = "optimizer.params.max_grad_norm"
        yield c.error(path, "DeepSpeed raises ValueError.", "Set gradient_clipping at the top level.", delete(path))


@rule(ENGINE, "optimizer = adam_optimizer(model_parameters, **optimizer_parameters", "weightdecay")
def unknown_params(c):
    """The parameters go to the constructor as they are."""
    o = Chosen(c)
    for name in o.params if o.backend else ():
        if name in o.allowed or name == "max_grad_norm":
            continue
        effect = "ignores it in silence" if o.backend == "Muon" else "raises TypeError (unexpected keyword)"
        fix, edit = cure(sorted(o.allowed), name, ("optimizer", "params", name))
        if o.backend in ("FusedAdam", "DeepSpeedCPUAdam") and name in ("foreach", "fused", "capturable", "maximize"):
            fix, edit = 'A torch option: add "torch_adam": true.', None
        yield c.error(f"optimizer.params.{name}", f"{o.backend} {effect}.", fix, edit)


@rule(ENGINE, "You are using an untested ZeRO Optimizer", "SGD with ZeRO")
def untested_with_zero(c):
    """ZeRO flattens parameters into one vector a rank, which not every optimizer survives."""
    o = Chosen(c)
    allowed = c.get("zero_allow_untested_optimizer") or o.tested_with_zero()
    if (o.backend or o.lower in MUP) and not allowed and c.stage > 0 and not c.stage_unknown:
        message = f"{o.kind} is untested with ZeRO: DeepSpeed raises AssertionError."
        yield c.error("optimizer.type", message, 'Add "zero_allow_untested_optimizer": true, or use AdamW.')


@rule(ENGINE, "self.optimizer.step()", "LBFGS")
def needs_a_closure(c):
    """step() is called without arguments."""
    o = Chosen(c)
    if o.backend == "torch.LBFGS":
        message = "LBFGS evaluates the loss itself through step(closure), which the engine does not give: TypeError at "
        yield c.error("optimizer.type", message + "the first step.", "Use AdamW.")


@rule("torch/optim/sparse_adam.py", "does not support dense gradients", "SparseAdam")
def sparse_only(c):
    """ZeRO and the all-reduce make every gradient dense."""
    o = Chosen(c)
    if o.backend == "torch.SparseAdam":
        message = "SparseAdam takes sparse gradients alone: RuntimeError at the first step."
        yield c.error("optimizer.type", message, "Use AdamW.")


@rule(ENGINE, "adam_w_mode = optimizer_parameters.pop(ADAM_W_MODE, ADAM_W_MODE_DEFAULT)", "Adam is AdamW")
def adam_is_adamw(c):
    """Type Adam decouples weight decay unless adam_w_mode is false."""
    o = Chosen(c)
    decays = o.params.get("weight_decay") not in (None, 0)
    if o.lower == "adam" and o.params.get("adam_w_mode", True) is True and decays:
        message = '"Adam" is AdamW (decoupled weight decay) in DeepSpeed unless adam_w_mode is false.'
        yield c.note("optimizer.type", message)


@rule(ENGINE, "self.optimizer_name() == ADAMW_OPTIMIZER or adam_w_mode", "AdamW made Adam")
def adamw_stays_adamw(c):
    """Type AdamW does not look at adam_w_mode."""
    o = Chosen(c)
    if o.lower == "adamw" and o.params.get("adam_w_mode") is False:
        path = "optimizer.params.adam_w_mode"
        yield c.warning(path, "Ignored: type AdamW stays AdamW.", 'Use "type": "Adam".')


@rule("torch/optim/adamw.py", "lr: float | Tensor = 1e-3", "no lr")
def default_lr(c):
    """Constructors have a default learning rate."""
    o = Chosen(c)
    absent = o.params and "lr" not in o.params and "optimizer.params.lr" not in c.unfilled
    if absent and o.backend not in (None, "Muon", "torch.Adadelta", "torch.Adafactor"):
        message = "No lr: the optimizer's default is used (1e-3 for Adam and AdamW)."
        yield c.note("optimizer.params.lr", message)


@rule("torch/optim/adamw.py", "lr: float | Tensor = 1e-3", "lr 3")
def large_lr(c):
    """A learning rate of 1 is a typing error for Adam."""
    o = Chosen(c)
    lr = o.params.get("lr")
    if is_number(lr) and lr >= 1 and o.lower not in OTHER_LR_SCALE:
        yield c.warning("optimizer.params.lr", f"{lr} is a very large learning rate.", "1e-5 to 1e-3 is usual.")


@rule("torch/optim/adamw.py", "lr: float | Tensor = 1e-3", "lr 0")
def zero_lr(c):
    """Nothing moves, unless a schedule lifts it."""
    lr = Chosen(c).params.get("lr")
    if lr == 0 and is_number(lr) and "scheduler" not in c.config:
        yield c.error("optimizer.params.lr", "0: nothing is trained.", "1e-5 to 1e-3 is usual.")


@rule("torch/optim/adamw.py", "eps: float = 1e-8", "two eps for AdamW")
def list_of_eps(c):
    """Adafactor alone has two."""
    o = Chosen(c)
    if isinstance(o.params.get("eps"), list) and o.lower != "adafactor":
        yield c.error("optimizer.params.eps", f"{o.kind} takes one number: TypeError.", "1e-8")


@rule("torch/optim/adamw.py", "weight_decay: float = 1e-2", "weight decay 10")
def large_decay(c):
    """A decay of 1 makes a weight zero where lr is 1."""
    decay = Chosen(c).params.get("weight_decay")
    if is_number(decay) and decay >= 1:
        yield c.warning("optimizer.params.weight_decay", f"{decay} is very large.", "0.01 to 0.1 is usual.")


@rule("deepspeed/ops/adam/fused_adam.py", "FusedAdam does not support the AMSGrad variant", "amsgrad for FusedAdam")
def amsgrad(c):
    """The fused kernels have no room for the maximum."""
    o = Chosen(c)
    if o.backend in ("FusedAdam", "DeepSpeedCPUAdam") and truthy(o.params.get("amsgrad")):
        yield c.error("optimizer.params.amsgrad", f"{o.backend} raises RuntimeError on it.", '"torch_adam": true')


@rule("torch/optim/_adafactor.py", "row_var", "Adafactor with ZeRO")
def adafactor_with_zero(c):
    """The second moment of a matrix is kept as a row and a column; a flat vector has neither."""
    if Chosen(c).backend == "torch.Adafactor" and c.stage > 0 and not c.stage_unknown:
        message = "ZeRO hands it flat vectors for each matrix: it keeps whole second moments, and trains otherwise."
        yield c.error("optimizer.type", message, "Use AdamW, or ZeRO stage 0.")


@rule("torch/optim/sgd.py", "Nesterov momentum requires a momentum and zero dampening", "Nesterov without momentum")
def nesterov(c):
    """Looking ahead needs a direction."""
    o = Chosen(c)
    possible = o.params.get("momentum") and not o.params.get("dampening")
    if o.backend == "torch.SGD" and truthy(o.params.get("nesterov")) and not possible:
        message = "Nesterov needs a momentum above 0, and no dampening: ValueError."
        yield c.error("optimizer.params.nesterov", message, '"momentum": 0.9')


@rule("deepspeed/runtime/zero/stage3.py", "Muon and reduce scatter cannot be used together", "Muon at stage 3")
def muon_at_stage_3(c):
    """Muon orthogonalises whole matrices of gradients, which reduce_scatter cuts."""
    if Chosen(c).backend == "Muon" and c.stage == 3 and not c.stage_unknown and c.zero.get("reduce_scatter", True):
        message = "Muon at stage 3 does not go with reduce_scatter, which is on by default: ValueError."
        yield c.error("optimizer.type", message, 'Add "reduce_scatter": false to zero_optimization.')


@rule(ENGINE, "if self.optimizer_name() == LAMB_OPTIMIZER:", "Lamb with a static scale")
def lamb_and_static_scale(c):
    """Lamb's trust ratios need an unscaled norm."""
    scale = c.get("fp16.loss_scale", 0)
    if is_number(scale) and scale > 0 and Chosen(c).lower == "lamb":
        yield c.error("fp16.loss_scale", "Lamb requires dynamic loss scaling: DeepSpeed raises.", "0")
