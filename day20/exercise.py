"""Day 20, your turn: the hierarchical all-reduce for hosts of different sizes, within a budget for the slow link.

Fill in the two TODOs, then check yourself (one process, no network, no root):

    python day20/exercise.py

It runs all ranks as threads, counts what each sends to ranks of other hosts, and says what is wrong, or "solved".
The answers are in solution.py. Source: day20/notes.md.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from common.errors import UserError, clear_errors
from day20.patterns import ring_all_gather, ring_reduce_scatter  # noqa: F401 - your tools
from day20.rehearse import ThreadWire, left_host, rehearse

PLACEMENTS = ["AABB", "ABAB", "AAB", "ABBBCC", "ABCABC", "AAAABB"]
NUMEL = 840  # divides by every number of ranks above


def shared_ranks(placement: str) -> list[list[int]]:
    """Return for each host the ranks that take a piece across the slow link: as many as the smallest host has.

    "AAB" -> [[0], [2]]; "ABBBCC" -> [[0], [1], [4]]; "ABAB" -> [[0, 2], [1, 3]].
    """
    # TODO 1: the ranks of each host, in the order of the hosts' names, cut to the length of the shortest list.
    # 对每台主机，返回把数据送过慢链路的那些 rank：个数等于最小的那台主机的 rank 数。即每台主机的 rank，按主机名排序，
    # 截到最短列表的长度。
    raise NotImplementedError


def hierarchical_all_reduce(wire: ThreadWire, tensor: torch.Tensor, placement: str) -> None:
    """Make `tensor` (1-D) the sum over all ranks, in place, on every rank. wire.rank is this rank, wire.ranks is n.

    With k hosts, a host may send 2(k - 1)/k tensors over the slow link, and each of its shared ranks an equal part.
    """
    # TODO 2: sum up within the host, where bytes are cheap; cut the tensor into as many pieces as there are shared
    # ranks a host, and let the first of each host all-reduce the first piece among themselves, the second the second;
    # hand the pieces to all ranks of the host. wire.exchange(piece, to, into, source) sends and receives at once.
    # 在每个 rank 上就地把 tensor（一维）变成所有 rank 之和；wire.rank 是本 rank，wire.ranks 是 n。k 台主机时，一台主
    # 机经慢链路最多发送 2(k - 1)/k 个张量，由分担的 rank 平分。先在主机内求和，那里字节便宜；把张量切成与每台主机分担
    # 的 rank 数一样多的份，各主机的第一个之间 all-reduce 第一份，第二个之间第二份；再把各份交给主机内的所有 rank。
    # wire.exchange(piece, to, into, source) 同时收发。
    raise NotImplementedError


def check(shared_ranks, hierarchical_all_reduce) -> None:
    """Rehearse it on each placement; UserError says which sum is wrong, or which budget was not kept."""
    for placement in PLACEMENTS:
        ranks, hosts = len(placement), sorted(set(placement))
        smallest = min(placement.count(host) for host in hosts)
        want = [[r for r in range(ranks) if placement[r] == host][:smallest] for host in hosts]
        if (got := shared_ranks(placement)) != want:
            raise UserError(f"not yet: shared_ranks({placement!r}) is {got}, not {want}.")
        try:
            sums, sent = rehearse(hierarchical_all_reduce, placement, NUMEL)
        except UserError as error:
            raise UserError(f"not yet: on {placement}, {error}.") from error
        right = torch.arange(1, NUMEL + 1, dtype=torch.float64) * (ranks * (ranks + 1) // 2)
        for rank, found in enumerate(sums):
            if wrong := int((found != right).sum()):
                raise UserError(f"not yet: on {placement}, rank {rank} has {wrong} of {NUMEL} elements wrong.")
        budget = 2 * (len(hosts) - 1) * right.nbytes // len(hosts)
        for host, count in left_host(sent, placement).items():
            if count > budget:
                raise UserError(f"not yet: on {placement}, {count} bytes leave host {host}: the budget is {budget}.")
        for rank in range(ranks):
            mine = sum(n for (a, b), n in sent.items() if a == rank and placement[b] != placement[a])
            if mine > budget // smallest:
                share = f"its part is {budget // smallest}, as {smallest} ranks a host share the {budget}"
                raise UserError(
                    f"not yet: on {placement}, rank {rank} alone sends {mine} bytes to other hosts: {share}."
                )
    print(f"solved: {len(PLACEMENTS)} placements, each host within 2(k - 1)/k tensors over the slow link")


if __name__ == "__main__":
    with clear_errors():
        check(shared_ranks, hierarchical_all_reduce)
