"""Day 26: the training run as a package - checkpoints, auto-resume, run log, TensorBoard, Prometheus, graceful end.

From the repository root, on two CPU processes or two GPUs; the second command goes on where the first was stopped:

    deepspeed --num_accelerators 2 day26/train.py --run_dir runs/day26/mine --stop_at 250
    deepspeed --num_accelerators 2 day26/train.py --run_dir runs/day26/mine
    deepspeed --num_accelerators 1 day26/train.py --run_dir runs/day26/watched monitor.port=9400
    python day26/labs/kill_test.py

Expect day 25's three stages, a sentence that says where training starts, checkpoints, and in the end "done". All of it
is in capstone/train.py; this program adds the base flags and one line that runs before each forward pass.
Checked with deepspeed 0.19.8. Source: capstone/ (each module says which day it comes from).
"""

import argparse
import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from capstone.config import TINY, Config, load_config
from capstone.train import run
from common.errors import clear_errors
from common.ranks import require_launcher


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON config")  # without it, the section of --config
    parser.add_argument("--steps", type=int, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", help="folder for metrics.jsonl and plots")
    parser.add_argument("--config", default=TINY, help="YAML config of the project")
    parser.add_argument("--stop_at", type=int, help="step in which rank 0 gets SIGTERM, as a scheduler would send it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that go before the file's")
    return parser.parse_intermixed_args()  # flags and overrides in any order


def resolve(args: argparse.Namespace) -> Config:
    """The base flags are short names of keys: they go before the file as every override does."""
    flags = {"run_dir": args.run_dir and str(Path(args.run_dir).resolve()), "deepspeed": args.deepspeed_config}
    flags |= {f"train.{name}": getattr(args, name) for name in ("steps", "log_every", "seed")}
    more = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return load_config(args.config, [*more, *args.overrides], int(os.environ["WORLD_SIZE"]))


def main() -> None:
    args = parse_args()
    require_launcher()

    def on_step(step: int, engine, batch: dict) -> None:
        """Called before each forward pass: where day 27 injects its faults, and this program its signal."""
        if step == args.stop_at and engine.global_rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    run(resolve(args), on_step)


if __name__ == "__main__":
    with clear_errors():
        main()
