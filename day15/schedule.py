"""Day 15: schedule - what each stage does when, taken from DeepSpeed's schedule classes and played through a clock.

From the repository root; no ranks, no model, no data:

    python day15/schedule.py
    python day15/schedule.py --stages 2 --micro_batches 4 --instructions
    python day15/schedule.py --micro_batches 32 --backward 1 --send 0.1

Expect a picture in text for each schedule, the bubble beside the formula, and what a stage keeps; then schedule.png.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/pipe/schedule.py; arXiv:1811.06965; arXiv:2104.04473.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepspeed.runtime.pipe import schedule as ds

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from common.errors import UserError, clear_errors
from common.plots import plt
from common.run_log import default_run_dir, show_path

LETTER = {"ForwardPass": "F", "BackwardPass": "B", "LoadMicroBatch": "load", "OptimizerStep": "step"}
LETTER |= {"SendActivation": "a>", "RecvActivation": ">a", "SendGrad": "<g", "RecvGrad": "g<"}
LETTER |= {"ReduceTiedGrads": "tied", "ReduceGrads": "reduce"}
PARTNER = {"SendActivation": "RecvActivation", "RecvActivation": "SendActivation"}
PARTNER |= {"SendGrad": "RecvGrad", "RecvGrad": "SendGrad"}


class GPipeSchedule(ds.PipeSchedule):
    """All forward passes, then all backward passes (Huang et al. 2019). Not in DeepSpeed; bubble.py runs it."""

    def steps(self) -> Iterator[list[ds.PipeInstruction]]:
        for i in range(self.micro_batches):
            receive = [] if self.is_first_stage else [ds.RecvActivation(i)]
            load = [ds.LoadMicroBatch(i)] if self.is_first_stage or self.is_last_stage else []
            yield receive + load + [ds.ForwardPass(i)] + ([] if self.is_last_stage else [ds.SendActivation(i)])
        for i in range(self.micro_batches):
            receive = [] if self.is_last_stage else [ds.RecvGrad(i)]
            yield receive + [ds.BackwardPass(i)] + ([] if self.is_first_stage else [ds.SendGrad(i)])
        yield [ds.ReduceTiedGrads(), ds.ReduceGrads(), ds.OptimizerStep()]


SCHEDULES = {"1f1b": ds.TrainSchedule, "gpipe": GPipeSchedule, "inference": ds.InferenceSchedule}


@dataclass
class Event:
    """One instruction of one stage: what, for which micro-batch (None: for all), in which tick, from when to when."""

    stage: int
    name: str
    micro_batch: int | None
    tick: int
    start: float = 0.0
    end: float = 0.0


def read_schedule(name: str, stages: int, micro_batches: int) -> list[list[Event]]:
    """Each stage's instructions in its own order. DeepSpeed names buffers; which micro-batch is in one, we follow."""
    if stages < 1 or micro_batches < 1:
        raise UserError(f"{stages} stages x {micro_batches} micro-batches: both start at 1")
    found = []
    for stage in range(stages):
        schedule = SCHEDULES[name](micro_batches, stages, stage)
        events, inside = [], {}
        forwards = 0
        for tick, instructions in enumerate(schedule):
            for instruction in instructions:
                kind, buffer = instruction.name, getattr(instruction, "buffer_id", None)
                if kind in ("LoadMicroBatch", "RecvActivation", "ForwardPass"):
                    inside[buffer] = forwards  # forward passes run in order: what comes in is for the next one
                    forwards += kind == "ForwardPass"
                events.append(Event(stage, kind, inside.get(buffer), tick))
        found.append(events)
    return found


def play(stages: list[list[Event]], forward: float = 1.0, backward: float = 2.0, send: float = 0.0) -> float:
    """Give every event its start and end; return when the last one ends.

    A stage does one thing at a time, in its order, as soon as it can. Sender and receiver wait for each other and are
    both busy for `send`: DeepSpeed's messages block. There are no ticks here: nobody waits for a stage he has no
    message from. (In DeepSpeed's list a tick is a place for a barrier; the engine sets none.)
    """
    cost = {"ForwardPass": forward, "BackwardPass": backward}
    clock, at = [0.0] * len(stages), [0] * len(stages)

    def next_event(stage: int) -> Event | None:
        return stages[stage][at[stage]] if at[stage] < len(stages[stage]) else None

    while left := [stage for stage in range(len(stages)) if next_event(stage)]:
        moved = False
        for stage in left:
            while event := next_event(stage):
                pair = [event]
                if event.name in PARTNER:
                    other = next_event(stage + (1 if event.name in ("SendActivation", "RecvGrad") else -1))
                    if not other or (other.name, other.micro_batch) != (PARTNER[event.name], event.micro_batch):
                        break  # the partner is not there yet
                    pair.append(other)
                start = max(clock[one.stage] for one in pair)
                for one in pair:
                    one.start, one.end = start, start + (send if len(pair) == 2 else cost.get(one.name, 0.0))
                    clock[one.stage] = one.end
                    at[one.stage] += 1
                moved = True
        if not moved:
            raise RuntimeError(f"deadlock: {[next_event(stage) for stage in left]}")
    return max(clock)


def in_flight(events: list[Event]) -> int:
    """The most micro-batches that a stage has sent forward and not yet backward: their activations are kept."""
    now = most = 0
    for event in events:
        now += (event.name == "ForwardPass") - (event.name == "BackwardPass")
        most = max(most, now)
    return most


