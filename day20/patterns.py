"""Day 20: patterns - the all-reduce written from send and receive: ring, tree, recursive halving, hierarchical.

    from day20.patterns import PATTERNS, Wire, leaving_host

    PATTERNS["hierarchical"](Wire(), tensor, "AABB")     # in place, on every rank; ranks 0 and 1 are on host A

A pattern takes this rank's end of the wire, a contiguous tensor, and the placement: a letter for each rank's host.
Source: Thakur, Rabenseifner and Gropp 2005, doi:10.1177/1094342005051521 (ring, tree, halving and doubling);
Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002 (the ring sends the least possible).
"""

from collections import Counter

import torch
import torch.distributed as dist

from common.errors import UserError


class Wire:
    """A rank's end of the wire, over torch.distributed; counts the bytes that it sends to each other rank."""

    def __init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.sent_bytes: Counter[int] = Counter()  # {receiver: bytes}

    def exchange(
        self,
        piece: torch.Tensor | None = None,
        to: int | None = None,
        into: torch.Tensor | None = None,
        source: int | None = None,
    ) -> None:
        """Send `piece` to rank `to` and, meanwhile, receive into `into` from rank `source`; either pair may be missing.

        Blocks until both are done. Rank `to` has to receive from this rank at the same point of its pattern.
        """
        calls = [dist.P2POp(dist.isend, piece, to)] if to is not None else []
        calls += [dist.P2POp(dist.irecv, into, source)] if source is not None else []
        for work in dist.batch_isend_irecv(calls):  # both at once: the wire goes both ways
            work.wait()
        if to is not None:
            self.sent_bytes[to] += piece.nbytes


def ring_reduce_scatter(wire: Wire, tensor: torch.Tensor, members: list[int]) -> torch.Tensor:
    """Add up `tensor` over `members` (ranks in the ring's order); return the piece of it that is complete on this rank.

    n - 1 steps; in each, every member sends one of n pieces to its right and adds the one that comes from its left.
    """
    pieces, me = tensor.tensor_split(len(members)), members.index(wire.rank)
    right, left = members[(me + 1) % len(members)], members[me - 1]
    for step in range(len(members) - 1):
        mine = pieces[(me - step - 1) % len(members)]
        incoming = torch.empty_like(mine)
        wire.exchange(pieces[(me - step) % len(members)], right, incoming, left)
        mine += incoming
    return pieces[(me + 1) % len(members)]


def ring_all_gather(wire: Wire, tensor: torch.Tensor, members: list[int]) -> None:
    """Pass round what `ring_reduce_scatter` completed, n - 1 steps, until each member has all n pieces of `tensor`."""
    pieces, me = tensor.tensor_split(len(members)), members.index(wire.rank)
    right, left = members[(me + 1) % len(members)], members[me - 1]
    for step in range(len(members) - 1):
        wire.exchange(pieces[(me + 1 - step) % len(members)], right, pieces[(me - step) % len(members)], left)


def ring_all_reduce(wire: Wire, tensor: torch.Tensor, placement: str) -> None:
    """2(n - 1) steps, 2(n - 1)/n of the tensor sent by each rank: the fewest bytes, the most steps."""
    members = list(range(wire.ranks))  # by rank, wherever each one is: flat
    ring_reduce_scatter(wire, tensor, members)
    ring_all_gather(wire, tensor, members)


def tree_all_reduce(wire: Wire, tensor: torch.Tensor, placement: str) -> None:
    """A binomial tree: up to rank 0, adding, and down again. 2 log2(n) steps, each of the whole tensor."""
    distances = [2**k for k in range((wire.ranks - 1).bit_length())]  # 1, 2, 4 ...
    for distance in distances:
        if wire.rank % (2 * distance) == distance:
            wire.exchange(piece=tensor, to=wire.rank - distance)
        elif wire.rank % (2 * distance) == 0 and wire.rank + distance < wire.ranks:
            incoming = torch.empty_like(tensor)
            wire.exchange(into=incoming, source=wire.rank + distance)
            tensor += incoming
    for distance in reversed(distances):
        if wire.rank % (2 * distance) == 0 and wire.rank + distance < wire.ranks:
            wire.exchange(piece=tensor, to=wire.rank + distance)
        elif wire.rank % (2 * distance) == distance:
            wire.exchange(into=tensor, source=wire.rank - distance)


