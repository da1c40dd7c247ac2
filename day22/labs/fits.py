"""Day 22: fits - which strategy full fine-tuning needs: model size against GPU memory, by config/plan.py's arithmetic.

    python day22/labs/fits.py
    python day22/labs/fits.py --seq_len 4096 --host_mem 512

Expect a row for each model and number of GPUs: the states (16 bytes a parameter), and the fastest template of config/
that fits into 8, 16, 24, 80 GiB. A prediction, not a run.
Source: config/plan.py, which shows each line of the arithmetic; arXiv:1910.02054.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from common.run_log import default_run_dir
from config import plan

MEMORIES = (8, 16, 24, 80)  # GiB of a GPU
# (what it is called, parameters, layers, hidden size, heads, vocabulary)
MODELS = [
    ("SmolLM2 135M", "135M", 30, 576, 9, 49152),
    ("Llama 3.2 1B", "1.24B", 16, 2048, 32, 128256),
    ("Llama 3.1 8B", "8.03B", 32, 4096, 32, 128256),
    ("Llama 2 13B", "13B", 40, 5120, 40, 32000),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default=default_run_dir("day22"), help="folder for fits.json")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens a sample")
    parser.add_argument("--host_mem", type=int, default=256, help="GiB of a machine, for offload")
    args = parser.parse_args()
    columns = {"states GiB": "states_gib:.1f"}
    columns |= {f"{f'in {memory} GiB':>17}": f"gib_{memory}:s" for memory in MEMORIES}  # as wide as the longest name
    table = Table(Path(args.run_dir) / "fits.json", columns, width=22)
    for name, params, layers, hidden, heads, vocab in MODELS:
        model = plan.assumed_model(plan.parse_count(params), layers, hidden, heads, vocab)
        for gpus in (1, 4):
            states_gib = 16 * model.num_params / plan.GIB
            row = {"case": f"{name}, {gpus} GPU", "model": name, "gpus": gpus, "states_gib": states_gib}
            for memory in MEMORIES:
                asked = ["--params", params, "--gpus", gpus, "--gpu_mem", memory, "--host_mem", args.host_mem]
                asked += ["--seq_len", args.seq_len, "--micro_batch", 1, "--checkpointing"]
                wanted = plan.parse_args([str(word) for word in asked])
                chosen = plan.recommend(plan.make_plan(model, wanted), gpus)
                row[f"gib_{memory}"] = chosen["name"].replace("_bf16", "") if chosen else "-"
            table.add(row)
    table.close()


if __name__ == "__main__":
    main()
