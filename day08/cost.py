"""Day 08: what an all-reduce costs, measured and fitted: alpha + bytes / bandwidth; and from which batch on it hides.

    from day08.cost import Cost, fit, measure_all_reduce

    cost = fit(measure_all_reduce(SIZES, device), ranks=2)      # collective
    print(cost.all_reduce_s(4 * num_params, ranks=2))           # seconds for a model's fp32 gradients
    print(cost.knee_tokens(flops_per_s=3e10, ranks=2))          # tokens per rank

Checked with torch 2.13.0, gloo and NCCL.
Source: Thakur et al. 2005 (alpha-beta model), doi:10.1177/1094342005051521; The Scaling Book, chapter "training".
"""

from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from bench.timing import slowest_median, time_step
from bench.traffic import ring_share
from common.errors import UserError

MIB = 2**20
SIZES = [4 * 2**10, 64 * 2**10, MIB, 2 * MIB, 4 * MIB, 8 * MIB]  # bytes of the tensor
BANDWIDTH_FROM = MIB  # bytes: smaller messages are mostly latency


@dataclass(frozen=True)
class Cost:
    """What a message costs however small, in seconds, and what a rank sends (and gets) in a second, in bytes."""

    alpha_s: float
    bytes_per_s: float

    def all_reduce_s(self, num_bytes: float, ranks: int, messages: int = 1) -> float:
        """Seconds of `messages` ring all-reduces of `num_bytes` in all."""
        return messages * self.alpha_s + ring_share("all_reduce", ranks) * num_bytes / self.bytes_per_s

    def knee_tokens(self, flops_per_s: float, ranks: int, gradient_bytes: int = 4) -> float:
        """Tokens per rank at which the all-reduce takes as long as the backward pass; alpha left out.

        Backward: 4 psi B / C seconds for B tokens at C flop/s. All-reduce: 2(N-1)/N psi gradient_bytes / W seconds.
        Setting them equal, psi is gone: the knee does not depend on the model's size.
        """
        return ring_share("all_reduce", ranks) * gradient_bytes * flops_per_s / (4 * self.bytes_per_s)


def measure_all_reduce(sizes: list[int], device: torch.device, repeats: int = 5) -> dict[int, float]:
    """{bytes: seconds of an all-reduce of fp32, the median on the slowest rank}. Collective."""
    found = {}
    for size in sizes:
        tensor = torch.ones(size // 4, device=device)
        spent = []
        for _ in range(repeats + 1):
            dist.barrier()
            spent.append(time_step(partial(dist.all_reduce, tensor))[0])
            tensor.fill_(1.0)  # sums of sums would overflow
        found[size] = slowest_median(spent, device, warm_up=1)
    return found


def fit(seconds: dict[int, float], ranks: int) -> Cost:
    """Alpha from the smallest message, the bandwidth from the slope of a line through those of 1 MiB and more.

    `seconds`: {bytes: seconds}. Raises UserError for sizes that show no slope.
    """
    large = {size: spent for size, spent in seconds.items() if size >= BANDWIDTH_FROM}
    if len(large) < 2 or ranks < 2:
        raise UserError(f"{len(large)} sizes of 1 MiB and more on {ranks} ranks: a bandwidth needs two of each")
    slopes = [
        (large[b] - large[a]) / (b - a) for a in large for b in large if a < b
    ]  # of all pairs, the median: one slow message does not turn the line (Theil-Sen)
    if median(slopes) <= 0:
        raise UserError(f"larger messages were not slower, {large}: measure larger ones")
    return Cost(seconds[min(seconds)], ring_share("all_reduce", ranks) / median(slopes))


def rate_bytes_per_s(rate: str) -> float:
    """tc's words for a rate as bytes per second: "100mbit" is 12,500,000."""
    units = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}
    number, unit = rate[:-4], rate[-4:]
    if unit not in units or not number.isdigit():
        raise UserError(f"rate {rate!r}: write it as tc does, 100mbit or 1gbit")
    return int(number) * units[unit]
