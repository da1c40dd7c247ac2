"""Day 19: a trace is read as arithmetic says, FLOPs are counted as on paper, and planted problems are found."""

import gzip
import json
import math

import pytest
import torch

from common.errors import UserError
from common.model import get_preset
from day19 import train
from day19.exercise import wrong_names
from day19.flops import forward_flops, utilisation
from day19.labs import case_study, compilers, cost, overlap, roofline
from day19.labs.read_trace import main as read_trace_main
from day19.traces import (
    both_ms,
    gaps,
    labels,
    own_time,
    read_trace,
    slim,
    summarize,
    suspects,
    waits_for_others_ms,
)
from tests.launch import SMALL_CORPUS, error_line, measure_again, run_answer, run_day, run_ranks, run_warm
from tests.render import ROOT

RECORDED = sorted(ROOT.glob("day19/results/*.json.gz"))


def event(name, cat, ts, dur, tid=1, **args):
    """An event as Kineto writes it, times in us."""
    return {"ph": "X", "name": name, "cat": cat, "pid": 0, "tid": tid, "ts": ts, "dur": dur, "args": args}


def gpu_events(rank=0):
    """One step of 10 ms: 6 ms of products, 4 ms of NCCL of which 2 are hidden, a copy, and a gap of 1.5 ms."""
    gemm = "sm90_xmma_gemm_bf16bf16"
    nccl = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    return [
        event("ProfilerStep#3", "user_annotation", 0, 10_000),
        event("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", "user_annotation", 0, 1_400),
        event("forward", "user_annotation", 1_500, 3_000),
        event("forward", "gpu_user_annotation", 2_000, 3_000, tid=7),
        event("cudaMemcpyAsync", "cuda_runtime", 1_400, 90, correlation=1),
        event("Memcpy HtoD (Pageable -> Device)", "gpu_memcpy", 1_500, 500, 7, bytes=4_000_000, correlation=1),
        event("cudaLaunchKernel", "cuda_runtime", 1_500, 5, correlation=2),
        event("cudaLaunchKernel", "cuda_runtime", 1_600, 5, correlation=3),
        event(gemm, "kernel", 2_000, 4_000, 7, correlation=2),
        event(nccl, "kernel", 4_000, 4_000 + 1_000 * rank, 20, **{"In msg nelems": 1_000_000, "dtype": "BFloat16"}),
        event(gemm, "kernel", 8_000, 2_000, 7, correlation=3),
        event("aten::item", "cpu_op", 5_000, 100),
        event("aten::_local_scalar_dense", "cpu_op", 5_010, 80),
        event("cudaStreamSynchronize", "cuda_runtime", 5_020, 60),
    ]


def write(path, events, rank=0, gpu=True):
    facts = {"traceEvents": events, "distributedInfo": {"rank": rank}, "baseTimeNanoseconds": 10**18, "host_name": "me"}
    facts["deviceProperties"] = [{"name": "NVIDIA H200"}] if gpu else []
    text = json.dumps(facts).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return path


def kernels(*names):
    return [event(name, "kernel", 100 * n, 100, 7) for n, name in enumerate(names)]


STEP = event("ProfilerStep#1", "user_annotation", 0, 1000)
NEXT = event("enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", "user_annotation", 0, 500)
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"
COPY = "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>"
FUSED_ADAM = "void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor>"


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz", "trace.pt.trace.json.gz"])
def test_a_gpu_trace_adds_up(name, tmp_path):
    page = summarize(read_trace(write(tmp_path / name, gpu_events())))
    assert (page["device"], page["steps"], page["step_ms"]) == ("NVIDIA H200", 1, 10)
    assert (page["compute_ms"], page["comm_ms"], page["copy_ms"]) == (6, 4, 0.5)
    assert (page["overlap_ms"], page["exposed_ms"], page["hidden"]) == (2, 2, 0.5)  # 6 + 4 - 8
    assert page["idle_ms"] == 1.5
    assert page["host_in_gaps_ms"]["data loader"] == pytest.approx(1.4)
    assert page["launch_delay_us"] == (500 + 6_400) / 2 and page["message_bytes"] == 2e6
    assert page["labels_ms"] == {"forward": 3.0}
    assert page["kinds_ms"]["products"] == 6 and page["verdict"].startswith("communication-bound: for 20%")
    assert page["longest_gaps"][0] == {"at_ms": 0, "ms": 1.5, "host": "data loader"}


