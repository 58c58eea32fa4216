#!/bin/bash
# Training under Slurm, one task a GPU, from the repository's root:
#
#   sbatch --nodes 4 --gpus-per-node 4 examples/slurm/train.sh CONFIG.toml [section.field=value ...]
#   tail -F logs/JOB/rank_0.log
#
# Nodes are checked first. Three minutes before the time limit every rank gets SIGUSR1: a checkpoint is saved, the job
# requeues itself and goes on. README.md beside this file tells what may be set from outside.
#SBATCH --job-name megaspeech
#SBATCH --exclusive
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
REQUEUE=75 # megaspeech.parallel.launch.REQUEUE

read -ra python <<<"${PYTHON:-.venv/bin/python}" # may be several words: apptainer exec --nv IMAGE python
logs=${LOGS:-logs}/$SLURM_JOB_ID
mkdir -p "$logs"
touch "$logs/began"

if ! srun --ntasks-per-node 1 --output "$logs/nodes.log" --open-mode=truncate \
  bash examples/slurm/check_node.sh "$SLURM_GPUS_ON_NODE"; then
  bad=$(cut -d: -f1 "$logs/nodes.log" | sort -u | paste -sd,)
  echo "these nodes cannot train, $logs/nodes.log says why; submit again with --exclude ${bad:-NODES}" >&2
  exit 1
fi

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# A task has one CPU unless told otherwise, and srun no longer asks sbatch: a rank's data workers need theirs.
cpus=$((${SLURM_CPUS_ON_NODE:-$SLURM_GPUS_ON_NODE} / SLURM_GPUS_ON_NODE))

# No torchrun in between: SIGUSR1 would end it, and it makes every exit status of a rank a 1. Ranks end within seconds of
# each other; should one not, --wait ends it, and its status (137) is then srun's: --kill-on-bad-exit would end all so.
# --distribution block puts ranks that follow each other, which tensor parallelism groups, on the same node.
status=0
srun --ntasks-per-node "$SLURM_GPUS_ON_NODE" --cpus-per-task "$((cpus > 0 ? cpus : 1))" --distribution block \
  --kill-on-bad-exit=0 --wait=60 --output "$logs/rank_%t.log" --open-mode=append \
  "${python[@]}" -m megaspeech.train "$@" || status=$?

if [ "$status" -eq "$REQUEUE" ]; then
  scontrol requeue "$SLURM_JOB_ID"
elif [ "$status" -ne 0 ]; then # ranks that only lose their connection say nothing
  find "$logs" -name 'rank_*.log' -size +0 -newer "$logs/began" | sort -V | head -n 5 | xargs -r tail -n 20 >&2
fi
exit "$status"
