"""Day 26: the training run as a package - checkpoints, auto-resume, run log, TensorBoard, Prometheus, graceful end.

From the repository root, on two CPU processes or two GPUs; the second command goes on where the first was stopped:

    deepspeed --num_accelerators 2 day26/train.py --run_dir runs/day26/mine --stop_at 250
    deepspeed --num_accelerators 2 day26/train.py --run_dir runs/day26/mine
    deepspeed --num_accelerators 1 day26/train.py --run_dir runs/day26/watched monitor.port=9400
    python day26/labs/kill_test.py

Expect day 25's three stages, a sentence that says where training starts, checkpoints, and in the end "done". All of it
is in capstone/training.py; this program adds the base flags and one line that runs before each forward pass.
Checked with deepspeed 0.19.8. Source: capstone/ (each module says which day it comes from).
"""

import argparse
import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from capstone.config import add_base_flags, resolve
from capstone.training import run
from common.errors import clear_errors
from common.ranks import require_launcher


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    add_base_flags(parser)
    parser.add_argument("--stop_at", type=int, help="step in which rank 0 gets SIGTERM, as a scheduler would send it")
    return parser.parse_intermixed_args()  # flags and overrides in any order


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