def test_the_recorded_gpu_traces_show_what_is_planted_and_what_is_hidden():
    """From two H200s: nobody needs one to read them."""
    traces = {path.name.removesuffix("_2xh200.json.gz"): read_trace(path) for path in RECORDED if "xh200" in path.name}
    assert list(suspects(traces["case_slow_rank0"])) == ["loader", "buckets", "activation", "copies", "item"]
    assert suspects(traces["case_item_rank0"]) == {}
    rows = json.loads((ROOT / "day19/results/case_2xh200.json").read_text())["table"]
    assert rows[-1]["total"] > 5 and max(row["losses_apart"] for row in rows) < 1e-3
    naive, ddp = (summarize(traces[f"overlap_{case}_rank0"]) for case in ("naive", "ddp"))
    assert naive["hidden"] < 0.01 and ddp["hidden"] > 0.9
    assert (naive["messages"], ddp["messages"]) == (16, 8)  # a weight and a bias in 8 layers; a bucket a layer


def test_parts_of_the_window_add_up():
    for path in RECORDED:
        trace = read_trace(path)
        page = summarize(trace)
        busy = page["compute_ms"] + page["comm_ms"] - page["overlap_ms"]
        assert busy <= page["step_ms"] - page["idle_ms"] + 1e-6
        if not trace.on_gpu:  # on a GPU copies run beside both
            assert busy == pytest.approx(page["step_ms"] - page["idle_ms"], rel=1e-6)
        assert sum(page["host_in_gaps_ms"].values()) == pytest.approx(page["idle_ms"], rel=1e-6)
        assert both_ms(gaps(trace), gaps(trace)) == pytest.approx(page["idle_ms"] * page["steps"])
        assert path.stat().st_size < 600_000 and b"host_name" not in gzip.decompress(path.read_bytes())


def test_what_goes_on_at_the_end_is_cut(tmp_path):
    message = event("gloo:all_reduce", "user_annotation", 900, 500, tid=2)
    page = summarize(read_trace(write(tmp_path / "cut.json", [STEP, event("aten::mm", "cpu_op", 0, 900), message])))
    assert (page["step_ms"], page["compute_ms"], page["comm_ms"], page["idle_ms"]) == (1, 0.9, 0.1, 0)


def test_work_that_was_launched_before_the_recorded_steps_is_left_out(tmp_path):
    """The host is a step ahead: the device works off two steps while two are recorded, and one of an earlier one."""
    events = [event(f"ProfilerStep#{n}", "user_annotation", 100 * n, 100) for n in (0, 1)]
    events += [event("cudaLaunchKernel", "cuda_runtime", 100 * n, 5, correlation=n) for n in (0, 1)]
    events += [event("gemm", "kernel", 1_000 * n, 1_000, 7, correlation=n) for n in (0, 1)]
    events = [{**e, "ts": e["ts"] + 1_000} if e["cat"] == "kernel" else e for e in events]
    earlier = event("gemm", "kernel", -500, 1_500, 7, correlation=99)
    page = summarize(read_trace(write(tmp_path / "ahead.json", [*events, earlier])))
    assert (page["step_ms"], page["compute_ms"], page["idle_ms"], page["operations"]) == (1, 1, 0, 1)
    assert page["launch_delay_us"] == (1_000 + 1_900) / 2


def test_nested_operations_count_once():
    events = [event("aten::linear", "cpu_op", 0, 10), event("aten::addmm", "cpu_op", 2, 6), event("b", "cpu_op", 10, 5)]
    events.append(event("aten::mm", "cpu_op", 3, 4, tid=2))
    own = {e["name"]: e["dur"] for e in own_time(events)}
    assert own == {"aten::linear": 4, "aten::addmm": 6, "b": 5, "aten::mm": 4}


