#!/bin/bash
# Training under Slurm, one task a GPU: sbatch --nodes 4 --gpus-per-node 4 slurm.sh CONFIG.toml [section.field=value ...]
# Three minutes before the time limit every rank gets SIGUSR1: a checkpoint is saved, the job requeues itself and goes on.
#SBATCH --job-name megaspeech
#SBATCH --exclusive
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
REQUEUE=75 # megaspeech.parallel.launch.REQUEUE

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# No torchrun in between: SIGUSR1 would end it, and it makes every exit status of a rank a 1. Ranks end within seconds of
# each other; should one not, --wait ends it, and its status (137) is then srun's: --kill-on-bad-exit would end all so.
status=0
srun --ntasks-per-node "$SLURM_GPUS_ON_NODE" --kill-on-bad-exit=0 --wait=60 \
  .venv/bin/python -m megaspeech.train "$@" || status=$?

if [ "$status" -eq "$REQUEUE" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
