"""Day 20, the answers. Run it like the exercise: python day20/solution.py. Source: day20/notes.md."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day20.exercise import check, clear_errors
from day20.patterns import ring_all_gather, ring_reduce_scatter
from day20.rehearse import ThreadWire


def shared_ranks(placement: str) -> list[list[int]]:
    hosts = [[rank for rank, host in enumerate(placement) if host == name] for name in sorted(set(placement))]
    return [ranks[: min(map(len, hosts))] for ranks in hosts]


def hierarchical_all_reduce(wire: ThreadWire, tensor: torch.Tensor, placement: str) -> None:
    mine = [rank for rank in range(wire.ranks) if placement[rank] == placement[wire.rank]]
    ring_reduce_scatter(wire, tensor, mine)
    ring_all_gather(wire, tensor, mine)

    shared, place = shared_ranks(placement), mine.index(wire.rank)
    pieces = tensor.tensor_split(len(shared[0]))
    if place < len(pieces):
        peers = [ranks[place] for ranks in shared]
        ring_reduce_scatter(wire, pieces[place], peers)
        ring_all_gather(wire, pieces[place], peers)

    for owner, piece in zip(mine, pieces, strict=False):  # within the host: whoever has a piece gives it to the others
        for other in mine:
            if wire.rank == owner != other:
                wire.exchange(piece=piece, to=other)
            elif wire.rank == other != owner:
                wire.exchange(into=piece, source=owner)


if __name__ == "__main__":
    with clear_errors():
        check(shared_ranks, hierarchical_all_reduce)