def test_a_wait_within_the_backward_pass_is_no_compute(tmp_path):
    """DeepSpeed on gloo waits for a bucket inside of autograd's span: it computes nothing there."""
    events = [
        event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", "cpu_op", 0, 900),
        event("torch::autograd::AccumulateGrad", "cpu_op", 0, 900),
        event("c10d::allreduce_", "cpu_op", 5, 10),
        event(
            "gloo:all_reduce", "user_annotation", 10, 800, tid=2, **{"Input Dims": [[50, 2]], "Input type": ["float"]}
        ),
        event("aten::mm", "cpu_op", 900, 100),
    ]
    page = summarize(read_trace(write(tmp_path / "cpu.json", events, gpu=False)))
    assert (page["compute_ms"], page["comm_ms"], page["hidden"]) == (0.1, 0.8, 0)
    assert page["message_bytes"] == 400 and page["verdict"].startswith("communication-bound")


def test_ranks_that_wait_for_others(tmp_path):
    traces = [read_trace(write(tmp_path / f"{rank}.json", gpu_events(rank), rank)) for rank in (0, 1)]
    assert waits_for_others_ms(traces) == [0, 1]
    assert waits_for_others_ms(traces[:1]) is None
    fewer = write(tmp_path / "2.json", [e for e in gpu_events() if "nccl" not in e["name"]], 2)
    assert waits_for_others_ms([*traces, read_trace(fewer)]) is None


def test_a_slim_copy_reads_alike(tmp_path):
    trace = read_trace(write(tmp_path / "whole.json", [*gpu_events(), event("f", "python_function", 1, 2)]))
    slim(trace, tmp_path / "slim.json.gz")
    again = read_trace(tmp_path / "slim.json.gz")
    assert summarize(again) == summarize(trace) and suspects(again) == suspects(trace)
    assert b"python_function" not in gzip.decompress((tmp_path / "slim.json.gz").read_bytes())


@pytest.mark.parametrize(
    ("name", "guilty", "innocent"),
    [
        (
            "loader",
            [
                STEP,
                event("enumerate(DataLoader)#_Multi", "user_annotation", 0, 500),
                event("gemm", "kernel", 500, 500, 7),
            ],
            [
                STEP,
                event("enumerate(DataLoader)#_Multi", "user_annotation", 0, 500),
                event("gemm", "kernel", 0, 1000, 7),
            ],
        ),
        ("activation", kernels("gemm", *[ELEMENTWISE] * 5, "gemm"), kernels("gemm", *[ELEMENTWISE, COPY] * 5, "gemm")),
        ("activation", kernels("gemm", *[ELEMENTWISE] * 8), kernels("gemm", *[FUSED_ADAM] * 8)),
        (
            "buckets",
            [*kernels("gemm"), *[event("ncclDevKernel_AllReduce", "kernel", n, 1, 20) for n in range(12)]],
            [*kernels("gemm"), *[event("ncclDevKernel_AllReduce", "kernel", n, 1, 20) for n in range(11)]],
        ),
        (
            "copies",
            [*kernels("gemm"), event("Memcpy HtoD (Pageable -> Device)", "gpu_memcpy", 0, 9, 7, bytes=4096)],
            [
                *kernels("gemm"),
                event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 0, 9, 7, bytes=4096),
                event("Memcpy HtoD (Pageable -> Device)", "gpu_memcpy", 0, 9, 7, bytes=4),
            ],
        ),
        (
            "item",
            [*kernels("gemm"), event("aten::_local_scalar_dense", "cpu_op", 1, 5)],
            [
                *kernels("gemm"),
                event("Optimizer.step#AdamW.step", "user_annotation", 0, 9),
                event("aten::_local_scalar_dense", "cpu_op", 1, 5),
            ],
        ),
        (
            "item",
            [*kernels("gemm"), event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 0, 9, 7, bytes=4)],
            kernels("gemm"),
        ),
    ],
)
def test_each_suspect_has_its_sign_and_no_other(name, guilty, innocent, tmp_path):
    assert list(suspects(read_trace(write(tmp_path / "guilty.json", guilty)))) == [name]
    assert suspects(read_trace(write(tmp_path / "innocent.json", innocent))) == {}


