"""Day 24: how long does a step take over a link of known speed - and could you have known?

    sudo .venv/bin/python day24/labs/wire.py

Two hosts with two ranks each. Expect a row for each ZeRO setting and rate: the bytes that left a host in a step,
divided by the parameters' bytes, the step that they predict, and the step as measured: the fastest of all turns, as
ranks that wait for each other meet the delays of all. A minute; root.
Source: day24/notes.md; Rajbhandari et al. 2019, section 7 (https://arxiv.org/abs/1910.02054).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.link import INTERFACE, open_link, sent_over_link
from bench.table import Table
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir

HIDDEN, LAYERS, HOSTS, PER_HOST = 512, 6, 2, 2
NUM_PARAMS = LAYERS * (HIDDEN + 1) * HIDDEN  # 1.6 million
PARAMETER_BYTES = 4 * NUM_PARAMS
BUCKET = 300_000  # elements that are sent as one message, but at stage 0
RATES = {"100mbit": 100e6, "1gbit": 1e9}  # bit/s
STEPS = {"100mbit": 1, "1gbit": 3, None: 5}  # of one turn: the shorter a step, the more a delay matters in it
SHAPE = {rate: f"tbf rate {rate} burst 128kb latency 400ms" for rate in RATES} | {None: "pfifo"}
# What leaves a host, in units of (n - 1)/n times the parameters' bytes on n ranks: an all-reduce 2, a gather 1.
UNITS = {"ZeRO-0": 2, "ZeRO-1": 3, "ZeRO-2": 3, "ZeRO-3": 4, "ZeRO-3 hpZ": 3}
ALWAYS = {"overlap_comm": False, "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
ALWAYS |= {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="turns of all rates: the fastest step counts")
    parser.add_argument("--run_dir", default=default_run_dir("day24"), help="folder for wire.json")
    return parser.parse_args()


def build(case: str) -> deepspeed.DeepSpeedEngine:
    zero = ALWAYS | {"stage": int(case[5])} | ({"zero_hpz_partition_size": PER_HOST} if "hpZ" in case else {})
    optimizer = {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "optimizer": optimizer}
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers)
    config["zero_optimization"] = zero
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def set_rate(rate: str | None) -> None:
    """Shape what this rank's host sends. Collective."""
    if os.environ["LOCAL_RANK"] == "0":
        subprocess.run(["tc", "qdisc", "replace", "dev", INTERFACE, "root", *SHAPE[rate].split()], check=True)
    dist.barrier()


def measure(case: str, turns: int) -> dict:
    """Seconds per step at each rate, and bytes out of this host per step. Collective."""
    engine = build(case)
    inputs = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> float:
        dist.barrier()
        start = time.perf_counter()
        loss = engine(inputs).square().mean()
        engine.backward(loss)
        engine.step()
        dist.barrier()
        return time.perf_counter() - start

    set_rate(None)
    for _ in range(2):
        step()
    before = sent_over_link()
    step()
    sent = sent_over_link() - before
    seconds = {rate: [] for rate in SHAPE}
    for _ in range(turns):
        for rate in SHAPE:
            set_rate(rate)
            seconds[rate] += [step() for _ in range(STEPS[rate])]
    set_rate(None)
    engine.destroy()
    return {"sent": sent / PARAMETER_BYTES, **{str(rate): min(times) for rate, times in seconds.items()}}


def bits_without_limit(case: str, turns: int) -> float:
    """What the link carries without a limit, in messages such as the case sends: bit/s out of a host. Collective."""
    n, stage = dist.get_world_size(), int(case[5])
    message, seconds = torch.ones((NUM_PARAMS, BUCKET, BUCKET, HIDDEN * HIDDEN)[stage]), []
    part = message[: len(message) // n].clone()
    set_rate(None)
    for _ in range(5 * turns):
        dist.barrier()
        start = time.perf_counter()
        if stage == 3:
            dist.all_gather_into_tensor(message, part)
        else:
            dist.all_reduce(message)
        seconds.append(time.perf_counter() - start)
    return (1 if stage == 3 else 2) * (n - 1) / n * 8 * 4 * len(message) / min(seconds)


def as_rank(args: argparse.Namespace) -> None:
    join_world()
    bits = {case: bits_without_limit(case, args.turns) for case in UNITS}
    # hpZ last: its groups stay for the whole process
    found = {case: {"bits": bits[case], **measure(case, args.turns)} for case in UNITS}
    if dist.get_rank() == 0:
        (Path(args.run_dir) / "measured.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    args = parse_args()
    if "RANK" in os.environ:
        return as_rank(args)
    run_dir = Path(args.run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    with open_link(None, HOSTS) as link:
        ended = link.run_ranks("AABB", __file__, "--turns", args.turns, "--run_dir", run_dir)
    if any(rank.returncode for rank in ended):
        raise UserError(next(rank.stderr for rank in ended if rank.returncode)[-1500:])
    n = HOSTS * PER_HOST
    measured = json.loads((run_dir / "measured.json").read_text())
    columns = {"link": "rate:s", "sent": "sent:.2f", "formula": "formula:.2f", "no limit ms": "bare_ms:.0f"}
    columns |= {"predicted ms": "predicted_ms:.0f", "measured ms": "measured_ms:.0f", "ratio": "ratio:.2f"}
    table = Table(run_dir / "wire.json", columns, parameter_bytes=PARAMETER_BYTES, ranks=n)
    for rate, bits in RATES.items():
        for case, found in measured.items():
            formula = UNITS[case] * (n - 1) / n
            row = {"case": case, "rate": rate, "sent": found["sent"], "formula": formula, "bare_bits": found["bits"]}
            row["bare_ms"] = 1e3 * found["None"]
            slower = 1 / bits - 1 / found["bits"]  # the step without a limit has paid for its bytes, at that speed
            row["predicted_ms"] = row["bare_ms"] + 1e3 * 8 * formula * PARAMETER_BYTES * slower
            row["measured_ms"] = 1e3 * found[rate]
            table.add(row | {"ratio": row["measured_ms"] / row["predicted_ms"]})
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
