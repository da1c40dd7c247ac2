"""Day 20: rehearse - run all ranks of an all-reduce in one process, a thread each, and count every message.

    from day20.rehearse import rehearse

    sums, sent = rehearse(ring_all_reduce, "ABAB", 1000)     # sent[0, 1]: bytes from rank 0 to rank 1

No network and no root: what the placement says is another host counts as another host. A pattern that would hang on
real ranks ends with a sentence here. Source: day20/notes.md.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from queue import Empty, Queue

import torch

from common.errors import UserError

PATIENCE_S = 2.0  # a message between threads takes microseconds


class ThreadWire:
    """`day20.patterns.Wire` between threads: a queue for each pair of ranks, a counter for all."""

    def __init__(self, rank: int, ranks: int, queues: dict[tuple[int, int], Queue], sent: Counter) -> None:
        self.rank, self.ranks, self.queues, self.sent = rank, ranks, queues, sent

    def exchange(self, piece=None, to=None, into=None, source=None) -> None:
        if to is not None:
            self.queues[self.rank, to].put(piece.clone())
            self.sent[self.rank, to] += piece.nbytes
        if source is None:
            return
        try:
            message = self.queues[source, self.rank].get(timeout=PATIENCE_S)
        except Empty:
            raise UserError(f"rank {self.rank} waits for a message that rank {source} does not send") from None
        if message.shape != into.shape:
            sizes = f"{message.numel()} elements to rank {self.rank}, which expects {into.numel()}"
            raise UserError(f"rank {source} sends {sizes}")
        into.copy_(message)


def rehearse(pattern: Callable, placement: str, numel: int) -> tuple[list[torch.Tensor], Counter]:
    """Run `pattern` on a rank a letter; return each rank's tensor afterwards and {(sender, receiver): bytes}.

    Rank r starts with `numel` float64 values r + 1, 2(r + 1), ...: sums are exact. Raises the first error of a rank.
    """
    ranks = len(placement)
    made: defaultdict[tuple[int, int], Queue] = defaultdict(Queue)
    queues = {(a, b): made[a, b] for a in range(ranks) for b in range(ranks)}
    sent: Counter = Counter({(a, b): 0 for a in range(ranks) for b in range(ranks) if a != b})
    tensors = [torch.arange(1, numel + 1, dtype=torch.float64) * (rank + 1) for rank in range(ranks)]
    errors: dict[int, Exception] = {}

    def play(rank: int) -> None:
        try:
            pattern(ThreadWire(rank, ranks, queues, sent), tensors[rank], placement)
        except Exception as error:  # handed to the caller: a thread's own would only be printed
            errors[rank] = error

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:  # a rank that failed by itself before one that waited for it in vain
        raise min(errors.values(), key=lambda error: "waits for" in str(error))
    return tensors, sent


def left_host(sent: Counter, placement: str) -> dict[str, int]:
    """{host: bytes that its ranks sent to ranks of other hosts}."""
    left = dict.fromkeys(sorted(set(placement)), 0)
    for (sender, receiver), count in sent.items():
        if placement[sender] != placement[receiver]:
            left[placement[sender]] += count
    return left
