"""Day 26's program with a loss that is NaN in one step on the last rank: one bad batch. Started by test_day26.py."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from capstone.config import add_base_flags, resolve
from capstone.training import run
from common.errors import clear_errors

BAD_STEP = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    add_base_flags(parser)
    bad = []

    def on_step(step: int, engine, batch: dict) -> None:
        if not bad and engine.global_rank == engine.world_size - 1:
            engine.module.register_forward_hook(spoil)
        bad.append(step)

    def spoil(module, given, out):
        if module.training and bad[-1] == BAD_STEP:
            out.loss = out.loss * float("nan")
        return out

    run(resolve(parser.parse_intermixed_args()), on_step)


if __name__ == "__main__":
    with clear_errors():
        main()