def halving_all_reduce(wire: Wire, tensor: torch.Tensor, placement: str) -> None:
    """Recursive halving, then doubling: as few steps as the tree, as few bytes as the ring; n must be a power of two.

    With the rank n/2 away a half is exchanged, with the one n/4 away a quarter, ...; and all of it back.
    """
    if wire.ranks & (wire.ranks - 1):
        raise UserError(f"recursive halving pairs ranks up: {wire.ranks} is no power of two; take the ring")
    part, path, distance = tensor, [], wire.ranks // 2
    while distance:
        halves, upper = part.tensor_split(2), bool(wire.rank & distance)
        kept, given = halves[upper], halves[not upper]
        incoming = torch.empty_like(kept)
        wire.exchange(given, wire.rank ^ distance, incoming, wire.rank ^ distance)
        kept += incoming
        path.append((kept, given, distance))
        part, distance = kept, distance // 2
    for kept, given, distance in reversed(path):
        wire.exchange(kept, wire.rank ^ distance, given, wire.rank ^ distance)


def hosts_of(placement: str) -> list[list[int]]:
    """The ranks of each host: "ABAB" -> [[0, 2], [1, 3]]. Raises UserError unless each host has as many."""
    hosts = [[rank for rank, host in enumerate(placement) if host == name] for name in sorted(set(placement))]
    if len({len(ranks) for ranks in hosts}) != 1:
        raise UserError(f"placement {placement!r}: each host needs the same number of ranks")
    return hosts


def hierarchical_all_reduce(wire: Wire, tensor: torch.Tensor, placement: str) -> None:
    """Reduce-scatter within the host, all-reduce of this rank's piece across hosts, all-gather within the host.

    The slow link between hosts carries each piece once a direction and ring step, not once for each of a host's ranks.
    """
    hosts = hosts_of(placement)
    (mine,) = [ranks for ranks in hosts if wire.rank in ranks]
    peers = [ranks[mine.index(wire.rank)] for ranks in hosts]  # one of each host: those that hold the same piece
    piece = ring_reduce_scatter(wire, tensor, mine)
    ring_reduce_scatter(wire, piece, peers)
    ring_all_gather(wire, piece, peers)
    ring_all_gather(wire, tensor, mine)


PATTERNS = {
    "ring": ring_all_reduce,
    "tree": tree_all_reduce,
    "halving": halving_all_reduce,
    "hierarchical": hierarchical_all_reduce,
}


def leaving_host(pattern: str, placement: str) -> float:
    """Bytes that leave the first host in one all-reduce, divided by the tensor's bytes: what the formulas say."""
    ranks, hosts = len(placement), hosts_of(placement)
    first = hosts[0]
    if pattern == "hierarchical":
        return 2 * (len(hosts) - 1) / len(hosts)
    if pattern == "ring":  # 2(n - 1)/n for each rank whose right neighbour is elsewhere
        return sum((rank + 1) % ranks not in first for rank in first) * 2 * (ranks - 1) / ranks
    if pattern == "tree":  # each edge carries the whole tensor once up and once down
        parents = {rank: rank & (rank - 1) for rank in range(1, ranks)}  # its number without the lowest 1 bit
        return float(sum((rank in first) != (parent in first) for rank, parent in parents.items()))
    if pattern == "halving":  # with the rank d away a piece of d/n, once in each half of the pattern
        distances = [2**k for k in range(ranks.bit_length() - 1)]
        return sum(2 * d / ranks for rank in first for d in distances if rank ^ d not in first)
    raise ValueError(f"no formula for {pattern!r}: there are {', '.join(PATTERNS)}")


def steps_of(pattern: str, placement: str) -> int:
    """Messages one after the other: what latency is paid for, whatever the size."""
    ranks, hosts = len(placement), hosts_of(placement)
    log = (ranks - 1).bit_length()
    flat = {"ring": 2 * (ranks - 1), "tree": 2 * log, "halving": 2 * log}
    return flat.get(pattern, 2 * (len(hosts[0]) - 1) + 2 * (len(hosts) - 1))
