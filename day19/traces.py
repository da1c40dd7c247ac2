"""Day 19: traces - what a Chrome trace of PyTorch says: compute, communication, what hid what, gaps, suspects.

    from day19.traces import read_trace, summarize, suspects     # labs/read_trace.py prints them as a page

Times in a trace are microseconds; what these functions return is milliseconds. Checked with torch 2.13.0.
Source: https://docs.pytorch.org/docs/stable/profiler.html; the Trace Event Format of Chrome; Kineto's categories
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.profiler import ProfilerActivity, profile, schedule

from bench.trace import ON_DEVICE, longest_ms, ms_by_kind, union_ms
from common.errors import UserError

# On a CPU the operations are the device's work: those that compute, not those that wrap, wait or send.
CPU_COMPUTE = re.compile(r"(?!c10d::|nccl::|gloo::|autograd::|torch::autograd::)\w+::\w|.*cpp_fused|triton_")
COMMUNICATION = re.compile(r"nccl|rccl|gloo:|mpi:", re.I)
HOST_WAITS = re.compile(r"(cuda|hip)\w*Synchronize")
LOADER = "enumerate(DataLoader)"
OPTIMIZER = ("Optimizer.step#", "Optimizer.zero_grad#")
KNOWN = ("ProfilerStep#", "DistributedDataParallel.", LOADER, *OPTIMIZER)  # annotations that PyTorch itself makes
READ_BACK = "aten::_local_scalar_dense"  # what .item(), float(tensor), `if tensor:` end in
KINDS = {  # of operations and kernels, by words in their lower-case names; the first kind that fits
    "attention": ("flash", "fmha", "scaled_dot_product", "cudnn_generated", "sdpa"),
    "products": (
        "gemm",
        "nvjet",
        "cutlass",
        "xmma",
        "cublas",
        "::mm",
        "::addmm",
        "::bmm",
        "::baddbmm",
        "mkldnn_linear",
    ),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "norms, loss": ("norm", "softmax", "nll", "loss", "reduce_kernel", "::sum", "::mean", "embedding", "triton_per"),
    "copies": ("copy", "memcpy", "memset", "fill", "catarray", "::cat", "::zero_"),
    "element-wise": ("elementwise", "::add", "::mul", "::sub", "::div", "::pow", "::tanh", "gelu", "triton_poi"),
}
# Arithmetic on one element at a time, which could go with its neighbours into one operation.
FUSABLE = re.compile(
    r"aten::(add|sub|rsub|mul|div|pow|tanh|exp|sqrt|rsqrt|neg|sigmoid|where|tanh_backward)_?$"
    r"|(?!.*(copy|fill|foreach|multi_tensor)).*elementwise_kernel",
    re.I,
)
LEFT_OUT = ("python_function", "gpu_user_annotation", "overhead", "fwdbwd")  # of a slim copy
MESSAGE_ARGS = ("In msg nelems", "dtype", "Input Dims", "Input type")
NO_WORK = re.compile(  # of a CPU: they look at memory otherwise, or ask for it
    r"aten::(view|_unsafe_view|reshape|expand|as_strided|t|transpose|permute|detach|alias|slice|select|narrow|split|chunk"
    r"|unflatten|unsqueeze|squeeze|empty.*|to|contiguous|result_type|resolve_\w+|item|_local_scalar_dense|lift_fresh)_?$"
)
SMALL_MESSAGE = 8e6  # bytes: below, starting a message costs as much as sending it (20 us at 400 GB/s)
CLEAR = 0.15  # of the time: what a verdict needs


@dataclass
class Trace:
    """One rank's trace. Events have a duration, lie in order of time, and are cut to the recorded steps."""

    path: Path
    rank: int
    events: list[dict]
    device: str  # "cpu", or the GPU's name
    steps: int
    start: float  # of the window, microseconds since `base`
    end: float
    base: float  # microseconds: the same for ranks of one machine

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def window_ms(self) -> float:
        return (self.end - self.start) / 1e3

    def category(self, *names: str) -> list[dict]:
        """Events of Kineto's categories: kernel, gpu_memcpy, cpu_op, cuda_runtime, user_annotation ..."""
        return [event for event in self.events if event.get("cat") in names]

    def named(self, *starts: str) -> list[dict]:
        """Events whose name begins with one of `starts`, as the host did them."""
        return [e for e in self.events if e["name"].startswith(starts) and not e.get("cat", "").startswith("gpu_")]