def test_verdicts(tmp_path):
    late = [event("cudaLaunchKernel", "cuda_runtime", 0, 900), event("gemm", "kernel", 900, 100, 7)]
    host = summarize(
        read_trace(write(tmp_path / "host.json", [event("ProfilerStep#1", "user_annotation", 0, 1), *late]))
    )
    assert host["verdict"] == (
        "host-bound: the GPU does nothing for 90% of the time; the host's part in it: operations and launches"
    )
    device = summarize(read_trace(write(tmp_path / "device.json", kernels("gemm", "gemm", ELEMENTWISE))))
    assert device["verdict"] == "device-bound: idle 0%, open communication 0%; products are 67% of compute"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no trace "),
        (b"", "is no whole Chrome trace"),
        (b"%PDF-1.4 \xff\xfe", "is no whole Chrome trace"),
        (gzip.compress(b'{"traceEvents": []}', mtime=0)[:-9], "is no whole Chrome trace"),
        (b'{"traceEvents": [{"ph": "X", "ts"', "is no whole Chrome trace"),
        (b"[" * 100_000, "is no whole Chrome trace"),
        (b'{"table": []}', "is no Chrome trace: it has no list 'traceEvents'"),
        (b"3", "is no Chrome trace: it has no list 'traceEvents'"),
        (b'[{"ph": "X", "cat": "v8", "name": "gc", "ts": 1, "dur": 2}]', "of PyTorch in it (categories: v8)"),
        (b'[{"ph": "X", "cat": "kernel", "name": "k", "ts": "1", "dur": 2}, 7, null]', "(categories: none)"),
    ],
)
def test_what_is_no_trace_gets_one_sentence(content, sentence, tmp_path):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_trace(path)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_events_in_a_bare_list_and_odd_facts_are_read(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(gpu_events()))
    assert summarize(read_trace(path))["hidden"] == 0.5
    path.write_text(json.dumps({"traceEvents": gpu_events(), "deviceProperties": None, "distributedInfo": None}))
    assert read_trace(path).device == "GPU"


def test_flops_on_paper():
    preset = get_preset("mini")
    parts = forward_flops(preset, 4096, 2)
    layers, hidden, tokens = preset.num_layers, preset.hidden, 2 * preset.block_size
    assert sum(parts.values()) == 2 * tokens * (layers * 12 * hidden**2 + 4096 * hidden) + (
        layers * 4 * 2 * preset.block_size**2 * hidden
    )
    assert utilisation(1e12, 0.5, 10e12) == pytest.approx(0.6) and utilisation(1e12, 0.5, 10e12, 4) == pytest.approx(
        0.8
    )


