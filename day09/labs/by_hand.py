"""Day 09: by_hand - one model cut by hand, between its layers and within them: equal, and what it sends and waits.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day09/labs/by_hand.py

Expect a row for each cut: how far loss and gradients are from the whole model's, messages, and the share of the step
in which each rank computes. Layers one after the other: one rank waits while the other works.
Source: arXiv:1909.08053, section 3; arXiv:1811.06965 (GPipe), figure 2b.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import time_step
from bench.traffic import count_traffic
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import over_ranks
from common.run_log import default_run_dir
from day09.gpt import GPT, cut_within, keep_stage, stage_step
from day09.messages import sent_bytes

COLUMNS = {
    "loss apart": "loss_apart:.1e", "grad apart": "gradient_apart:.1e", "forward": "forward_calls:d",
    "backward": "backward_calls:d", "sent MB": "sent_bytes:MB", "parameters": "parameters:s",
    "computing": "computing:s",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--heads", type=int, default=8, help="heads of attention; they need not divide by the ranks")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--vocab_size", type=int, default=1000, help="token ids")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (not micro-batches)")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day09"), help="folder for by_hand.json")
    return parser.parse_args()


def with_gradients_for_weights(model: GPT) -> GPT:
    """A copy whose weights are the gradients of `model`: cut alike, it says what each rank's gradients should be."""
    twin = copy.deepcopy(model)
    for there, here in zip(twin.parameters(), model.parameters(), strict=True):
        there.data = here.grad.clone()
    return twin


def gradients_apart(cut: GPT, expected: GPT) -> float:
    pairs = zip(cut.parameters(), expected.parameters(), strict=True)
    return max((p.grad - e).abs().max().item() for p, e in pairs if p.numel())


def make_step(cut: GPT, by_stages: bool, ids: torch.Tensor, hidden: int, spent: list[float]) -> Callable:
    """A forward and backward pass that returns the loss (None on a rank that has none)."""

    def work(function: Callable, *arguments):
        seconds, result = time_step(lambda: function(*arguments))
        spent.append(seconds)
        return result

    def step():
        cut.zero_grad()
        if by_stages:
            return stage_step(cut, ids, hidden, work)
        loss = cut(ids)
        loss.backward()
        return loss

    return step


def count_calls(cut: GPT, by_stages: bool, step: Callable, ids: torch.Tensor) -> dict:
    """Messages of one step. Between stages they are counted together: forward and backward are one conversation."""
    with count_traffic() as forward:
        loss = step() if by_stages else cut(ids)
    with count_traffic() as backward:
        if not by_stages:
            loss.backward()
    calls = [sum(sum(sizes.values()) for sizes in traffic.calls.values()) for traffic in (forward, backward)]
    sent = sum(sent_bytes(traffic.calls, dist.get_world_size()) for traffic in (forward, backward))
    messages = {"forward": forward.calls, "backward": backward.calls}
    return {"forward_calls": calls[0], "backward_calls": calls[1], "sent_bytes": sent, "messages": messages}


def main() -> None:
    args = parse_args()
    if args.layers < 2 or args.steps < 2 or args.hidden % args.heads:
        raise UserError("--layers and --steps start at 2, and --heads has to divide --hidden")
    device = join_world()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = GPT(args.vocab_size, args.tokens, args.hidden, args.heads, args.layers).to(device)
    ids = torch.randint(args.vocab_size, (args.batch, args.tokens), device=device)
    whole_loss = model(ids)
    whole_loss.backward()
    gradients = with_gradients_for_weights(model)
    table = Table(Path(args.run_dir) / "by_hand.json", COLUMNS, width=20, shape=vars(args))
    cuts = {"between layers": lambda m: keep_stage(m, rank, ranks), "within layers": lambda m: cut_within(m, None)}
    for case, cut_it in cuts.items():
        by_stages, spent = case == "between layers", []
        cut, expected = cut_it(copy.deepcopy(model)), cut_it(copy.deepcopy(gradients))
        step = make_step(cut, by_stages, ids, args.hidden, spent)
        loss = step()
        apart = abs(loss.item() - whole_loss.item()) if loss is not None else 0.0
        row = {"case": case, "loss_apart": over_ranks(apart, device, "max")}
        row["gradient_apart"] = over_ranks(gradients_apart(cut, expected), device, "max")
        row |= count_calls(cut, by_stages, step, ids)
        spent.clear()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(args.steps):
            step()
        dist.barrier()
        busy = sum(spent) / (time.perf_counter() - start) if by_stages else None
        found = [None] * ranks
        dist.all_gather_object(found, (sum(p.numel() for p in cut.parameters()), busy))
        row["parameters"] = " ".join(f"{count:,}" for count, _ in found)
        row["computing"] = " ".join(f"{share:.0%}" for _, share in found) if by_stages else "all at once"
        table.add(row)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