def read_trace(path: str | Path) -> Trace:
    """Read a trace that PyTorch's profiler exported, packed by gzip or not.

    Raises UserError, one sentence, when `path` is something else: no file, no JSON, half a file, another program's.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no trace {str(path)!r}: `export_chrome_trace` of torch.profiler writes one")
    raw = path.read_bytes()
    try:
        found = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (ValueError, EOFError, OSError, zlib.error, RecursionError) as error:
        why = " ".join(str(error).split())[:80]
        raise UserError(f"{path} is no whole Chrome trace: {why}; was the program ended while it wrote?") from error
    facts = found if isinstance(found, dict) else {"traceEvents": found}
    events = facts.get("traceEvents")
    if not isinstance(events, list):
        raise UserError(f"{path} is no Chrome trace: it has no list 'traceEvents'")
    events = sorted(filter(_lasts, events), key=lambda event: (event["ts"], -event["dur"]))
    known = [event for event in events if event.get("cat") in ("cpu_op", *ON_DEVICE)]
    if not known:
        cats = ", ".join(sorted({str(event.get("cat")) for event in events})) or "none"
        raise UserError(f"{path} has no operation or kernel of PyTorch in it (categories: {cats})")
    try:
        trace = _cut_to_steps(path, facts, events)
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is no trace of PyTorch's profiler: {error}") from error
    if trace.window_ms <= 0:
        raise UserError(f"{path}: its operations last 0 ms, there is nothing to add up")
    return trace


def _lasts(event: object) -> bool:
    """Whether it is a complete event: a name, a beginning and a duration."""
    numbers = isinstance(event, dict) and [event.get("ts"), event.get("dur")]
    return bool(
        numbers
        and event.get("ph") == "X"
        and isinstance(event.get("name"), str)
        and isinstance(event.get("args", {}), dict)
        and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    )


def _cut_to_steps(path: Path, facts: dict, events: list[dict]) -> Trace:
    """Cut to the recorded steps: on a GPU to their own work, which may begin late when the host runs ahead."""
    on_device = [event for event in events if event.get("cat") in ON_DEVICE]
    steps = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("ProfilerStep#")]
    earlier = _launched_earlier(events, on_device) if steps else []
    known = {id(event) for event in earlier}
    own = [event for event in on_device if id(event) not in known]
    marks = [*steps, *own] or [event for event in events if event.get("cat") == "cpu_op"]
    start = begin = min(event["ts"] for event in marks)
    if earlier and own:  # the device came to these steps when it had done, or began beside, what was there before
        start = max(begin, min(max(e["ts"] + e["dur"] for e in earlier), min(e["ts"] for e in own)))
    end = max(event["ts"] + event["dur"] for event in marks)
    inside = [event for event in events if begin <= event["ts"] < end and event.get("cat") != "Trace"]
    inside = [_until(event, end) for event in inside if id(event) not in known]
    properties = (facts.get("deviceProperties") or [{}])[0]
    device = properties.get("name", "GPU") if on_device else "cpu"
    rank = (facts.get("distributedInfo") or {}).get("rank", 0)
    base = facts.get("baseTimeNanoseconds", 0) / 1e3
    return Trace(path, rank, inside, device, max(1, len(steps)), start, end, base)


def _until(event: dict, end: float) -> dict:
    """The event as far as it lies before `end`."""
    return event if event["ts"] + event["dur"] <= end else {**event, "dur": end - event["ts"]}


def _launched_earlier(events: list[dict], on_device: list[dict]) -> list[dict]:
    """Device work of steps before the recorded ones: the host launched it when nobody looked yet."""
    launches = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launched = {event.get("args", {}).get("correlation") for event in launches} - {None}
    numbers = [(event, event.get("args", {}).get("correlation")) for event in on_device]
    return [event for event, number in numbers if launched and number is not None and number not in launched]


def communication(trace: Trace) -> list[dict]:
    """Messages: NCCL's kernels on a GPU, gloo's own spans on a CPU."""
    where = trace.category("kernel") if trace.on_gpu else trace.category("user_annotation", "cpu_op")
    return [e for e in where if COMMUNICATION.search(e["name"]) and not e["name"].startswith("c10d::")]


def copies(trace: Trace) -> list[dict]:
    """Copies between host and GPU."""
    return [e for e in trace.category("gpu_memcpy") if "HtoD" in e["name"] or "DtoH" in e["name"]]


def compute(trace: Trace) -> list[dict]:
    """The device's work that is neither message nor copy to or from the host. Operations of a CPU nest."""
    if not trace.on_gpu:
        return [event for event in trace.category("cpu_op") if CPU_COMPUTE.match(event["name"])]
    other = {id(event) for event in (*communication(trace), *copies(trace))}
    return [event for event in trace.category(*ON_DEVICE) if id(event) not in other]


