"""Day 19: read a trace - any Chrome trace of PyTorch on one page: who works, who waits, for whom; and a timeline.

From the repository root, no launcher, no GPU; one file a rank, packed (.gz) or not:

    python day19/labs/read_trace.py runs/mine/trace_rank0.json.gz runs/mine/trace_rank1.json.gz
    python day19/labs/read_trace.py day19/results/overlap_naive_rank0_2cpu.json.gz --run_dir runs/day19/page

Expect a table with a column a rank, a verdict, the suspects with their evidence, then page.json and timeline.png.
With --slim FOLDER it writes small copies without stacks and host names, which are read alike.
Checked with torch 2.13.0. Source: https://docs.pytorch.org/docs/stable/profiler.html; torchtitan PR 3020 (the union).
"""

import argparse
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from common.errors import UserError, clear_errors
from common.plots import plt, save_plot
from common.run_log import default_run_dir, show_path
from day19.traces import (
    LOADER,
    Trace,
    communication,
    compute,
    copies,
    read_trace,
    slim,
    summarize,
    suspects,
    waits_for_others_ms,
)

ROWS = {
    "step": "step_ms", "compute": "compute_ms", "communication": "comm_ms", "of it hidden": "overlap_ms",
    "of it open": "exposed_ms", "copies to and from host": "copy_ms", "idle": "idle_ms",
    "waits for other ranks": "waits_ms",
}  # fmt: skip
LANES = {"compute": "tab:blue", "communication": "tab:orange", "copies": "tab:green", "data loader": "tab:red"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="what export_chrome_trace wrote, one file a rank")
    parser.add_argument("--window", nargs=2, type=float, metavar=("FROM", "TO"), help="ms that the timeline shows")
    parser.add_argument("--slim", metavar="FOLDER", help="folder for small copies of the traces")
    parser.add_argument("--run_dir", default=default_run_dir("day19"), help="folder for page.json and timeline.png")
    return parser.parse_args()


def page_of(traces: list[Trace]) -> list[dict]:
    """The numbers of each rank, its suspects, and what it waits for the others."""
    waits = waits_for_others_ms(traces) or [None] * len(traces)
    return [
        summarize(trace) | {"waits_ms": wait, "suspects": suspects(trace)}
        for trace, wait in zip(traces, waits, strict=True)
    ]


def print_page(pages: list[dict]) -> None:
    """Milliseconds per step, a column a rank; then the first rank in words."""
    first = pages[0]
    print(f"{first['device']} | steps {first['steps']} | ms per step")
    print(f"{'':26}" + "".join(f"{'rank ' + str(page['rank']):>12}" for page in pages))
    for name, key in ROWS.items():
        if any(page[key] is not None for page in pages):
            print(f"{name:26}" + "".join(f"{page[key] or 0:12.2f}" for page in pages))
    shares = ["-" if page["hidden"] is None else f"{page['hidden']:.0%}" for page in pages]
    print(f"{'communication hidden':26}" + "".join(f"{share:>12}" for share in shares))
    print(f"\nrank {first['rank']}, {first['operations']:.0f} operations and {first['messages']:.0f} messages per step")
    if first["launch_delay_us"] is not None:
        print(f"a kernel starts {first['launch_delay_us']:.0f} us after its launch (median)")
    print("kinds    " + " | ".join(f"{kind} {ms:.2f}" for kind, ms in first["kinds_ms"].items() if ms >= 0.005))
    for name, ms in first["longest_ms"].items():
        print(f"{ms:10.2f} {name}")
    if first["labels_ms"]:
        print("labels   " + " | ".join(f"{name} {ms:.2f}" for name, ms in first["labels_ms"].items()))
    print("idle     " + " | ".join(f"{who} {ms:.2f}" for who, ms in first["host_in_gaps_ms"].items() if ms >= 0.005))
    for gap in first["longest_gaps"]:
        print(f"{gap['ms']:10.2f} at {gap['at_ms']:.2f}: {gap['host']}")
    for page in pages:
        print(f"\nrank {page['rank']}: {page['verdict']}")
        for name, said in page["suspects"].items():
            print(f"  {name}: {said}")


def draw_timeline(traces: list[Trace], path: Path, window: list[float] | None) -> None:
    """A lane for each kind of work of each rank; without `window` the first two steps."""
    zero = min(trace.base + trace.start for trace in traces)
    begin, end = window or (0.0, traces[0].window_ms / traces[0].steps * min(2, traces[0].steps))
    figure, axes = plt.subplots(figsize=(11, 0.9 + 0.45 * len(LANES) * len(traces)))
    labels = []
    for trace in traces:
        lanes = compute(trace), communication(trace), copies(trace), trace.named(LOADER)
        for (lane, colour), events in zip(LANES.items(), lanes, strict=True):
            shift = trace.base - zero
            bars = [((event["ts"] + shift) / 1e3, event["dur"] / 1e3) for event in events]
            bars = [(start, length) for start, length in bars if start < end and start + length > begin]
            if bars or lane in ("compute", "communication"):
                axes.broken_barh(bars, (len(labels) - 0.4, 0.8), color=colour, linewidth=0)
                labels.append(f"rank {trace.rank}: {lane}")
    axes.set(xlim=(begin, end), xlabel="ms", title=", ".join(trace.path.name for trace in traces))
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    save_plot(figure, axes, path)


def main() -> None:
    args = parse_args()
    if args.window and not -math.inf < args.window[0] < args.window[1] < math.inf:
        raise UserError(f"--window {args.window[0]:g} {args.window[1]:g}: FROM lies before TO")
    if args.slim and Path(args.slim).exists() and not Path(args.slim).is_dir():
        raise UserError(f"--slim {args.slim}: that is a file, name a folder")
    traces = sorted((read_trace(path) for path in args.traces), key=lambda trace: trace.rank)
    if len({trace.on_gpu for trace in traces}) > 1:
        raise UserError("these traces are of a CPU and of a GPU: ranks of one run, please")
    pages = page_of(traces)
    print_page(pages)
    run_dir = Path(args.run_dir)
    write_results(run_dir / "page.json", this_command(), table=pages)
    draw_timeline(traces, run_dir / "timeline.png", args.window)
    print(f"\npage: {show_path(run_dir / 'page.json')} | timeline: {show_path(run_dir / 'timeline.png')}")
    if args.slim:
        for trace in traces:
            name = trace.path.name.removesuffix(".gz").removesuffix(".json")
            slim(trace, Path(args.slim) / f"{name}.json.gz")
        print(f"slim: {args.slim}")


if __name__ == "__main__":
    with clear_errors():
        main()
