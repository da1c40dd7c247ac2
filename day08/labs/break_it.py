"""Day 08: what must be equal on all ranks, and what must differ? Data parallelism by hand, right and wrong.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day08/labs/break_it.py

Expect a row for each case: different sequences that a step saw, the held-out loss at the end (mean over ranks), how far
apart the ranks' weights are, and the length of the first update in that of the right one. Then break_it.json.
Checked with torch 2.13.0. Source: day08/notes.md.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import join_world
from common.data import TokenBlocks, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks
from common.run_log import default_run_dir

LR = {"AdamW": 1e-3, "SGD": 0.5}
# case -> what differs from: own data, weights broadcast, gradients averaged, the same lr on all ranks, AdamW
CASES = {
    "right": {},
    "same data everywhere": {"own_data": False},
    "weights not broadcast": {"broadcast": False},
    "gradients not averaged": {"divide": None},
    "rank 0 has twice the lr": {"lr_of_rank_0": 2.0},
    "right, SGD": {"optimizer": "SGD"},
    "summed, SGD": {"optimizer": "SGD", "divide": False},
    "summed, AdamW": {"divide": False},
}
COLUMNS = {
    "sequences": "sequences:d",
    "held-out loss": "held_out_loss:.4f",
    "weights apart": "apart:.1e",
    "first update": "update:.2f",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (not micro-batches)")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences per rank and micro-batch")
    parser.add_argument("--block", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--run_dir", default=default_run_dir("day08"), help="folder for break_it.json")
    return parser.parse_args()


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(
    blocks: TokenBlocks,
    held_out: TokenBlocks,
    vocab_size: int,
    args: argparse.Namespace,
    device: torch.device,
    own_data: bool = True,
    broadcast: bool = True,
    divide: bool | None = True,  # False: summed. None: not even that
    lr_of_rank_0: float = 1.0,
    optimizer: str = "AdamW",
) -> dict:
    """Train a tiny GPT-2 by hand with one thing wrong, or none; return the row. Collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed + rank)
    model = build_model("tiny", vocab_size).to(device)
    for parameter in model.parameters() if broadcast else ():
        dist.broadcast(parameter.detach(), src=0)
    lr = LR[optimizer] * (lr_of_rank_0 if rank == 0 else 1.0)
    updating = getattr(torch.optim, optimizer)(model.parameters(), lr=lr)
    shard, shards = (rank, ranks) if own_data else (0, 1)
    before, update, seen = flat(model), None, []
    for step in range(args.steps):
        first = (step * shards + shard) * args.micro_batch
        seen = [(first + i) % len(blocks) for i in range(args.micro_batch)]
        ids = torch.stack([blocks[i]["input_ids"] for i in seen])
        loss = model(**to_device({"input_ids": ids, "labels": ids}, device)).loss
        loss.backward()
        for parameter in model.parameters() if divide is not None else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks if divide else 1
        updating.step()
        updating.zero_grad()
        update = update or (flat(model) - before).norm().item()
    everywhere = [None] * ranks
    dist.all_gather_object(everywhere, seen)
    first_rank = flat(model)
    dist.broadcast(first_rank, src=0)
    apart = over_ranks((flat(model) - first_rank).abs().max().item(), device, "max")
    row = {"sequences": len(set(sum(everywhere, []))), "held_out_loss": held_out_loss(model, held_out, device)}
    return row | {"apart": apart, "update": update, "optimizer": optimizer}


def main() -> None:
    args = parse_args()
    device = join_world()
    tokenizer = load_tokenizer(get_preset("tiny").tokenizer)
    blocks, held_out = load_corpus(args.corpus, tokenizer, args.block)
    table, right = Table(Path(args.run_dir) / "break_it.json", COLUMNS, width=26, ranks=dist.get_world_size()), {}
    for case, mistake in CASES.items():
        row = train(blocks, held_out, len(tokenizer), args, device, **mistake)
        row["update"] /= right.setdefault(row["optimizer"], row["update"])  # the first with it is the right one
        table.add({"case": case, **row})
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
