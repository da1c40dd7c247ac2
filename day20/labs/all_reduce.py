"""Day 20: all_reduce - ring, tree, halving, hierarchical and the library's: seconds, and bytes that leave the host.

From the repository root, on four CPU processes or GPUs; as root on hosts that a link of known speed joins:

    deepspeed --num_accelerators 4 day20/labs/all_reduce.py --placement AABB
    python day20/labs/on_link.py "day20/labs/all_reduce.py" --placements AABB ABAB
    python day20/labs/on_link.py "day20/labs/all_reduce.py --sizes 1 16 256 4096" --placements ABCDEFGH --rates 100mbit

Expect a row for each size and pattern: bytes that left the host divided by the tensor's, beside what the formula says.
On a link they are read from its interface, headers and all; elsewhere counted where a pattern sends to a rank whose
letter in --placement differs (the library's all-reduce cannot be counted so). seconds.png has the sizes.
Checked with torch 2.13.0. Source: day20/patterns.py.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from string import ascii_uppercase

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.link import INTERFACE, sent_over_link
from bench.table import Table
from bench.timing import slowest_median, time_step
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.plots import plt, save_plot
from common.ranks import over_ranks
from common.run_log import default_run_dir
from day20.patterns import PATTERNS, Wire, hosts_of, leaving_host, steps_of

COLUMNS = {
    "KiB": "kib:d", "ms": "ms:.1f", "steps": "steps:d", "left host": "left:.3f", "formula": "formula:.3f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096], help="KiB of the tensor that is reduced")
    parser.add_argument(
        "--patterns", nargs="+", default=[*PATTERNS, "library"], help="of day20/patterns.py, or library"
    )
    parser.add_argument("--placement", default="", help="the host of each rank, AABB say; on a link it is known")
    parser.add_argument("--repeats", type=int, default=5, help="all-reduces that are timed; the first is not counted")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day20"), help="folder for all_reduce.json and the plot")
    return parser.parse_args()


def find_placement(given: str, on_link: bool) -> str:
    """A letter for each rank: what was given, or on a link the hosts where the ranks are. Collective."""
    ranks = dist.get_world_size()
    if on_link:
        where = [None] * ranks
        dist.all_gather_object(where, os.stat("/proc/self/ns/net").st_ino)  # one network namespace, one host
        first = list(dict.fromkeys(where))
        return "".join(ascii_uppercase[first.index(place)] for place in where)
    given = given or ("A" * (ranks // 2) + "B" * (ranks // 2) if ranks % 2 == 0 else ascii_uppercase[:ranks])
    if len(given) != ranks:
        raise UserError(f"--placement {given!r} has {len(given)} letters for {ranks} ranks")
    return given


def run_pattern(name: str, wire: Wire, tensor: torch.Tensor, placement: str) -> None:
    if name == "library":
        dist.all_reduce(tensor)
    else:
        PATTERNS[name](wire, tensor, placement)


def bytes_left(call, wire: Wire, placement: str, on_link: bool, device: torch.device) -> float:
    """Bytes that leave the first host while all ranks run `call`. Collective."""
    dist.barrier()
    before, counted = sent_over_link() if on_link else 0, wire.sent_bytes.copy()
    dist.barrier()
    call()
    dist.barrier()
    if placement[wire.rank] != placement[0]:
        mine = 0
    elif on_link:  # one rank speaks for the host
        mine = sent_over_link() - before if wire.rank == 0 else 0
    else:
        mine = sum(n for to, n in (wire.sent_bytes - counted).items() if placement[to] != placement[0])
    return over_ranks(mine, device, "sum")


def measure(name: str, kib: int, placement: str, on_link: bool, repeats: int, device: torch.device) -> dict:
    """One row. The result is checked on every rank: a pattern that is fast and wrong is no pattern."""
    wire = Wire()
    tensor = torch.full((kib * 256,), 1.0 + wire.rank, device=device)
    run_pattern(name, wire, tensor, placement)
    want = wire.ranks * (wire.ranks + 1) / 2
    if not bool((tensor == want).all()):
        raise ValueError(f"{name} on {placement}: {tensor[0].item()}, not the sum {want}")
    tensor.zero_()  # sums of zeros stay zeros, however often
    call = partial(run_pattern, name, wire, tensor, placement)
    left = bytes_left(call, wire, placement, on_link, device)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        seconds.append(time_step(call)[0])
    row = {"ms": 1e3 * slowest_median(seconds, device, warm_up=1), "kib": kib, "pattern": name}
    row["left"] = left / tensor.nbytes if on_link or name != "library" else None
    known = name in PATTERNS
    return row | {
        "formula": leaving_host(name, placement) if known else None,
        "steps": steps_of(name, placement) if known else None,
    }


def plot_sizes(table: list[dict], path: Path, title: str) -> None:
    """Milliseconds against size, a line for each pattern."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in dict.fromkeys(row["pattern"] for row in table):
        points = [(row["kib"], row["ms"]) for row in table if row["pattern"] == name]
        axes.loglog(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="KiB reduced", ylabel="ms", title=title)
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    if unknown := set(args.patterns) - {*PATTERNS, "library"}:
        raise UserError(f"--patterns {min(unknown)}: there are {', '.join(PATTERNS)}, library")
    if min(args.sizes) < 1 or args.repeats < 2:
        raise UserError(f"--sizes {min(args.sizes)} --repeats {args.repeats}: sizes start at 1 KiB, repeats at 2")
    device = join_world()
    on_link = os.environ.get("GLOO_SOCKET_IFNAME") == INTERFACE
    placement = find_placement(args.placement, on_link)
    ranks, hosts = len(placement), len(hosts_of(placement))
    if ranks & (ranks - 1) and "halving" in args.patterns:
        raise UserError(f"halving needs a power of two of ranks, not {ranks}: leave it out of --patterns")
    dist.all_reduce(torch.zeros(1, device=device))  # all connections are made before a pair talks alone
    facts = {"placement": placement, "backend": dist.get_backend()}
    table = Table(Path(args.run_dir) / "all_reduce.json", COLUMNS, width=14, **facts)
    for kib in args.sizes:
        for name in args.patterns:
            table.add({"case": name, **measure(name, kib, placement, on_link, args.repeats, device)})
    if len(args.sizes) > 1 and dist.get_rank() == 0:
        title = f"all-reduce, {ranks} ranks on {hosts} hosts, {dist.get_backend()}"
        plot_sizes(table.rows, Path(args.run_dir) / "seconds.png", title)
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
