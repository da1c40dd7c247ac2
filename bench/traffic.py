"""Count the bytes that a rank sends, from DeepSpeed's own log of collectives.

    with count_traffic() as traffic:
        train_step(batch)
    print(traffic.sent_bytes())

Checked with deepspeed 0.19.8, whose log does not see calls of torch.distributed that go past deepspeed.comm.
Source: deepspeed/comm/comm.py (timed_op); Patarasuk and Yuan 2009 (ring all-reduce), doi:10.1016/j.jpdc.2008.09.002
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from deepspeed.comm import comm


def ring_share(operation: str, ranks: int) -> float:
    """Bytes that a rank sends in a ring, per byte of the size that DeepSpeed logs.

    For messages among all ranks. The log has the whole tensor's size for all-reduce, reduce and reduce-scatter, a
    rank's part for all-gather. A ring all-reduce sends it twice less 1/N, a reduce or reduce-scatter once less 1/N,
    an all-gather N - 1 times. Raises ValueError for an operation without a formula.
    """
    part = (ranks - 1) / ranks
    share = {"all_reduce": 2 * part, "reduce": part, "reduce_scatter_tensor": part, "broadcast": 0.0}
    share["all_gather_into_tensor"] = ranks - 1  # a broadcast is stage 3 comparing its ranks' order of use: a few bytes
    if operation not in share:
        raise ValueError(f"no formula for the bytes of {operation}: add it here")
    return share[operation]


class Traffic:
    """What was logged between the begin and the end of `count_traffic`: {operation: {bytes of a message: count}}."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[int, int]] = {}

    def sent_bytes(self) -> float:
        """Bytes that this rank sent, by the ring algorithms."""
        return sum(
            ring_share(operation, dist.get_world_size()) * size * count
            for operation, sizes in self.calls.items()
            for size, count in sizes.items()
        )


@contextmanager
def count_traffic(enabled: bool = True) -> Iterator[Traffic]:
    """Log DeepSpeed's collectives within; afterwards the Traffic has them. Not for a step that is timed: it slows each.

    With `enabled=False` nothing is logged, so that a loop can count one step of many.
    """
    traffic = Traffic()
    if not enabled:
        yield traffic
        return
    comm.configure(enabled=True)
    comm.comms_logger.comms_dict.clear()
    try:
        yield traffic
    finally:
        for operation, sizes in comm.comms_logger.comms_dict.items():
            traffic.calls[operation] = {size: entry[0] for size, entry in sizes.items()}
        comm.comms_logger.comms_dict.clear()
        comm.configure(enabled=False)
