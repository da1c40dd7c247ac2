"""Day 13: hunt NaN and inf - the first module that makes them, forwards or backwards. A module.

    from day13.nonfinite import watch_modules
    with watch_modules(engine.module) as found:
        engine.backward(engine(**batch).loss)
    print(found[:1])          # ["forward of transformer.h.1.mlp (GPT2MLP): inputs finite, output has 3 nan of 1,024"]

A look at each tensor makes the device wait: for hunting, not for training. At ZeRO-3 as well: outputs are whole there.
Checked with deepspeed 0.19.8. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html (hooks)
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


def tensors_in(value: object) -> list[torch.Tensor]:
    """All floating-point tensors of a module's inputs or outputs: tuples, lists, dictionaries of them."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, tuple | list) else []


def ill(tensors: list[torch.Tensor]) -> str | None:
    """ "3 nan of 1,024" of the first tensor that is not finite; None when all are."""
    for tensor in tensors:
        for name, test in (("nan", torch.isnan), ("inf", torch.isinf)):
            if count := int(test(tensor).sum()):
                return f"{count:,} {name} of {tensor.numel():,}"
    return None


@contextmanager
def watch_modules(model: torch.nn.Module) -> Iterator[list[str]]:
    """Yield a list that fills, in order of computing, with modules of finite inputs and outputs that are not.

    The first line is where to look. A parent of that module is named after it. "" is the model itself: what it computes
    outside of its layers, its loss say.
    """
    found: list[str] = []

    def look(name: str, module: torch.nn.Module, direction: str, before: object, after: object) -> None:
        sick, ill_before = ill(tensors_in(after)), ill(tensors_in(before))
        if direction == "backward" and ill_before and not found:
            kind = f"{name} ({type(module).__name__})"
            found.append(f"backward, between the output of {kind} and the loss: its gradient has {ill_before}")
        elif sick and not ill_before:
            weights = [w for w, tensor in module.named_parameters(recurse=False) if ill([tensor])]
            blame = f"its {weights[0]} is not finite" if weights else "inputs finite"
            kind = f"{name} ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"
            found.append(
                f"{direction} of {kind}: {blame}, {'output' if direction == 'forward' else 'gradient'} has {sick}"
            )

    with ExitStack() as hooks, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "For backward hooks to be called|Full backward hook is firing")
        for name, module in model.named_modules():
            forwards = module.register_forward_hook(
                lambda m, args, kwargs, out, name=name: look(name, m, "forward", (args, kwargs), out), with_kwargs=True
            )
            backwards = module.register_full_backward_hook(
                lambda m, into, out, name=name: look(name, m, "backward", out, into)
            )
            hooks.callback(forwards.remove)
            hooks.callback(backwards.remove)
        yield found
