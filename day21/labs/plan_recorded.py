"""Day 21: plan_recorded - the plan beside what H200s really took: in day 07's labs, and in this day's plan_check.

From the repository root, one process, no GPU:

    python day21/labs/plan_recorded.py

Expect a row for each recorded run: its shape or strategy, sequences a GPU, predicted and measured peak, their ratio.
Then plan_recorded.json. The prediction is the plan's of today, the measurement what day21/labs/plan_check.py (one H200)
and day 07's labs (GPT-2 XL on two and four, with recomputation) wrote down.
Checked with deepspeed 0.19.8. Source: day21/results/plan_check_1xh200.json; day07/results (compare_xl, offload, speed)
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
from config.plan import gpt2_model, predict
from day21.shapes import build_shape

BF16 = {"bf16": {"enabled": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
COLUMNS = {
    "GPUs": "gpus:d", "batch": "micro_batch:d", "predicted GB": "predicted_bytes:GB", "measured GB": "peak_bytes:GB",
    "predicted/measured": "predicted_of_measured:.3f", "moment": "moment:s",
}  # fmt: skip
HOST = {"device": "cpu"}
ZERO = {  # what these labs gave DeepSpeed, as far as it takes memory (day07/labs/compare.py and speed.py)
    "zero0": {"stage": 0}, "zero1": {"stage": 1, "overlap_comm": True}, "zero2": {"stage": 2, "overlap_comm": True},
    "zero2_offload": {"stage": 2, "overlap_comm": True, "offload_optimizer": HOST}, "zero3_leaf": {"stage": 3},
    "offload_optimizer": {"stage": 3, "offload_optimizer": HOST},
    "offload": {"stage": 3, "offload_optimizer": HOST, "offload_param": HOST},
    "tuned": {"stage": 3, "contiguous_gradients": False},
}  # fmt: skip
FILES = ["compare_xl_2xh200.json", "offload_2xh200.json", "speed_2xh200.json", "speed_4xh200.json"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default=default_run_dir("day21"), help="folder for plan_recorded.json")
    return parser.parse_args()


def add_row(table: Table, case: str, run: dict, need: dict, gpus: int, micro_batch: int) -> None:
    """`run`: the recorded row with its peak; `need`: what the plan says of it."""
    row = {"case": case, "gpus": gpus, "micro_batch": micro_batch, "predicted_bytes": need["peak"]}
    row |= {"peak_bytes": run["peak_bytes"], "predicted_of_measured": need["peak"] / run["peak_bytes"]}
    table.add(row | {"moment": max(need["moments"], key=need["moments"].get)})


def add_this_days(table: Table) -> None:
    """The shapes of plan_check.py, built again without memory to count their parameters."""
    recorded = json.loads((HERE / "results/plan_check_1xh200.json").read_text())
    for run in (run for run in recorded["table"] if "error" not in run):
        shape = argparse.Namespace(**run["shape"])
        _, model = build_shape(shape, "meta")
        zero = {"stage": run["stage"], "overlap_comm": False, "reduce_bucket_size": 50_000_000}
        config = {"zero_optimization": zero, **(BF16 if shape.bf16 else AUTOCAST)}
        more = {"every": max(run["every"], 1), "loss_tiles": run["loss_tiles"]}
        need = predict(model, config, 1, shape.seq_len, shape.micro_batch, "bf16", bool(run["every"]), **more)
        add_row(table, run["case"], run, need, 1, shape.micro_batch)


def main() -> None:
    args = parse_args()
    table = Table(Path(args.run_dir) / "plan_recorded.json", COLUMNS, width=20)
    add_this_days(table)
    model, seen = gpt2_model("gpt2-xl"), set()
    for name in FILES:
        recorded = json.loads((HERE.parent / "day07/results" / name).read_text())
        gpus = recorded["ranks"]
        in_all = re.search(r"--global_batch (\d+)", recorded["command"])
        for run in recorded["table"]:
            batch = run.get("micro_batch") or int(in_all[1]) // gpus
            point = run["case"], gpus, batch
            if run["case"] not in ZERO or "error" in run or point in seen:
                continue
            seen.add(point)
            precision = AUTOCAST if run["case"] == "zero0" else BF16  # as day07/labs/compare.py chose
            config = {"zero_optimization": ZERO[run["case"]] | {"reduce_bucket_size": 10**8}, **precision}
            need = predict(model, config, gpus, 1024, batch, "bf16", checkpointing=True)
            add_row(table, f"xl, {run['case']}", run, need, gpus, batch)
    table.save(worst_apart=max(abs(row["predicted_of_measured"] - 1) for row in table.rows))
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
