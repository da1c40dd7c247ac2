"""What DeepSpeed really does with a config: it is trained on one CPU rank and compared with plain PyTorch.

    from config.truth import prepare, truth
    prepare(); print(truth(config))

Nothing is compiled: the kernels of DeepSpeed's own optimizers are played by the Python of Kernels, which computes the
same. (What a GPU alone can do is refused here as it is on any CPU.)
Source: deepspeed 0.19.8, ops/adam, ops/lion, ops/adagrad, ops/lamb.
"""

import importlib
import json
import math
import os
import signal
from pathlib import Path

import deepspeed
import torch
import torch._dynamo
from deepspeed.runtime import torch_autocast

STEPS = 6
SECONDS = 30  # for one config; a tenth of a second is usual
TOLERANCE = {
    "fp32": 0.1,
    "low": 0.25,
    "signs": 0.6,
}  # of the distance that the weights have gone; bf16 keeps 8 bits of them
LOW = ("fp16", "bf16")
ROUNDED = 0.004  # of the weights themselves: what bf16 may round away on a short way
CORRECTED = (
    "Adam",
    "AdamW",
    "FusedAdam",
    "NAdam",
    "RAdam",
    "Adamax",
    "FusedLamb",
    "MuonWithAuxAdam",
    "Adafactor",
)  # use a power of the count


class Kernels:
    """DeepSpeed's compiled optimizers in PyTorch."""

    def __init__(self):
        self.decoupled = {}

    def create_adam(self, number, lr, beta1, beta2, eps, decay, adamw, log):
        self.decoupled[number] = adamw

    def adam_update(self, number, step, lr, beta1, beta2, eps, decay, correct, param, grad, first, second):
        self.adam(param, grad, first, second, lr, beta1, beta2, eps, step, self.decoupled[number], correct, decay)

    def multi_tensor_adam(self, chunk, flag, lists, lr, beta1, beta2, eps, step, decoupled, correct, decay):
        for grad, param, first, second in zip(*lists, strict=True):
            self.adam(param, grad, first, second, lr, beta1, beta2, eps, step, decoupled, correct, decay)

    @torch.no_grad()
    def adam(self, param, grad, first, second, lr, beta1, beta2, eps, step, decoupled, correct, decay):
        grad = grad.float() + (0.0 if decoupled else decay) * param.float()
        first.mul_(beta1).add_((1 - beta1) * grad.to(first.dtype))
        second.mul_(beta2).add_((1 - beta2) * (grad * grad).to(second.dtype))
        bias1, bias2 = (1 - beta1**step, 1 - beta2**step) if correct else (1, 1)
        update = (first.float() / bias1) / ((second.float() / bias2).sqrt() + eps)
        param.copy_(param.float() * (1 - lr * decay * bool(decoupled)) - lr * update)

    def create_lion(self, *_):
        pass

    def lion_update(self, number, step, lr, beta1, beta2, decay, param, grad, first):
        self.lion(param, grad, first, lr, beta1, beta2, decay)

    def multi_tensor_lion(self, chunk, flag, lists, lr, beta1, beta2, step, decay):
        for grad, param, first in zip(*lists, strict=True):
            self.lion(param, grad, first, lr, beta1, beta2, decay)

    @torch.no_grad()
    def lion(self, param, grad, first, lr, beta1, beta2, decay):
        grad = grad.to(first.dtype)
        update = (beta1 * first + (1 - beta1) * grad).sign().float()
        param.copy_(param.float() * (1 - lr * decay) - lr * update)
        first.mul_(beta2).add_((1 - beta2) * grad)

    def create_adagrad(self, *_):
        pass

    @torch.no_grad()
    def adagrad_update(self, number, step, lr, eps, decay, param, grad, second):
        grad = grad.float() + decay * param.float()
        second.add_((grad * grad).to(second.dtype))
        param.copy_(param.float() - lr * grad / (second.float().sqrt() + eps))

    def lamb(self, param, out, first, second, grad, lr, beta1, beta2, *rest):
        self.adam(param, grad, first, second, lr, beta1, beta2, 1e-8, rest[4], True, True, 0.0)
        return torch.ones(1)

    def destroy_adam(self, number):
        pass

    destroy_lion = destroy_adagrad = destroy_adam


def too_long(*_):
    raise TimeoutError(f"longer than {SECONDS} s")


def prepare() -> None:
    """One gloo rank, kernels that need no compiler, and an end to what hangs."""
    signal.signal(signal.SIGALRM, too_long)
    torch._dynamo.config.disable = True  # Muon would be compiled for half a minute
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.update(CROSS_RANK="0", CROSS_SIZE="1")  # as the launcher sets them
    os.environ.setdefault("MASTER_PORT", "29655")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # a GPU's user is meant
    kernels = Kernels()
    played = type("Played", (), {"load": lambda self, verbose=True: kernels})
    for module, builder in (("adam.fused_adam", "FusedAdamBuilder"), ("adam.cpu_adam", "CPUAdamBuilder"),
                            ("adam.zenflow_cpu_adam", "CPUAdamBuilder"), ("lion.fused_lion", "FusedLionBuilder"),
                            ("lion.cpu_lion", "CPULionBuilder"), ("lamb.fused_lamb", "FusedLambBuilder"),
                            ("adagrad.cpu_adagrad", "CPUAdagradBuilder")):  # fmt: skip
        setattr(importlib.import_module(f"deepspeed.ops.{module}"), builder, played)
    deepspeed.init_distributed("gloo")


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))


