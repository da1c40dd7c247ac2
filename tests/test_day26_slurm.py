"""Day 26: capstone/deploy/slurm.sh queues the job again in whatever stage its time is up. srun, scontrol: made up."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from capstone.config import ROOT
from tests.launch import PATH

# Two tasks side by side; signals are passed on to them, and the highest exit code is this program's own: man 1 srun.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
tasks = []
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
for rank in "01":
    env = os.environ | {{"SLURM_PROCID": rank, "SLURM_LOCALID": rank}}
    tasks.append(subprocess.Popen(sys.argv[2:], env=env))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = '#!/bin/bash\n[ "$1" = show ] && echo node7 && exit\necho "$@" >> asked\n'
# What stands in for capstone/train.py: a stage without a handler dies of the signal, the training saves and ends well.
STAGES = {
    "prepare": "open(f'began_{rank}', 'w').close(); time.sleep(60)",
    "train": "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0)); open(f'began_{rank}', 'w').close();"
    " time.sleep(60)",
    "evaluate": "signal.signal(signal.SIGUSR1, signal.SIG_DFL); open(f'began_{rank}', 'w').close(); time.sleep(60)",
    "failure": "open(f'began_{rank}', 'w').close(); sys.exit(3 if rank == '1' else 0)",
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_whose_time_is_up_is_queued_again_in_every_stage(stage, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "capstone").mkdir()
    imports = "import os, signal, sys, time; rank = os.environ['RANK']\n"
    (tmp_path / "capstone/train.py").write_text(imports + STAGES[stage] + "\n")
    python = f'#!/bin/bash\n[ "$1" = -c ] && echo {tmp_path}/run && exit\nexec {sys.executable} "$@"\n'  # no config
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"SLURM_JOB_NODELIST": "node7", "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2"}
    env |= {"PYTHON": str(tmp_path / "bin/python"), "PATH": f"{tmp_path / 'bin'}:{PATH}"}
    text = (ROOT / "capstone/deploy/slurm.sh").read_text()
    job = subprocess.Popen(
        ["bash", ROOT / "capstone/deploy/slurm.sh"], cwd=tmp_path, env={**os.environ, **env}, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    began, ends = [tmp_path / "began_0", tmp_path / "began_1"], time.monotonic() + 30
    while not all(map(Path.exists, began)):
        assert time.monotonic() < ends
        time.sleep(0.02)
    if stage != "failure":  # Slurm sends it to the shell (B:), or else to each task
        below = psutil.Process(job.pid).children(recursive=True)
        tasks = [process for process in below if not process.children()]
        for process in [job] if "--signal=B:USR1@" in text else tasks:
            process.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=30)
    if stage == "failure":
        assert job.returncode == 3 and "ended with code 3" in said and not (tmp_path / "asked").exists()
    else:
        assert job.returncode == 0 and "not done, queued again" in said
        assert (tmp_path / "asked").read_text() == "requeue 4711\n"
