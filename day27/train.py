"""Day 27: the watched training - capstone training with its metrics on, and faults on request for the alerts to notice.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day27/train.py
    deepspeed --num_accelerators 2 day27/train.py --fault nan@10 --run_dir runs/day27/broken
    python day27/labs/watch.py --fault nan@20

Expect training as on day 26, and at the end what the endpoints of all ranks say: that is all an alert rule ever sees.
watch.py starts this program under a real Prometheus. Checked with deepspeed 0.19.8. Source: capstone/training.py
"""

import argparse
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from capstone.config import add_base_flags, resolve
from capstone.training import run
from common.errors import clear_errors
from common.ranks import print0, require_launcher
from common.run_log import default_run_dir
from day27.faults import Faults, read_faults


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    add_base_flags(parser)
    parser.set_defaults(steps=150, log_every=25, seed=0, run_dir=default_run_dir("day27"))
    parser.add_argument("--port", type=int, default=9400, help="rank r serves its metrics at port + r")
    parser.add_argument("--fault", nargs="+", default=[], metavar="NAME@SECONDS", help="of day27/faults.py")
    parser.add_argument("--limit_gib", type=float, default=2.0, help="memory limit of a rank that the metrics report")
    return parser.parse_intermixed_args()  # flags and overrides in any order


def what_watching_needs(args: argparse.Namespace) -> dict[str, object]:
    """Keys of the config: endpoints, a data folder that runs share, and what a fault changes."""
    values = {"data.folder": "runs/day27/data", "deepspeed.scheduler.params.total_num_steps": args.steps}
    values |= {"monitor.port": args.port, "monitor.memory_limit_gib": args.limit_gib, "evaluate.items": 1}
    faults = read_faults(args.fault)
    if "no_checkpoint" in faults:
        values["checkpoint.save_every"] = 10**9
    if faults.keys() & {"nan", "diverge", "overflow"}:
        values["checkpoint.stop_at_nan"] = False  # or the run would end before anybody has seen the number
    return values


def main() -> None:
    args = parse_args()
    require_launcher()
    config = resolve(args, what_watching_needs(args))
    faults = Faults(read_faults(args.fault), config.run_path, config.monitor.memory_limit_gib * 2**30)
    port, last_seen = config.monitor.port, {}

    def on_step(step: int, engine, batch: dict) -> None:
        """Before each forward pass: the faults, and near the end a look at what Prometheus would read."""
        faults(step, engine, batch)
        if step == config.train.steps and engine.global_rank == 0 and port:
            for rank in range(engine.world_size):
                with urllib.request.urlopen(f"http://127.0.0.1:{port + rank}/metrics", timeout=10) as page:
                    last_seen[rank] = [
                        line for line in page.read().decode().splitlines() if line.startswith("training_")
                    ]

    start = time.time()
    run(config, on_step)
    for rank, lines in last_seen.items():
        print0(f"rank {rank} at http://127.0.0.1:{port + rank}/metrics, as Prometheus would read it:")
        for line in lines:
            print0(f"  {line}")
    print0(f"watched {time.time() - start:.0f} s | faults: {' '.join(args.fault) or 'none'}")


if __name__ == "__main__":
    with clear_errors():
        main()
