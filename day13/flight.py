"""Day 13: the flight recorder - what each rank has called, from where, and which call went astray. A module.

    from day13.flight import dump, read, stray      # turn_on(folder) before the process group
    python day13/flight.py runs/day13/flight        # read the dumps that lie there

PyTorch keeps the last calls of each process group in a ring buffer: operation, shapes, and the Python stack of the
caller; on gloo as on NCCL. Dumps are pickles: read only those of your own jobs. On gloo a call's state stays
"scheduled", so calls are compared, not states.
Checked with torch 2.13.0 (gloo). Source: torch/csrc/distributed/c10d/FlightRecorder.hpp; PyTorch's own analyser is
torch/distributed/flight_recorder/fr_trace.py.
"""

import argparse
import os
import pickle
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, when this is the program

from common.errors import UserError, clear_errors
from common.run_log import show_path

# Frames that are not the reader's own: installed packages, and DeepSpeed or PyTorch from a folder of sources.
LIBRARY = re.compile(
    r"(site|dist)-packages|lib/python3|<frozen|bin/deepspeed|/deepspeed/(comm|runtime|utils)/|/torch/(distributed|autograd|nn|utils)/"
)


@dataclass(frozen=True)
class Call:
    """One collective: what, and who asked for it (the frames that are no library's, innermost first). The time is no
    part of it: two ranks' calls are the same at different times.
    """

    op: str
    sizes: str
    frames: tuple[tuple[str, int, str], ...]  # (file, line, function)
    time_ns: int = field(default=0, compare=False)

    def __str__(self) -> str:
        places = [f"{show_path(file)}:{line} in {function}()" for file, line, function in self.frames[:3]]
        return f"{self.op} {self.sizes} at {' < '.join(places)}"


def turn_on(folder: str | Path, calls: int = 2000) -> None:
    """Keep that many calls; NCCL's watchdog is to write them to `folder`/rank_N. Call it before the process group.

    What the environment says already stays.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    wanted = {"TORCH_FR_BUFFER_SIZE": str(calls), "TORCH_FR_DUMP_TEMP_FILE": str(Path(folder) / "rank_")}
    older = {"TORCH_NCCL_TRACE_BUFFER_SIZE": str(calls), "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(Path(folder) / "rank_")}
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):  # later ones warn of the older names
        wanted |= older
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def dump(folder: str | Path) -> Path:
    """Write this rank's buffer to `folder`/rank_N. Not collective: a rank that hangs does it from another thread."""
    from torch._C import _distributed_c10d as c10d

    take = c10d._dump_nccl_trace if dist.get_backend() == "nccl" else c10d._dump_fr_trace
    path = Path(folder) / f"rank_{dist.get_rank()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(take(True, True, False))  # collectives, stacks, not the active ones alone
    return path


def read(folder: str | Path) -> dict[str, dict[int, dict[int, Call]]]:
    """{process group: {rank: {number of the call in that group: Call}}} of all dumps in `folder`."""
    groups: dict = {}
    for path in sorted(Path(folder).glob("rank_*")):
        rank = int(re.search(r"\d+$", path.name)[0])
        for entry in pickle.loads(path.read_bytes())["entries"]:
            if "send" in entry["profiling_name"] or "recv" in entry["profiling_name"]:
                continue  # between two ranks: nothing that all have to agree on
            frames = [(frame["filename"], frame["line"], frame["name"]) for frame in entry["frames"]]
            own = tuple(frame for frame in frames if not LIBRARY.search(frame[0])) or tuple(frames)
            call = Call(entry["profiling_name"], str(entry["input_sizes"]), own, entry.get("time_created_ns", 0))
            groups.setdefault(entry["process_group"][0], {}).setdefault(rank, {})[entry["collective_seq_id"]] = call
    return groups


def part(ranks: dict[int, dict[int, Call]]) -> list[tuple[int, Call]]:
    """The calls, with their ranks, at which the ranks of a group part; [] when all called the same.

    Ranks part for good where operation or shapes differ, or one has no further call. The fault may lie before: a stray
    call that met another one of the same shape. So the first call that one rank alone has, by its line, is named.
    """
    first = max(min(of) for of in ranks.values())  # the buffer of a rank may have lost the calls before
    rows = [{rank: of.get(at) for rank, of in ranks.items()} for at in range(first, max(map(max, ranks.values())) + 2)]
    shapes = [len({call and (call.op, call.sizes) for call in row.values()}) for row in rows]
    broken = next((at for at, different in enumerate(shapes) if different > 1), None)
    if broken is None:
        return []
    for at in range(broken + 1):
        for rank, call in rows[at].items():
            others = [other for other in ranks if other != rank]
            if call and all(call != rows[at][o] and rows[at + 1][rank] == rows[at][o] for o in others):
                return [(rank, call)]  # without it, this rank's calls are those of the others
    return [(rank, call) for rank, call in rows[broken].items() if call]


def stray(groups: dict[str, dict[int, dict[int, Call]]]) -> list[list[tuple[int, Call]]]:
    """What `part` finds in each process group whose ranks part, the earliest first: it is the fault, or next to it."""
    found = [calls for ranks in groups.values() if (calls := part(ranks))]
    return sorted(found, key=lambda calls: min(call.time_ns for _, call in calls))


def verdict(folder: str | Path) -> str:
    """What `stray` found in the dumps of `folder`, in words."""
    groups = read(folder)
    ranks = {rank for calls in groups.values() for rank in calls}
    if len(ranks) < 2:
        last = [f"  rank {rank}: {list(calls[rank].values())[-1]}" for calls in groups.values() for rank in calls]
        return "\n".join(["flight recorder: one rank alone left a dump; the last call of each of its groups:", *last])
    lines = []
    for calls in stray(groups):
        alone = f"rank {calls[0][0]} alone called {calls[0][1]}"
        lines.append(alone if len(calls) == 1 else " / ".join(f"rank {rank} called {call}" for rank, call in calls))
    return "flight recorder: " + ("\n  then: ".join(lines) or "all ranks called the same collectives")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the dumps of all ranks lie: rank_0, rank_1, ...")
    args = parser.parse_args()
    if not list(Path(args.folder).glob("rank_*")):
        raise UserError(f"{args.folder} has no rank_0, rank_1, ...: was the flight recorder on?")
    print(verdict(args.folder))


if __name__ == "__main__":
    with clear_errors():
        main()