def batch(step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 8, generator=generator), 3 * torch.randn(size, 8, generator=generator)


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.float() - target).pow(2).mean()


def gradient(micro: int, steps: int) -> float:
    """The norm of the first micro-batch's gradient."""
    net = model()
    inputs, target = batch(0, micro)
    (loss_of(net(inputs), target) / steps).backward()
    return float(vector(p.grad for p in net.parameters()).norm())


def vector(parameters) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in parameters])


def truth(config: dict, folder: Path) -> dict:
    """{"error": ..., "when": "initialize" or "step"}, or {"off": [what is otherwise than written, ...]}."""
    path = folder / "ds_config.json"
    path.write_text(json.dumps(config))
    net, engine, when = model(), None, "initialize"
    start = vector(net.parameters())
    signal.alarm(SECONDS)
    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None  # of the last engine
    try:
        given = {} if config.get("optimizer") else {"optimizer": torch.optim.AdamW(net.parameters(), lr=0.01)}
        engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=str(path), **given)
        when, first, scale = "step", 0.0, float(engine._get_optimizer_loss_scale() or 1)
        micro, steps = int(engine.train_micro_batch_size_per_gpu()), max(1, int(engine.gradient_accumulation_steps()))
        for step in range(STEPS * steps):
            inputs, target = batch(step, micro)
            inputs = inputs.to(next(net.parameters()).dtype)
            engine.backward(loss_of(engine(inputs), target))
            first = (
                first or sum(float(p.grad.float().norm()) ** 2 for p in net.parameters() if p.grad is not None) ** 0.5
            )
            engine.step()
        with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=engine.zero_optimization_stage() == 3):
            reached = vector(net.parameters())
    except (Exception, SystemExit) as error:
        return {"when": when, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    else:
        off = differences(config, engine, start, reached, micro, steps)
        if (
            engine.fp16_enabled()
            and engine.zero_optimization_stage() == 0
            and first < 0.5 * scale * gradient(micro, steps)
        ):
            off.append(f"gradients: the loss is not scaled, and the step divides them by {scale}")
        return {"off": off}
    finally:
        signal.alarm(0)
        if engine is not None:
            engine.destroy()


def differences(config, engine, start, reached, micro, steps) -> list[str]:
    """What the engine, and the weights that it reached, say about keys that were written."""
    zero = config.get("zero_optimization", {})
    off = []
    for name, want, got in (
        ("stage", zero.get("stage", 0), engine.zero_optimization_stage()),
        ("clipping", config.get("gradient_clipping", 1.0), engine.gradient_clipping()),
        ("micro-batch", config.get("train_micro_batch_size_per_gpu", micro), micro),
        ("accumulation", config.get("gradient_accumulation_steps", steps), steps),
        ("offload_optimizer", offloads(zero, "optimizer"), bool(getattr(engine.optimizer, "cpu_offload", False)
         or getattr(engine.optimizer, "offload_optimizer", False))),
        ("offload_param", offloads(zero, "param"), bool(getattr(engine.optimizer, "offload_param", False))),
        ("scheduler", (config.get("scheduler") or {}).get("type"), type(engine.lr_scheduler).__name__
         if engine.lr_scheduler else None),
    ):  # fmt: skip
        if want != got:
            off.append(f"{name}: {got}, not {want}")
    if not torch.isfinite(reached).all():
        return [*off, "weights: not finite"]
    off += of_the_optimizer(config, engine, steps)
    wanted, norm = (None, None) if engine.skipped_steps else reference(config, micro, steps)
    got = engine.get_global_grad_norm()
    if wanted is None:
        if torch.equal(reached, start) and not engine.skipped_steps:
            off.append("weights: where they began")
        if got is not None and float(got) > 1000 * gradient(micro, steps):
            off.append(f"gradients: their norm is {float(got):.3g}, with the loss scale in it")
        return off
    if got is not None and norm and not 0.5 < float(got) / norm < 2:
        off.append(f"gradients: their norm is {float(got):.3g}, not {norm:.3g}")
    low = any((config.get(name) or {}).get("enabled") for name in (*LOW, "torch_autocast"))
    distance, way = float((reached - wanted).norm()), float((wanted - start).norm())
    signs = (config.get("optimizer") or {}).get("type") == "Lion"  # a rounded gradient may turn a whole step
    allowed = TOLERANCE["signs" if low and signs else "low" if low else "fp32"]
    if distance > allowed * way + ROUNDED * low * float(wanted.norm()):
        off.append(f"weights: {distance / max(way, 1e-9):.3f} of their way off")
    return off


def of_the_optimizer(config, engine, steps) -> list[str]:
    """What its state and its schedule say."""
    off = []
    states = [int(s["step"]) for s in getattr(engine.basic_optimizer, "state", {}).values() if "step" in s]
    updates = STEPS * (1 if config.get("managed_gradient_accumulation", True) else steps) - engine.skipped_steps
    zenflow = config.get("zero_optimization", {}).get("zenflow")
    counts = type(engine.basic_optimizer).__name__ in CORRECTED and engine.zero_optimization_stage() == 0
    counts = counts and (config.get("torch_autocast") or {}).get("dtype") != "float16"
    if counts and states and max(states) != updates and not zenflow:  # FusedAdam counts in the last state alone
        off.append(f"optimizer: counts {max(states)} steps, not {updates}")
    if (config.get("torch_autocast") or {}).get("enabled") and next(engine.module.parameters()).dtype != torch.float32:
        off.append("torch_autocast: the weights are cast, and nothing is left for it")
    kept = getattr(engine.basic_optimizer, "state", {}).values()
    if type(engine.basic_optimizer).__name__ == "Adafactor" and not any("row_var" in state for state in kept):
        off.append("optimizer: keeps whole second moments of the matrices")
    schedule, lr = config.get("scheduler") or {}, ((config.get("optimizer") or {}).get("params") or {}).get("lr", 0.01)
    if schedule.get("type") == "WarmupDecayLR" and engine.lr_scheduler.max_lrs[0] != schedule["params"].get(
        "warmup_max_lr", lr
    ):
        off.append(f"scheduler: climbs to {engine.lr_scheduler.max_lrs[0]}, not to {lr}")
    if schedule.get("type") == "ReduceLROnPlateau":
        off.append(f"scheduler: its metric is {engine.lr_scheduler.best}")
    return off


def offloads(zero, what) -> bool:
    section = zero.get(f"offload_{what}") or {}
    old = {"optimizer": "cpu_offload", "param": "cpu_offload_param"}[what]
    return section.get("device", "cpu" if zero.get(old) else "none") != "none"


def reference(config, micro, steps) -> tuple[torch.Tensor | None, float]:
    """The weights that plain PyTorch reaches with what is written, and the last norm of its gradients.

    None where PyTorch has no such optimizer, or nothing to hand to its schedule.
    """
    net = model()
    optimizer = plain_optimizer(config, net)
    plateau = (config.get("scheduler") or {}).get("type") == "ReduceLROnPlateau"
    masters = any((config.get(name) or {}).get(f"{name}_master_weights_and_grads") for name in LOW)  # 8 bits of them
    autocast = config.get("torch_autocast") or {}
    stage = config.get("zero_optimization", {}).get("stage", 0)
    skips = autocast.get("enabled") and autocast.get("dtype") == "float16" and not stage  # GradScaler's: uncounted
    if optimizer is None or plateau or masters or skips or config.get("managed_gradient_accumulation") is False:
        return None, 0.0
    scheduler = plain_scheduler(config.get("scheduler"), optimizer)
    clip = config.get("gradient_clipping", 1.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(steps):
            inputs, target = batch(step * steps + part, micro)
            (loss_of(net(inputs), target) / steps).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), clip if clip > 0 else math.inf))
        optimizer.step()
        if scheduler:
            scheduler.step()
    return vector(net.parameters()), norm