def as_text(stages: list[list[Event]], ends: float, unit: float) -> list[str]:
    """A line a stage: `F3` forward of micro-batch 3, `B3==` backward, `.` idle or sending; 2-4 characters a `unit`."""
    width = 1 + len(str(max(event.micro_batch or 0 for event in stages[0])))
    lines = []
    for events in stages:
        line = ["."] * round(ends / unit * width)
        for event in (event for event in events if event.name in ("ForwardPass", "BackwardPass")):
            first, last = (round(time / unit * width) for time in (event.start, event.end))
            line[first:last] = f"{LETTER[event.name]}{event.micro_batch}".ljust(last - first, "=")[: last - first]
        lines.append("".join(line))
    return lines


def instruction_table(stages: list[list[Event]]) -> list[str]:
    """A line a tick, a column a stage: DeepSpeed's instructions in their order, micro-batches instead of buffers."""
    ticks = 1 + max(event.tick for events in stages for event in events)
    cells = [["" for _ in stages] for _ in range(ticks)]
    for event in (event for events in stages for event in events):
        number = "" if event.micro_batch is None else event.micro_batch
        cells[event.tick][event.stage] += f"{LETTER[event.name]}{number} "
    widths = [max(len(row[stage]) for row in cells) for stage in range(len(stages))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return [f"tick {tick:2d} | {'| '.join(row)}".rstrip() for tick, row in enumerate(padded)]


def plot(drawn: dict[str, list[list[Event]]], ends: float, path: Path) -> None:
    """A panel per schedule, a row per stage; passes in the style's first two colours, messages black, idle white."""
    colors = {"ForwardPass": "C0", "BackwardPass": "C1"}
    figure, panels = plt.subplots(len(drawn), figsize=(10, 1.4 + 1.6 * len(drawn)), sharex=True, squeeze=False)
    for axes, (name, stages) in zip(panels[:, 0], drawn.items(), strict=True):
        for event in (event for events in stages for event in events if event.end > event.start):
            color, width = colors.get(event.name, "black"), event.end - event.start
            axes.barh(event.stage, width, left=event.start, height=0.9, color=color, edgecolor="white")
            if event.name in colors and width / ends > 0.015:
                axes.text(event.start + width / 2, event.stage, event.micro_batch, ha="center", va="center", fontsize=7)
        axes.set(title=name, ylabel="stage", yticks=range(len(stages)), xlim=(0, ends))
        axes.invert_yaxis()
    panels[-1, 0].set_xlabel("time, in the unit of --forward; the number in a pass is its micro-batch")
    named = {"forward pass": "C0", "backward pass": "C1", "message": "black"}
    patches = [plt.Rectangle((0, 0), 1, 1, color=color, label=name) for name, color in named.items()]
    figure.legend(handles=patches, loc="upper right", ncols=3, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="stages of the pipeline")
    parser.add_argument("--micro_batches", type=int, default=8, help="micro-batches of one optimizer step")
    parser.add_argument("--forward", type=float, default=1.0, help="time of a forward pass through one stage")
    parser.add_argument("--backward", type=float, default=2.0, help="time of a backward pass through one stage")
    parser.add_argument("--send", type=float, default=0.0, help="time of a message; both sides are busy")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES)[:2], help="what to draw")
    parser.add_argument("--instructions", action="store_true", help="print DeepSpeed's instructions, tick by tick")
    parser.add_argument("--run_dir", default=default_run_dir("day15"), help="folder for schedule.json and schedule.png")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not (args.forward > 0 and args.backward > 0 and args.send >= 0):
        raise UserError(f"--forward {args.forward} --backward {args.backward} --send {args.send}: times are positive")
    p, m = args.stages, args.micro_batches
    table, drawn = [], {}
    longest = 0.0
    for name in args.schedules:
        drawn[name] = stages = read_schedule(name, p, m)
        ends = play(stages, args.forward, args.backward, args.send)
        longest = max(longest, ends)
        backward = 0 if name == "inference" else args.backward
        bubble = 1 - m * (args.forward + backward) / ends
        kept = [in_flight(events) if backward else 1 for events in stages]
        buffers = [SCHEDULES[name](m, p, stage).num_pipe_buffers() for stage in range(p)]
        costs = f"forward {args.forward:g}, backward {backward:g}, send {args.send:g}"
        print(f"{name}: {p} stages x {m} micro-batches, {costs}")
        for stage, line in enumerate(as_text(stages, ends, args.forward)):
            print(f"stage {stage} |{line}|")
        print(f"time {ends:g} | bubble {bubble:.4f} | formula {p - 1}/{m + p - 1} = {(p - 1) / (m + p - 1):.4f}")
        print(f"micro-batches kept, stage by stage: {kept} | buffers: {buffers}")
        if args.instructions:
            print("\n".join(instruction_table(stages)))
        table.append({"schedule": name, "time": ends, "bubble": bubble, "kept": kept, "buffers": buffers})
    run_dir = Path(args.run_dir)
    plot(drawn, longest, run_dir / "schedule.png")
    write_results(run_dir / "schedule.json", this_command(), stages=p, micro_batches=m, table=table)
    print(f"picture: {show_path(run_dir)}/schedule.png | table: schedule.json")


if __name__ == "__main__":
    with clear_errors():
        main()
