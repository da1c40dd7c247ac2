"""Day 24: seven ways to start the same job on two hosts - do they train the same, and what does each need?

    sudo .venv/bin/python day24/labs/launchers.py
    sudo .venv/bin/python day24/labs/launchers.py --cases pdsh torchrun

Expect a row for each launcher: seconds from the command to its end, and the loss of the last step, equal in all rows.
For the last two the lab gets a Slurm of its own (apt-get install slurm-wlm), without which they are left out. Root.
Source: deepspeed/launcher/runner.py, deepspeed 0.19.8; man srun, man sbatch, man slurm.conf (22.05).
"""

import argparse
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import free_port, run_ranks
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir
from day24.hosts import Lab, open_lab

# {case: (words before the script, whether it is typed on every host)}; {rank} is the number of the host.
LAUNCHERS = {
    "pdsh": ("deepspeed -q --hostfile {hostfile} --master_addr {address} --master_port {port}", False),
    "no_ssh": (
        "deepspeed -q --hostfile {hostfile} --no_ssh --node_rank {rank} --master_addr {address} --master_port {port}",
        True,
    ),
    "torchrun": (
        "torchrun --nnodes 2 --nproc_per_node 1 --node_rank {rank} --master_addr {address} --master_port {port}",
        True,
    ),
    "rendezvous": (
        "torchrun --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id {port} --rdzv_endpoint {address}:{port}",
        True,
    ),
    "accelerate": (
        "accelerate launch --use_deepspeed --deepspeed_multinode_launcher standard --num_machines 2 --num_processes 2"
        " --machine_rank {rank} --main_process_ip {address} --main_process_port {port} --mixed_precision no"
        " --dynamo_backend no",
        True,
    ),
    "srun": ("srun --nodes 2 --ntasks-per-node 1 --kill-on-bad-exit=1 bash -c {as_rank} {python}", False),
    "sbatch": (
        "sbatch --wait --gpus-per-node 0 --cpus-per-task 1 --output {output} day24/job.sbatch",
        False,
    ),
}
# What a launcher would set, from what srun sets; $0 is Python, and $@ the script with its flags.
AS_RANK = 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$0" "$@"'
SLURM = """ClusterName=lab
SlurmctldHost=host-a({address})
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={disk}/slurmctld
SlurmdSpoolDir={disk}/slurmd
SlurmctldPidFile={disk}/slurmctld.pid
SlurmdPidFile={disk}/slurmd.pid
SlurmctldLogFile={disk}/slurmctld.log
SlurmdLogFile={disk}/slurmd.log
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def start_slurm(lab: Lab) -> None:
    """A Slurm of the lab's own: its controller on host-a, its daemon on every host. Ends with the hosts."""
    nodes = "\n".join(f"NodeName={host.name} NodeAddr={host.address} CPUs=1 State=UNKNOWN" for host in lab.hosts)
    config = SLURM.format(address=lab["A"].address, disk=lab.folder / "disk", nodes=nodes)
    (lab.folder / "slurm.conf").write_text(config)
    (lab.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    env = {"SLURM_CONF": str(lab.folder / "slurm.conf")}
    lab["A"].run("mkdir", lab.folder / "disk/slurmctld")
    lab["A"].run("slurmctld", env=env)
    for host in lab.hosts:
        host.run("slurmd", env=env)
    for _ in range(50):
        if "idle" in lab["A"].run("sinfo", "--noheader", "--Node", env=env).stdout:
            return
        time.sleep(0.2)
    raise UserError(f"Slurm has no idle hosts: {lab['A'].run('sinfo', env=env).stdout}")


def run(lab: Lab, case: str, flags: list[object], run_dir: Path) -> dict:
    """Start the job as `case` does, wait for its end; return seconds and the last loss. UserError when it fails."""
    words, everywhere = LAUNCHERS[case]
    known = {"hostfile": lab.hostfile, "address": lab["A"].address, "port": free_port(), "python": sys.executable}
    known |= {"as_rank": shlex.quote(AS_RANK), "output": run_dir.with_suffix(".1")}
    passed_on = dict(line.split("=", 1) for line in lab.environment.read_text().splitlines())
    slurm = {"SLURM_CONF": str(lab.folder / "slurm.conf"), "RUN_DIR": str(run_dir)}
    slurm |= {"MASTER_ADDR": lab["A"].address, "MASTER_PORT": str(known["port"])}
    script = [] if case == "sbatch" else ["day24/train.py", "--run_dir", run_dir]
    start, processes = time.perf_counter(), []
    for rank, host in enumerate(lab.hosts if everywhere else lab.hosts[:1]):
        line = [*shlex.split(words.format(**known, rank=rank)), *script, *flags]
        env = passed_on if everywhere else {} if case == "pdsh" else passed_on | slurm
        with open(run_dir.with_suffix(f".{rank}"), "w") as output:
            processes.append(host.popen(*line, env=env, stdout=output, stderr=output, cwd=HERE.parent))
    codes = [process.wait() for process in processes]
    said = "".join(path.read_text() for path in sorted(run_dir.parent.glob(f"{run_dir.name}.[01]")))
    losses = re.findall(r"step +\d+ \| loss ([\d.]+)", said)
    if any(codes) or not losses:
        raise UserError(f"{case}: exit codes {codes}: {said[-1500:]}")
    placed = re.search(r"hosts (.*?) \| same code", said)[1]
    return {"case": case, "seconds": time.perf_counter() - start, "loss": float(losses[-1]), "placed": placed}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(LAUNCHERS), choices=list(LAUNCHERS), help="which of them")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (not micro-batches)")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--run_dir", default=default_run_dir("day24"), help="folder for launchers.json and the runs")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    run_dir = Path(args.run_dir).absolute()
    flags = ["--steps", args.steps, "--log_every", 1, "--corpus", args.corpus]
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the lab: more threads add up in another order
    one_host = run_ranks(2, HERE / "train.py", *flags, "--run_dir", run_dir / "one_host")
    found = re.findall(r"step +\d+ \| loss ([\d.]+)", one_host[0].stdout)
    if not found:
        raise UserError(f"the run on one host failed: {one_host[0].stderr[-500:]}")
    columns = {"seconds": "seconds:.1f", "loss": "loss:.6f", "ranks": "placed:s"}
    table = Table(run_dir / "launchers.json", columns, width=14, ranks=2)
    table.add({"case": "one host", "seconds": None, "loss": float(found[-1]), "placed": "two ranks, no launcher"})
    with open_lab(run_dir / "lab") as lab:
        if with_slurm := shutil.which("slurmd", path="/usr/sbin:/usr/bin"):
            start_slurm(lab)
        for case in args.cases:
            if with_slurm or case not in ("srun", "sbatch"):
                try:
                    table.add(run(lab, case, flags, run_dir / case))
                except UserError as error:  # the others still have something to say
                    table.add({"case": case, "error": str(error)[-400:]})
            else:
                print(f"{case}: left out, this machine has no Slurm: apt-get install slurm-wlm")
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