def own_time(events: Iterable[dict]) -> list[dict]:
    """Nested events of each thread with `dur` less that of the events within: {name, ts, end, dur}."""
    found, stacks = [], {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        stack = stacks.setdefault((event.get("pid"), event.get("tid")), [])
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        own = {"name": event["name"], "ts": event["ts"], "end": event["ts"] + event["dur"], "dur": event["dur"]}
        if stack:
            stack[-1][1]["dur"] -= event["dur"]
        stack.append((own["end"], own))
        found.append(own)
    return [own for own in found if own["dur"] > 0]


def labels(trace: Trace) -> list[dict]:
    """What you have named yourself, with `record_function`, on the host."""
    return [
        event
        for event in trace.category("user_annotation")
        if not event["name"].startswith(KNOWN) and not COMMUNICATION.match(event["name"])
    ]


def both_ms(one: list[dict], other: list[dict]) -> float:
    """Milliseconds in which both went on: their sum less their union."""
    return union_ms(one) + union_ms(other) - union_ms([*one, *other])


def gaps(trace: Trace) -> list[dict]:
    """When the device did nothing within the window, as events, the longest first."""
    busy = [*compute(trace), *communication(trace), *copies(trace)]
    found, until = [], trace.start
    for event in sorted(busy, key=lambda event: event["ts"]):
        if event["ts"] > until:
            found.append({"name": "gap", "ts": until, "dur": event["ts"] - until})
        until = max(until, event["ts"] + event["dur"])
    if trace.end > until:
        found.append({"name": "gap", "ts": until, "dur": trace.end - until})
    return sorted(found, key=lambda gap: -gap["dur"])


def host_meanwhile(trace: Trace, idle: list[dict]) -> dict[str, float]:
    """What the host did in the milliseconds of `idle`; what lies in two kinds counts for the first."""
    operations = [event for event in trace.category("cpu_op") if not CPU_COMPUTE.match(event["name"]) or trace.on_gpu]
    kinds = {
        "data loader": trace.named(LOADER),
        "waiting for the device": [e for e in trace.category("cuda_runtime") if HOST_WAITS.match(e["name"])],
        "optimizer": trace.named(*OPTIMIZER),
        "operations and launches": [*trace.category("cuda_runtime", "cuda_driver"), *operations],
    }
    found, seen, before = {}, [], 0.0
    for kind, events in kinds.items():
        seen += events
        together = both_ms(idle, seen)
        found[kind], before = together - before, together
    return found | {"Python between them": union_ms(idle) - before}


def launch_delay_us(trace: Trace) -> float | None:
    """Median time from the host's launch of a kernel to its start: long when the host runs ahead of the device."""
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in trace.category("cuda_runtime", "cuda_driver")
        if "correlation" in e.get("args", {})
    }
    kernels = [e for e in trace.category("kernel") if e.get("args", {}).get("correlation") in launched]
    return median(e["ts"] - launched[e["args"]["correlation"]] for e in kernels) if kernels else None


def summarize(trace: Trace) -> dict:
    """The numbers of a page, in milliseconds per step; `hidden` is the share of communication behind compute."""
    work, messages, copied = compute(trace), communication(trace), copies(trace)
    idle = gaps(trace)
    per = trace.steps
    comm_ms, hidden_ms = union_ms(messages), both_ms(work, messages)
    alone = own_time(work)
    meanwhile = host_meanwhile(trace, idle)
    page = {
        "rank": trace.rank, "device": trace.device, "steps": per, "step_ms": trace.window_ms / per,
        "compute_ms": union_ms(work) / per, "comm_ms": comm_ms / per, "overlap_ms": hidden_ms / per,
        "exposed_ms": (comm_ms - hidden_ms) / per, "copy_ms": union_ms(copied) / per, "idle_ms": union_ms(idle) / per,
        "hidden": hidden_ms / comm_ms if comm_ms else None, "operations": len(alone) / per,
        "messages": len(messages) / per, "message_bytes": message_bytes(messages),
        "launch_delay_us": launch_delay_us(trace),
        "host_in_gaps_ms": {kind: ms / per for kind, ms in meanwhile.items()},
        "longest_gaps": [_placed(trace, gap) for gap in idle[:3]],
        "kinds_ms": {kind: ms / per for kind, ms in ms_by_kind(alone, KINDS).items()},
        "labels_ms": {name: ms / per for name, ms in longest_ms(labels(trace), 12).items()},
        "longest_ms": {name: ms / per for name, ms in longest_ms(alone, 8).items()},
    }  # fmt: skip
    return page | {"verdict": verdict(page)}