@pytest.mark.launch
def test_counters_agree_with_paper(tmp_path):
    run_warm("day19/labs/count_flops.py", "--model", "tiny", "--micro_batch", 1, "--no_compile", "--run_dir", tmp_path)
    ratios = {row["case"]: row["ratio"] for row in json.loads((tmp_path / "flops.json").read_text())["table"]}
    assert ratios["DeepSpeed, eager attention"] == pytest.approx(1, abs=0.01)
    assert ratios["DeepSpeed, sdpa attention"] == pytest.approx(1, abs=0.01)
    assert ratios["PyTorch, eager attention"] == pytest.approx(1, abs=1e-6)
    assert ratios["PyTorch, with backward"] == pytest.approx(3, abs=1e-6)
    parts = forward_flops(get_preset("tiny"), 4096, 1)
    scores = parts["attention scores"] / sum(parts.values())  # PyTorch's counter has no formula for the CPU's kernel
    assert ratios["PyTorch, sdpa attention"] == pytest.approx(1 - scores, abs=1e-6)
    assert ratios["recomputing: DeepSpeed"] == pytest.approx(1, abs=0.01)
    left_on = ratios["recomputing: DeepSpeed, left on in backward"]
    # The blocks once more, without their last product: recomputation stops when it has what backward needs.
    again = (parts["attention projections"] + parts["attention scores"] + parts["perceptron"] / 2) / sum(parts.values())
    assert left_on == pytest.approx(1 + again, abs=0.01)
    more = ratios["recomputing: PyTorch, with backward"] - ratios["PyTorch, with backward"]
    assert more == pytest.approx(again, abs=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """train.py once through the launcher."""
    run_dir = tmp_path_factory.mktemp("train")
    flags = ["--steps", 12, "--log_every", 6, "--corpus", SMALL_CORPUS, "--run_dir", run_dir]
    return run_day("day19/train.py", *flags), run_dir


@pytest.mark.launch
def test_train_reports_what_the_tools_say(trained):
    run, run_dir = trained
    assert "zero stage 1 | flops profiler by JSON False | breakdown False" in run.stdout
    (counted,) = [line for line in run.stdout.splitlines() if line.startswith("forward pass of step 3: ")]
    assert float(counted.rpartition("(")[2].rstrip(")")) == pytest.approx(1, abs=0.01)
    assert "fwd flops per GPU" in (run_dir / "flops_profile.txt").read_text()
    assert "trace of 3 steps: " in run.stdout and "MFU " in run.stdout
    assert run.held_out[12] < run.held_out[0]
    traces = [read_trace(run_dir / f"trace_rank{rank}.json.gz") for rank in (0, 1)]
    assert [(trace.rank, trace.steps, trace.device) for trace in traces] == [(0, 3, "cpu"), (1, 3, "cpu")]
    assert "fetch the batch" in {event["name"] for event in labels(traces[0])}
    assert summarize(traces[0])["comm_ms"] > 0


def read_page(monkeypatch, *words):
    """labs/read_trace.py, in this process: it starts no ranks."""
    monkeypatch.setattr("sys.argv", ["day19/labs/read_trace.py", *map(str, words)])
    read_trace_main()


@pytest.mark.launch
def test_a_page_of_two_ranks(trained, tmp_path, monkeypatch, capsys):
    names = [trained[1] / f"trace_rank{rank}.json.gz" for rank in (1, 0)]
    read_page(monkeypatch, *names, "--slim", tmp_path / "slim", "--run_dir", tmp_path)
    said = capsys.readouterr().out
    assert "rank 0      rank 1" in said and "waits for other ranks" in said and "fetch the batch" in said
    pages = json.loads((tmp_path / "page.json").read_text())["table"]
    assert [page["rank"] for page in pages] == [0, 1] and min(page["waits_ms"] for page in pages) >= 0
    assert (tmp_path / "timeline.png").stat().st_size > 5_000
    sizes = [(tmp_path / "slim" / name.name).stat().st_size / name.stat().st_size for name in names]
    assert max(sizes) < 0.7


def test_a_page_refuses_in_one_sentence(tmp_path, monkeypatch):
    gpu, cpu = (
        write(tmp_path / "gpu.json", gpu_events()),
        write(tmp_path / "cpu.json", [event("aten::mm", "cpu_op", 0, 1)]),
    )
    for words, sentence in (
        (["day19/ds_config.json"], "day19/ds_config.json is no Chrome trace: it has no list 'traceEvents'"),
        ([gpu, cpu], "these traces are of a CPU and of a GPU: ranks of one run, please"),
        ([gpu, "--window", "3", "1"], "--window 3 1: FROM lies before TO"),
    ):
        with pytest.raises(UserError) as refused:
            read_page(monkeypatch, *words, "--run_dir", tmp_path)
        assert str(refused.value) == sentence


@pytest.mark.launch
@pytest.mark.serial
@measure_again
def test_ddp_hides_more_than_naive(tmp_path):
    flags = ["--cases", "naive", "ddp", "--turns", 2, "--hidden", 384, "--tokens", 384, "--run_dir", tmp_path]
    run_ranks("day19/labs/overlap.py", *flags, ranks=2)
    naive, ddp = json.loads((tmp_path / "overlap.json").read_text())["table"]
    assert naive["hidden"] < 0.05 and ddp["hidden"] > naive["hidden"] + 0.1
    assert naive["messages"] == 16 and ddp["messages"] < 16  # 8 weights and 8 biases; buckets of 1 MB
    assert read_trace(tmp_path / "overlap_ddp_rank1.json.gz").rank == 1


@pytest.mark.launch
@pytest.mark.serial
@measure_again
def test_the_case_study_finds_what_is_planted_and_only_that(tmp_path):
    sizes = ["--turns", 2, "--window", 1, "--trace_steps", 2, "--micro_batch", 2]
    run_ranks("day19/labs/case_study.py", *sizes, "--corpus", SMALL_CORPUS, "--run_dir", tmp_path, ranks=2)
    rows = json.loads((tmp_path / "case.json").read_text())["table"]
    on_cpu = ["loader", "buckets", "activation", "item"]  # pageable memory shows on a GPU: the recorded trace has it
    assert list(rows[0]["suspects"]) == on_cpu
    for row, cured in zip(rows[1:], ("loader", "buckets", "activation", "copies", "item"), strict=True):
        on_cpu = [name for name in on_cpu if name != cured]
        assert list(row["suspects"]) == on_cpu, row["case"]
    assert max(row["losses_apart"] for row in rows) < 1e-3  # python_gelu rounds otherwise: 2e-6 in fp32
    assert rows[0]["messages"] > 10 > rows[2]["messages"] and rows[3]["operations"] < rows[2]["operations"]
    assert rows[-1]["total"] > 1.05


@pytest.mark.launch
def test_the_other_labs_at_their_smallest(tmp_path):
    sizes = ["--turns", 2, "--window", 1, "--micro_batch", 1]
    run_ranks("day19/labs/cost.py", *sizes, "--run_dir", tmp_path, ranks=1)
    rows = json.loads((tmp_path / "cost.json").read_text())["table"]
    assert [row["case"] for row in rows][:2] == ["none", "wall_clock_breakdown"] and rows[0]["slower"] == 1
    run_warm("day19/labs/roofline.py", "--tokens", 512, "--hidden", 128, "--repeats", 1, "--run_dir", tmp_path)
    found = json.loads((tmp_path / "roofline.json").read_text())
    for row in found["table"]:
        under = min(found["peak_gflops"], row["intensity"] * found["bandwidth_gb_per_s"])
        assert row["roof_gflops"] == pytest.approx(under)
        assert math.isclose(row["share"], row["gflops"] / row["roof_gflops"])
        assert row["limit"] == ("memory" if row["intensity"] < found["corner"] else "arithmetic")
    assert (tmp_path / "roofline.png").exists()
    sizes = ["--cases", "eager", "--steps", 3, "--tokens", 32, "--hidden", 64, "--layers", 1]
    run_ranks("day19/labs/compilers.py", *sizes, "--run_dir", tmp_path, ranks=1)
    (row,) = json.loads((tmp_path / "compilers.json").read_text())["table"]
    assert row["operations"] > 100 and row["losses"][-1] < row["losses"][0]


@pytest.mark.parametrize(
    ("lab", "flags", "sentence"),
    [
        (train, "--steps 9", "--steps 9: the profiler records steps 8 to 10, so at least 10"),
        (case_study, "--turns 1", "--turns 1 --window 3 --trace_steps 2: two turns or more"),
        (overlap, "--tokens 0", "--hidden 512 --layers 8 --tokens 0 --bucket_mb 1 --turns 6: sizes are positive"),
        (cost, "--window 0", "--turns 9 --window 0: two turns or more"),
        (roofline, "--tokens 100", "--tokens 100 --hidden "),
        (
            compilers,
            "--hidden 100",
            "--hidden 100 --layers 2 --tokens 128 --micro_batch 2 --steps 8: hidden",
        ),
    ],
)
def test_bad_flags_get_one_sentence(lab, flags, sentence, monkeypatch):
    """Before anything is started."""
    monkeypatch.setattr("sys.argv", [lab.__file__, *flags.split()])
    with pytest.raises(UserError) as refused:
        lab.main()
    assert str(refused.value).startswith(sentence)


@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepCompile runs here")
def test_deepcompile_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--cases", "deepcompile"])
    with pytest.raises(UserError, match="--cases deepcompile: DeepCompile needs CUDA"):
        compilers.main()


def test_wrong_names_get_one_sentence():
    planted = {"mask", "loss", "average"}
    assert wrong_names({"mask", "loss", "feed_forward"}, planted).startswith("names 'feed_forward': it takes no longer")
    assert wrong_names({"mask", "loss"}, planted) == "names 2 of 3 hot spots."
    assert wrong_names({"backward"}, planted).startswith("names 'backward', which is no part: embed, mask")
    assert wrong_names(planted, planted) is None


WRONG_LOSS = (
    "loss = lambda self, x, ids: F.cross_entropy(F.linear(x, self.weights['tokens']).flatten(0, 1), ids.flatten())"
)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (WRONG_LOSS, "rank 0 has losses "),
        ("cures = lambda: {}", "rank 0 is "),
    ],
)
def test_wrong_cures_get_one_sentence(change, sentence, tmp_path):
    run = run_answer("day19", change, tmp_path)
    assert run.code != 0 and f"not yet: {sentence}" in error_line(run) and "Traceback" not in run.stderr
