"""One command trains, the same command again resumes, and when all is done it says so. Days 02, 12, 17, 18, 25, 26.

    deepspeed --num_accelerators 2 capstone/train.py --config capstone/configs/tiny.yaml
    deepspeed --num_accelerators 2 capstone/train.py --config capstone/configs/tiny.yaml monitor.port=9400

Prepare, train, evaluate, each skipped when it is done. Expect in the run folder: config.yaml (resolved), metrics.jsonl,
tensorboard/, checkpoints/, and in the end model/ (a `transformers` folder) and evaluation.json.
All of it is in capstone/training.py, which programs with more to do import: days 26 to 28.
Checked with deepspeed 0.19.8.
"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from capstone.config import add_config_flags, load_config
from capstone.training import run
from common.errors import clear_errors
from common.ranks import require_launcher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    add_config_flags(parser)
    args = parser.parse_intermixed_args()
    require_launcher()
    run(load_config(args.config, args.overrides, int(os.environ["WORLD_SIZE"])))


if __name__ == "__main__":
    with clear_errors():
        main()
