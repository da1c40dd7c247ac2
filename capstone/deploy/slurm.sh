#!/usr/bin/env bash
# Train on Slurm: one task a GPU, saved and queued again before the time is up, resumed by the same command.
#   sbatch capstone/deploy/slurm.sh capstone/configs/gpt2.yaml
# The number of nodes is yours to change: the config's global batch is shared out among however many ranks there are, and
# a checkpoint fits any number of them (day 18). No `deepspeed` launcher and no ssh: srun starts the ranks, so a signal reaches every one of them.
#SBATCH --job-name=capstone
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log
set -euo pipefail
# USR1 comes to this shell, 180 s before the end (B: in --signal), whatever stage the job is in. It is passed on to the
# ranks: training saves and ends with code 0 (day 17), preparing and evaluating end at once, and what they had finished
# is on disk. Then the job is queued again. Sent to the ranks alone, it would have ended the job in those two stages.
asked='' ranks=''
trap 'asked=1; if [ "$ranks" ]; then kill -USR1 "$ranks"; fi' USR1
config=${1:-capstone/configs/gpt2.yaml}
shift || true
python=${PYTHON:-.venv/bin/python}

mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")  # `| head -n 1` fails when it ends first
MASTER_ADDR=${HOSTS[0]}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on a node do not meet
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
run=$("$python" -c 'import sys; from capstone.config import load_config; print(load_config(*sys.argv[1:2], sys.argv[2:]).run_path)' "$config" "$@")

# shellcheck disable=SC2016  # the variables are each task's own
srun --kill-on-bad-exit=1 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' rank "$python" capstone/train.py --config "$config" "$@" &
ranks=$! code=0
if [ "$asked" ]; then kill -USR1 "$ranks"; fi # it came while this script was starting
while kill -0 "$ranks" 2>/dev/null; do
    wait "$ranks" && code=0 || code=$? # a signal that is trapped ends `wait`: the ranks may still be there
done

if [ -e "$run/evaluation.json" ]; then
    echo "slurm: done, $run"
elif [ "$asked" ] || [ "$code" = 0 ]; then
    echo "slurm: not done, queued again"
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "slurm: ended with code $code"
    exit "$code"
fi