def _placed(trace: Trace, gap: dict) -> dict:
    meanwhile = host_meanwhile(trace, [gap])
    at = (gap["ts"] - trace.start) / 1e3
    return {"at_ms": at, "ms": gap["dur"] / 1e3, "host": max(meanwhile, key=meanwhile.get)}


def message_bytes(messages: list[dict]) -> float | None:
    """Median size of a message, None when it was not recorded (on gloo: `record_shapes=True`)."""
    sizes = [size for size in map(_message_size, messages) if size]
    return median(sizes) if sizes else None


def _message_size(event: dict) -> float | None:
    args = event.get("args", {})
    width = {"bfloat16": 2, "half": 2, "float": 4, "double": 8, "byte": 1, "long": 8, "long int": 8, "int": 4}
    if "In msg nelems" in args:
        return int(args["In msg nelems"]) * width.get(str(args.get("dtype", "float")).lower(), 4)
    dims, types = args.get("Input Dims"), args.get("Input type")
    if not dims or not types:
        return None
    kind = str(types[0]).lower().removeprefix("c10::")
    return math.prod(dims[0]) * width.get(kind, 4) if all(isinstance(d, int) for d in dims[0]) else None


def verdict(page: dict) -> str:
    """Who keeps whom waiting, in a sentence: host-bound, communication-bound or device-bound."""
    idle, exposed = page["idle_ms"] / page["step_ms"], page["exposed_ms"] / page["step_ms"]
    cores = "the cores compute nothing" if page["device"] == "cpu" else "the GPU does nothing"
    if max(idle, exposed) < CLEAR:
        kind = max(page["kinds_ms"], key=page["kinds_ms"].get)
        share = page["kinds_ms"][kind] / max(page["compute_ms"], 1e-9)
        return f"device-bound: idle {idle:.0%}, open communication {exposed:.0%}; {kind} are {share:.0%} of compute"
    if exposed > idle:
        return f"communication-bound: for {exposed:.0%} of the time nothing but messages is under way"
    who = max(page["host_in_gaps_ms"], key=page["host_in_gaps_ms"].get)
    return f"host-bound: {cores} for {idle:.0%} of the time; the host's part in it: {who}"


def suspects(trace: Trace) -> dict[str, str]:
    """What wastes time here, of the five usual ones: {name: the evidence in the trace}. Empty when none is seen."""
    finders = {
        "loader": _starving_loader,
        "buckets": _small_messages,
        "activation": _chains_of_small_operations,
        "copies": _pageable_copies,
        "item": _values_read_back,
    }
    return {name: said for name, find in finders.items() if (said := find(trace))}


def _starving_loader(trace: Trace) -> str | None:
    loader = trace.named(LOADER)
    spent = both_ms(gaps(trace), loader)
    if spent < 0.05 * trace.window_ms:
        return None
    ms, share = union_ms(loader) / trace.steps, spent / trace.window_ms
    return f"the data loader takes {ms:.1f} ms per step, and for {share:.0%} of the time the device waits for it"


def _small_messages(trace: Trace) -> str | None:
    messages = communication(trace)
    count, size = len(messages) / trace.steps, message_bytes(messages)
    if count < 12 or (size or 0) > SMALL_MESSAGE:
        return None
    how_large = f"the median one {size / 1e6:.3g} MB" if size else "sizes not recorded"
    return f"{count:.0f} messages per step, {how_large}, {union_ms(messages) / trace.steps:.1f} ms"


def _chains_of_small_operations(trace: Trace) -> str | None:
    """Runs of five and more element-wise operations with nothing else between them, outside of the optimizer."""
    optimizer = trace.named(*OPTIMIZER) if not trace.on_gpu else []
    total, chains, run = 0.0, 0, []
    last = {"name": "the end", "ts": trace.end, "end": trace.end, "dur": 0.0}
    for event in [*(e for e in own_time(compute(trace)) if not _within(e, optimizer)), last]:
        if run and event["ts"] < run[-1]["end"] or NO_WORK.match(event["name"]):
            continue  # part of the operation before, or a view
        if FUSABLE.match(event["name"]):
            run.append(event)
            continue
        if len(run) >= 5:
            total, chains = total + sum(e["dur"] for e in run) / 1e3, chains + 1
        run = []
    if total < 0.04 * union_ms(compute(trace)):
        return None
    per = trace.steps
    return (
        f"{total / per:.1f} ms per step in {chains / per:.0f} chains of 5 and more element-wise operations: fuse them"
    )


