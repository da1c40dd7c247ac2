"""Day 21: plan_recorded - the plan beside what H200s really took: in this day's plan_check, and in day 07's labs.

From the repository root, one process, no GPU:

    python day21/labs/plan_recorded.py

Expect a row for each recorded run: its shape or strategy, sequences a GPU, predicted and measured peak, their ratio.
Then plan_recorded.json. The prediction is the plan's of today, the measurement what day21/labs/plan_check.py (one H200)
and day 07's labs (GPT-2 XL on two and four, Llama 8B on two, with recomputation) wrote down.
Checked with deepspeed 0.19.8. Source: day21/results/plan_check*_1xh200.json; day07/results (compare_xl, offload, speed)
"""

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from common.errors import clear_errors
from common.run_log import default_run_dir
from config.plan import named_model, predict
from day21.shapes import build_shape

BF16 = {"bf16": {"enabled": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
COLUMNS = {
    "GPUs": "gpus:d", "stage": "stage:d", "batch": "micro_batch:d", "tokens": "tokens:,d",
    "predicted GB": "predicted_bytes:GB", "measured GB": "peak_bytes:GB",
    "predicted/measured": "predicted_of_measured:.3f", "moment": "moment:s",
}  # fmt: skip
MODELS = {"gpt2-xl": ("xl", "gpt2-xl"), "llama-8b": ("8b", "llama-3.1-8b")}  # day 07's name: (ours, the plan's)
HOST = {"device": "cpu"}
ZERO = {  # what day07/labs/compare.py gave DeepSpeed, as far as it takes memory; speed.py's rows say it themselves
    case: {"reduce_bucket_size": 10**8, **zero} for case, zero in {
        "zero0": {"stage": 0}, "zero1": {"stage": 1, "overlap_comm": True},
        "zero2": {"stage": 2, "overlap_comm": True}, "zero3_leaf": {"stage": 3},
        "zero2_offload": {"stage": 2, "overlap_comm": True, "offload_optimizer": HOST},
        "offload_optimizer": {"stage": 3, "offload_optimizer": HOST},
        "offload": {"stage": 3, "offload_optimizer": HOST, "offload_param": HOST},
    }.items()
}  # fmt: skip
OURS = ["plan_check_1xh200.json", "plan_check_lora_1xh200.json", "plan_check_zero3_1xh200.json"]
FILES = ["compare_xl_2xh200.json", "offload_2xh200.json", "speed_2xh200.json", "speed_4xh200.json"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default=default_run_dir("day21"), help="folder for plan_recorded.json")
    return parser.parse_args()


def add_row(table: Table, case: str, run: dict, need: dict, gpus: int, micro_batch: int, tokens: int) -> None:
    """`run`: the recorded row with its peak; `need`: what the plan says of it."""
    row = {"case": case, "gpus": gpus, "stage": need["stage"], "micro_batch": micro_batch, "tokens": tokens}
    row |= {"predicted_bytes": need["peak"], "peak_bytes": run["peak_bytes"]}
    row |= {"predicted_of_measured": need["peak"] / run["peak_bytes"]}
    table.add(row | {"moment": max(need["moments"], key=need["moments"].get)})


def add_this_days(table: Table) -> None:
    """The shapes of plan_check.py, built again without memory to count their parameters."""
    recorded = [run for name in OURS for run in json.loads((HERE / "results" / name).read_text())["table"]]
    for run in (run for run in recorded if "error" not in run):
        shape = argparse.Namespace(**run["shape"])
        _, model = build_shape(shape, "meta")
        zero = {"stage": run["stage"], "overlap_comm": False, "reduce_bucket_size": 50_000_000}
        config = {"zero_optimization": zero, **(BF16 if shape.bf16 else AUTOCAST)}
        more = {"every": max(run["every"], 1), "loss_tiles": run["loss_tiles"], **run.get("told", {})}
        need = predict(model, config, 1, shape.seq_len, shape.micro_batch, "bf16", bool(run["every"]), **more)
        add_row(table, run["case"], run, need, 1, shape.micro_batch, shape.seq_len)


def add_day_07s(table: Table) -> None:
    """Each strategy once for each model, number of GPUs and batch."""
    models = {name: named_model(preset) for name, (_, preset) in MODELS.items()}
    seen = set()
    for name in FILES:
        recorded = json.loads((HERE.parent / "day07/results" / name).read_text())
        gpus = recorded["ranks"]
        in_all = re.search(r"--global_batch (\d+)", recorded["command"])
        for run in recorded["table"]:
            batch = run.get("micro_batch") or int(in_all[1]) // gpus
            model, tokens = run.get("model", "gpt2-xl"), run.get("tokens", 1024)
            point = run["case"], model, gpus, batch
            zero = run.get("zero_optimization") or ZERO.get(run["case"])
            if not zero or "error" in run or point in seen:
                continue
            seen.add(point)
            precision = AUTOCAST if run["case"] == "zero0" else BF16  # as day07/labs/compare.py chose
            config = {"zero_optimization": zero, **precision}
            need = predict(models[model], config, gpus, tokens, batch, "bf16", checkpointing=True)
            add_row(table, f"{MODELS[model][0]}, {run['case']}", run, need, gpus, batch, tokens)


def main() -> None:
    args = parse_args()
    table = Table(Path(args.run_dir) / "plan_recorded.json", COLUMNS, width=20)
    add_this_days(table)
    add_day_07s(table)
    apart = [abs(row["predicted_of_measured"] - 1) for row in table.rows]
    table.save(points=len(apart), within_one_percent=sum(far < 0.01 for far in apart), worst_apart=max(apart))
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
