"""Day 23: dpo - direct preference optimisation: its loss, the reference for free, and what it does to held-out pairs.

    from day23.dpo import dpo_loss, reference_logps, sequence_logps     # day23/dpo.py, with day23/pairs.py

Checked with deepspeed 0.19.8, peft 0.21.2 and trl 1.16.0. Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290
"""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import PeftModel
from torch.nn import functional as F

from bench.results import this_command, write_results
from common.data import to_device
from common.plots import save_plot
from common.ranks import over_ranks
from day22.chat_data import NO_LOSS, Item
from day23.pairs import Pair, collate_pairs

LOOKED_AT = ("loss", "chosen", "rejected", "margin", "accuracy", "prefers", "reference_prefers")  # of held-out pairs


def sequence_logps(model: torch.nn.Module, batch: Item) -> torch.Tensor:
    """log p(answer | prompt) of each row, (2 B,): the sum over the answer's tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]  # the logits at a token are about the next one
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LOSS, reduction="none")
    return -losses.view(labels.shape).sum(dim=1)


@torch.no_grad()
def reference_logps(model: PeftModel, batch: Item) -> torch.Tensor:
    """The same by the model as it was: its adapter switched off. No second copy of the weights, at any ZeRO stage."""
    with model.disable_adapter():
        return sequence_logps(model, batch)


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss and the implicit rewards (2, B), chosen and rejected, of two `sequence_logps`."""
    rewards = beta * (policy - reference).view(2, -1)  # rows: first all chosen, then all rejected
    margins = rewards[0] - rewards[1]
    return -F.logsigmoid(margins).mean(), rewards.detach()


def describe(rewards: torch.Tensor) -> dict[str, float]:
    """What is logged of rewards (2, B): their means, the margin, and the share of pairs told apart."""
    margins = rewards[0] - rewards[1]
    means = {"chosen": rewards[0].mean(), "rejected": rewards[1].mean(), "margin": margins.mean()}
    return {name: value.item() for name, value in means.items()} | {"accuracy": (margins > 0).float().mean().item()}


@torch.no_grad()
def held_out_rewards(
    model: PeftModel, pairs: list[Pair], pad_token_id: int, beta: float, device: torch.device,
    references: list[torch.Tensor], micro_batch: int = 8,
) -> dict[str, float]:  # fmt: skip
    """Loss, rewards, margin and accuracy over `pairs`; and `prefers`, `reference_prefers`: how often the chosen answer
    has the higher probability, without a reference. The first call fills `references`, which stay as they are.
    Collective: every rank runs the same number of batches.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    pairs = sorted(pairs, key=lambda pair: len(pair["chosen"]["input_ids"]))
    mine = (pairs + pairs[:1] * (-len(pairs) % ranks))[rank::ranks]
    counts = len(range(rank, len(pairs), ranks))  # of these: the last may be there to keep step
    model.eval()
    policy, is_first = [], not references
    for start in range(0, len(mine), micro_batch):
        batch = to_device(collate_pairs(mine[start : start + micro_batch], pad_token_id), device)
        if is_first:
            references.append(reference_logps(model, batch).view(2, -1))
        policy.append(sequence_logps(model, batch).view(2, -1))
    model.train()
    policy, reference = (torch.cat(parts, dim=1)[:, :counts] for parts in (policy, references))
    rewards = beta * (policy - reference)
    margins = rewards[0] - rewards[1]
    sums = {"loss": -F.logsigmoid(margins), "chosen": rewards[0], "rejected": rewards[1], "margin": margins}
    sums |= {"accuracy": margins > 0, "prefers": policy[0] > policy[1]}
    sums |= {"reference_prefers": reference[0] > reference[1]}
    return {name: over_ranks(float(sums[name].sum()), device, "sum") / len(pairs) for name in LOOKED_AT}


def report(rows: list[dict], folder: Path, title: str) -> None:
    """Of a run's metrics.jsonl: margin.png and accuracy.png, and what was held out as dpo.json. On one rank."""
    held_out = [row for row in rows if "held_out_margin" in row]
    names = {"step": "step"} | {f"held_out_{name}": name for name in LOOKED_AT}
    table = [{name: row[key] for key, name in names.items()} for row in held_out]
    write_results(folder / "dpo.json", this_command(), table=table)
    for name, unit in (("margin", "margin of the implicit rewards"), ("accuracy", "share of pairs told apart")):
        figure, axes = plt.subplots(figsize=(7, 4))
        for key, label, style in ((name, "training batch", "-"), (f"held_out_{name}", "held-out pairs", "o")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points, strict=True), style, label=label)
        axes.set(xlabel="optimizer step", ylabel=unit, title=title)
        save_plot(figure, axes, folder / f"{name}.png")
