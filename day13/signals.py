"""Day 13: what to log at each step, and the rules that see a sick run in it before the loss does. A module.

    watch = Watch(engine)                           # from day13.signals import Watch, first_signals
    watch.see(step, batch)                          # at each step
    before = watch.matrices()                       # at a step that is logged, before engine.step()
    row = watch.after_step(step, loss, batch, before)
    print(first_signals(rows))                  # {"update/weight ratio high": 3}

Each rule names a signal and reads rows alone, so it works on a recorded metrics.jsonl as well.
Checked with deepspeed 0.19.8. Source: A. Karpathy's ratio of updates to weights, https://cs231n.github.io/neural-networks-3/
"""

import math
from statistics import median

import torch
import torch.distributed as dist
from deepspeed import zero

from common.ranks import over_ranks
from common.run_log import peak_memory_gib
from day13.desync import compare, fingerprint, state

# Limits. Adam moves each weight by about the learning rate, so update/weight is rate / size of a weight, 0.02 here.
HIGH_UPDATE, SPIKE, LOSS_SPIKE, WINDOW = 0.1, 3.0, 0.5, 10


class Watch:
    """Collects a row a step. The copy of the weights is as large as the model."""

    def __init__(self, engine) -> None:
        self.engine, self.seen, self.again = engine, {}, None

    def see(self, step: int, batch: dict[str, torch.Tensor]) -> None:
        """Remember this rank's batch, and whether it was there before. Not collective."""
        mark = "".join(fingerprint(tensor) for tensor in batch.values())
        if self.again is None:
            self.again = self.seen.get(mark)
        self.seen.setdefault(mark, step)

    def matrices(self) -> dict[str, torch.Tensor]:
        """Copies of all weights with two dimensions or more, by name; gathered at ZeRO-3. Collective there."""
        named = [(name, weight) for name, weight in self.engine.module.named_parameters()]
        with zero.GatheredParameters([weight for _, weight in named]):
            return {name: weight.detach().float().clone() for name, weight in named if weight.dim() > 1}

    def after_step(self, step: int, loss: torch.Tensor, batch: dict, before: dict[str, torch.Tensor]) -> dict:
        """The row of this step: global values, and what the ranks disagree about. Collective."""
        engine = self.engine
        ratios = {n: float((w - before[n]).norm() / before[n].norm()) for n, w in self.matrices().items()}
        least = min(ratios, key=ratios.get)
        norm, scaler = engine.get_global_grad_norm(), getattr(engine.optimizer, "loss_scaler", None)
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, state(engine, batch) | {"again": self.again})
        again = [one.pop("again") for one in states]
        self.again = None
        return {
            "step": step,
            "loss": over_ranks(float(loss.detach()), engine.device),
            "grad_norm": float(norm) if norm is not None and math.isfinite(norm) else None,
            "update_ratio": median(ratios.values()),
            "least_ratio": ratios[least],
            "least_moved": least,
            "loss_scale": getattr(scaler, "cur_scale", None),
            "skipped": engine.skipped_steps,
            "lr": engine.get_lr()[0],
            "memory_gib": over_ranks(peak_memory_gib(engine.device), engine.device, "max"),
            "batch_seen_at": min((at for at in again if at is not None), default=None),
            "disagreements": compare(states),
        }


def first_signals(rows: list[dict]) -> dict[str, int]:
    """{signal: first step that shows it}, earliest first; {} for a healthy run."""
    found: dict[str, int] = {}
    for at, row in enumerate(rows):
        before = rows[max(0, at - WINDOW) : at]
        losses = [r["loss"] for r in before if math.isfinite(r["loss"])]
        norms = [r["grad_norm"] for r in before if r["grad_norm"]]
        moves = row["lr"] > 0 and row["skipped"] == (before[-1]["skipped"] if before else 0)
        signals = {
            "loss is not finite": not math.isfinite(row["loss"]),
            "ranks disagree": bool(row["disagreements"]),
            "batch read before": row["batch_seen_at"] is not None,
            "step skipped": row["skipped"] > (before[-1]["skipped"] if before else 0),
            "a weight does not move": moves and row["update_ratio"] > 0 and row["least_ratio"] == 0,
            "update/weight ratio high": row["update_ratio"] > HIGH_UPDATE,
            "gradient norm jumps": len(norms) >= 5 and (row["grad_norm"] or 0) > SPIKE * median(norms),
            "loss jumps": len(losses) >= 5 and row["loss"] > median(losses) + LOSS_SPIKE,
        }
        found |= {signal: row["step"] for signal, shows in signals.items() if shows and signal not in found}
    return found


def apart_from(rows: list[dict], healthy: list[dict], by: float = 0.3, smooth: int = 5) -> int | None:
    """The first step at which the loss curve, a mean of `smooth` steps, is `by` nats above or below a healthy one's."""
    for at in range(smooth, len(rows) + 1):
        one, other = (sum(r["loss"] for r in run[at - smooth : at]) / smooth for run in (rows, healthy))
        if not abs(one - other) < by:  # nan is apart
            return rows[at - 1]["step"]
    return None
