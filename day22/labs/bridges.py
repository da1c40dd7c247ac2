"""Day 22: bridges - the same 20 updates by our loop, the Trainer, Accelerate and TRL: how far apart are the losses?

    python day22/labs/bridges.py
    python day22/labs/bridges.py --pretrained smollm2 --lr 5e-5

Expect a row for each: the held-out loss before and after, and the largest difference of a step's loss to our loop's.
All four in fp32 and at ZeRO-3, with the same batches in the same order.
Checked with deepspeed 0.19.8, transformers 5.20, accelerate 1.15, trl 1.16. Source: day22/train.py and its namesakes.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import losses_apart
from bench.world import default_ranks, launch
from common.errors import clear_errors
from common.run_log import default_run_dir, median_speed, read_rows

# who -> (script, flags of its own)
WAYS = {
    "our loop": ("train.py", ["--deepspeed_config", HERE / "ds_config_fp32.json", "--log_every", 1, "--new_tokens", 0]),
    "Trainer": ("train_hf.py", ["--fp32"]),
    "Accelerate": ("train_accelerate.py", ["--fp32"]),
    "TRL": ("train_trl.py", ["--fp32"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default=default_run_dir("day22"), help="folder for bridges.json and the runs")
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="processes of each run")
    parser.add_argument(
        "--pretrained", default="tiny-llama", help="smollm2, a preset of pretrained.py, a folder, a hub name"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    args = parser.parse_args()
    shared = ["--pretrained", args.pretrained, "--steps", args.steps, "--lr", args.lr]
    columns = {"before": "before:.4f", "after": "after:.4f", "largest difference": "apart:.1e"}
    table = Table(Path(args.run_dir) / "bridges.json", columns | {"tok/s": "tokens_per_s:,.0f"})
    for way, (script, flags) in WAYS.items():
        folder = Path(args.run_dir) / script.removesuffix(".py")
        launch(args.ranks, HERE / script, *shared, *flags, "--run_dir", folder)
        rows = read_rows(folder)
        held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
        row = {"case": way, "losses": [row["loss"] for row in rows if "loss" in row]}
        first = table.rows[0] if table.rows else row
        row |= {"before": held_out[0], "after": held_out[-1], "apart": losses_apart(row["losses"], first["losses"])}
        table.add(row | {"tokens_per_s": median_speed(rows)})
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