def plain_scheduler(section, optimizer):
    from deepspeed.runtime import lr_schedules  # their definition is what the words mean

    if not section:
        return None
    kind = getattr(lr_schedules, section["type"], None) or getattr(torch.optim.lr_scheduler, section["type"])
    return kind(optimizer, **section["params"])


def plain_optimizer(config, net):
    section = config.get("optimizer") or {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01}}
    kind, params = section["type"], dict(section["params"])
    offload = offloads(config.get("zero_optimization", {}), "optimizer")
    if kind in ("Adam", "AdamW"):
        own = not params.pop("torch_adam", False)
        decoupled = params.pop("adam_w_mode", True) or kind == "AdamW"
        for name in ("bias_correction", "fp32_optimizer_states"):
            params.pop(name, None)
        if own:
            params.setdefault("weight_decay", 0.0)
        return (torch.optim.AdamW if decoupled else torch.optim.Adam)(net.parameters(), **params)
    if kind == "Lion" or (kind == "Adagrad" and offload):
        return (
            PlainLion(net.parameters(), **params) if kind == "Lion" else torch.optim.Adagrad(net.parameters(), **params)
        )
    if kind in ("Lamb", "Muon", "LBFGS"):  # PyTorch has no such, and LBFGS wants a closure: the engine gives none
        return None
    return getattr(torch.optim, kind)(net.parameters(), **params)


class PlainLion(torch.optim.Optimizer):
    """Chen et al., 2023, algorithm 2."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0):  # DeepSpeed's defaults
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                first = self.state[p].setdefault("first", torch.zeros_like(p))
                update = (beta1 * first + (1 - beta1) * p.grad).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                first.mul_(beta2).add_((1 - beta2) * p.grad)
