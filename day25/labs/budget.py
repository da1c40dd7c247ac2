"""Day 25: the budget of a run - parameters, tokens, memory, disk, GPU-hours - from the config that will train it.

    python day25/labs/budget.py --config capstone/configs/gpt2.yaml
    python day25/labs/budget.py --gpus 8 --price 3 train.steps=10000

Expect a table of sizes, each with its arithmetic. Money is GPU-hours times the price that you are offered: --price.
Source: Hoffmann et al. 2022 (arXiv:2203.15556), table 3, for 20 tokens a parameter; config/plan.py for memory;
day12/results/speed_h100.json for tokens a second, measured on one H100.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from capstone.config import Config, deepspeed_section, load_config
from common.errors import UserError, clear_errors
from common.model import get_preset
from common.run_log import default_run_dir, show_path
from config.plan import gpt2_model, predict

TOKENS_PER_PARAMETER = 20
BYTES_PER_TOKEN = 11_976_335 / 2_367_891  # of the shipped corpora under GPT-2's tokenizer (data/README.md): English
SPEED = HERE.parent / "day12/results/speed_h100.json"
CASES = {"hf": "transformers", "hf_compiled": "transformers, compiled", "no_average": "day 12's model, all its rungs"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default=default_run_dir("day25"), help="folder for budget.json")
    parser.add_argument("--gpus", type=int, default=1, help="data-parallel GPUs; the global batch stays")
    parser.add_argument("--price", type=float, help="of one GPU for one hour, in your currency")
    parser.add_argument("--config", default="capstone/configs/gpt2.yaml", help="YAML config of the project")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that go before the file's")
    return parser.parse_intermixed_args()  # flags and overrides in any order


def budget(config: Config, gpus: int, price: float | None) -> list[dict]:
    """Rows of {"what", "value", "unit", "from"}."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: a run needs one at least")
    model, ds = gpt2_model(config.model.preset), deepspeed_section(config, gpus)
    micro_batch, accumulation = ds["train_micro_batch_size_per_gpu"], ds.get("gradient_accumulation_steps", 1)
    psi, block_size = model.num_params, get_preset(config.model.preset).block_size
    step_tokens = micro_batch * accumulation * gpus * block_size
    tokens = step_tokens * config.train.steps
    need = predict(model, ds, gpus, block_size, micro_batch)
    rows = []

    def row(what: str, value: float, unit: str, why: str) -> None:
        rows.append({"what": what, "value": value, "unit": unit, "from": why})

    row("parameters", psi / 1e6, "M", f"{model.layers} layers of width {model.hidden}, {model.vocab:,} tokens")
    row("tokens wanted", TOKENS_PER_PARAMETER * psi / 1e9, "G", f"{TOKENS_PER_PARAMETER} a parameter")
    row("tokens a step", step_tokens, "", f"{micro_batch} x {accumulation} x {gpus} x {block_size}")
    row("tokens planned", tokens / 1e9, "G", f"{config.train.steps:,} steps")
    row("text to collect", tokens * BYTES_PER_TOKEN / 1e9, "GB", f"{BYTES_PER_TOKEN:.2f} bytes a token, one epoch")
    row("shards on disk", tokens * 2 / 1e9, "GB", "2 bytes a token")
    row("one checkpoint", 12 * psi / 1e9, "GB", "fp32 weights and two moments, 12 bytes a parameter")
    row("memory of a GPU", need["peak"] / 2**30, "GiB", "config/plan.py, the worst moment of a step")
    measured = json.loads(SPEED.read_text())
    for case, name in CASES.items():
        speed = next(entry for entry in measured["table"] if entry["case"] == case)
        hours = tokens / speed["tokens_per_s"] / 3600
        row(f"GPU-hours: {name}", hours, "h", f"{speed['tokens_per_s']:,.0f} tokens/s on an H100")
        if price is not None:
            row(f"cost: {name}", hours * price, "", f"x {price:g} an hour")
    return rows


def main() -> None:
    args = parse_args()
    config = load_config(args.config, args.overrides)
    if config.model.preset != "gpt2":
        raise UserError(f"the tokens/s of day 12 are GPT-2's: model.preset is {config.model.preset!r}, want 'gpt2'")
    rows = budget(config, args.gpus, args.price)
    for row in rows:
        print(f"{row['what']:<42} {row['value']:>12,.2f} {row['unit']:<4} {row['from']}")
    if args.price is None:
        print("cost = GPU-hours x the price of a GPU-hour (--price), and as much again for runs that fail or compare")
    path = Path(args.run_dir) / "budget.json"
    write_results(path, this_command(), table=rows, by_name={row["what"]: row["value"] for row in rows})
    print(f"table: {show_path(path)}")


if __name__ == "__main__":
    with clear_errors():
        main()
