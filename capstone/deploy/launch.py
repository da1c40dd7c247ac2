"""What a container starts as its first process: a rank for each GPU, or two on CPU, and signals passed on. Day 28.

    python capstone/deploy/launch.py --config capstone/configs/tiny.yaml

The `deepspeed` launcher gives each rank 30 s after SIGTERM, one after another; the ranks then wait for each other at
the step's end and cannot save together (day 17). This one sends the signal to all of them, waits for them, and
ends with 128 + signal, so that whoever started it knows that there is more to do.
It is not bench/world.py's way of starting ranks, which is for labs: a container's first process has to pass signals on,
and stands alone, with nothing to import but PyTorch. Under Slurm srun starts the ranks itself (slurm.sh).
Source: deepspeed 0.19.8, launcher/launch.py.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import torch


def main() -> None:
    ranks = int(os.environ.get("RANKS") or torch.accelerator.device_count() or 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "capstone/train.py", *sys.argv[1:]]
    processes, asked_to_stop = [], []

    def pass_on(number: int, frame: object) -> None:
        asked_to_stop.append(number)
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, pass_on)
    for rank in range(ranks):
        rank_env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=rank_env, start_new_session=True))
    codes = [None] * ranks
    while None in codes:
        codes = [process.poll() for process in processes]
        if code := next((code for code in codes if code), 0):  # one lost, all lost: they wait for each other
            for process in processes:
                process.kill()
            sys.exit(code if code > 0 else 128 - code)  # as a shell says it: 137 for SIGKILL
        time.sleep(0.2)
    if asked_to_stop:  # saved, not done: with 0, Kubernetes would call the job complete
        sys.exit(128 + asked_to_stop[0])


if __name__ == "__main__":
    main()