def _within(event: dict, spans: list[dict]) -> bool:
    return any(span["ts"] <= event["ts"] < span["ts"] + span["dur"] for span in spans)


def _pageable_copies(trace: Trace) -> str | None:
    paged = [e for e in copies(trace) if "HtoD" in e["name"] and "Pageable" in e["name"]]
    paged = [e for e in paged if e.get("args", {}).get("bytes", 1024) >= 1024]  # a scalar is nobody's batch
    if len(paged) < trace.steps:
        return None
    mb = sum(e.get("args", {}).get("bytes", 0) for e in paged) / trace.steps / 1e6
    return f"{len(paged) / trace.steps:.0f} copies per step from pageable memory ({mb:.2f} MB): the host waits for each"


def _values_read_back(trace: Trace) -> str | None:
    optimizer = trace.named(*OPTIMIZER)
    reads = [e for e in trace.category("cpu_op") if e["name"] == READ_BACK and not _within(e, optimizer)]
    if not reads and trace.on_gpu:  # a trace without the host's operations
        reads = [event for event in copies(trace) if "DtoH" in event["name"]]
    if len(reads) < trace.steps:
        return None
    wait = union_ms(e for e in trace.category("cuda_runtime") if HOST_WAITS.match(e["name"])) / trace.steps
    waited = f"; the host waits {wait:.1f} ms per step for the device" if trace.on_gpu else ""
    return f"{len(reads) / trace.steps:.0f} values per step are read back (.item(), float(), if tensor){waited}"


def waits_for_others_ms(traces: list[Trace]) -> list[float] | None:
    """Milliseconds per step that each rank's messages took longer than the same ones on the quickest rank.

    A collective ends for all at once, so who began it first waits the longest. None when the ranks' counts differ.
    """
    sent = [communication(trace) for trace in traces]
    if len(traces) < 2 or len({len(messages) for messages in sent}) != 1:
        return None
    quickest = [min(event["dur"] for event in same) for same in zip(*sent, strict=True)]
    return [
        sum(event["dur"] - least for event, least in zip(messages, quickest, strict=True)) / 1e3 / trace.steps
        for trace, messages in zip(traces, sent, strict=True)
    ]


def shared_folder(run_dir: str) -> Path:
    """Rank 0's run folder on every rank, there. Collective: a name made of the time may differ by a second."""
    names = [run_dir]
    if dist.is_initialized():
        dist.broadcast_object_list(names)
    Path(names[0]).mkdir(parents=True, exist_ok=True)
    return Path(names[0])


def record_steps(step: Callable[[], object], path: Path, steps: int = 3) -> Trace:
    """Run `step` under the profiler, write a slim trace of the last `steps` runs to `path`, and return it.

    Two runs before warm the profiler up. Every rank calls it, with a path of its own.
    """
    on_cpu = get_accelerator().device_name() == "cpu"
    activities = [ProfilerActivity.CPU] if on_cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=2, active=steps, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        record_shapes=on_cpu,  # gloo's messages have no other size
    ) as profiler:
        for _ in range(2 + steps):
            step()
            profiler.step()
    trace = read_trace(path)
    slim(trace, path)
    return trace


def slim(trace: Trace, path: Path) -> None:
    """Write `trace` packed, without stacks, host name and most arguments: a small part of its size, read alike."""
    facts = {"schemaVersion": 1, "distributedInfo": {"rank": trace.rank}, "displayTimeUnit": "ms"}
    facts["baseTimeNanoseconds"] = int(trace.base * 1e3)
    facts["deviceProperties"] = [{"name": trace.device}] if trace.on_gpu else []
    facts["traceEvents"] = [_slim(event) for event in trace.events if event.get("cat") not in LEFT_OUT]
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(path, "wb", mtime=0) as out:
        out.write(json.dumps(facts, separators=(",", ":")).encode())


def _slim(event: dict) -> dict:
    names = ("correlation", "bytes", *(MESSAGE_ARGS if COMMUNICATION.search(event["name"]) else ()))
    args = {key: event["args"][key] for key in names if key in event.get("args", {})}
    kept = {key: event.get(key) for key in ("ph", "cat", "pid", "tid")} | {"name": event["name"][:120]}
    kept |= {"ts": round(event["ts"], 3), "dur": round(event["dur"], 3)}
    return kept | ({"args": args} if args else {})
