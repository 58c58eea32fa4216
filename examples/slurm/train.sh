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
#SBATCH --mem 0
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
REQUEUE=75 # megaspeech.parallel.launch.REQUEUE
DEAF=138   # SIGUSR1 came before a rank listened to it

read -ra python <<<"${PYTHON:-.venv/bin/python}" # may be several words: apptainer exec --nv IMAGE python
logs=${LOGS:-logs}/$SLURM_JOB_ID
mkdir -p "$logs"
touch "$logs/began" "$logs/nodes.log"
gpus=${SLURM_GPUS_ON_NODE:?the job has no GPUs; submit it with --gpus-per-node N}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")

if ! srun --ntasks-per-node 1 --output "$logs/nodes.log" --open-mode=truncate \
  bash examples/slurm/check_node.sh "$gpus"; then
  cat "$logs/nodes.log" >&2
  bad=$(grep -xFf <(cut -d: -f1 "$logs/nodes.log") <<<"$hosts" | paste -sd,) || true
  echo "nothing was trained; submit again with --exclude ${bad:-NODES}" >&2
  exit 1
fi

MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# A task has one CPU unless told otherwise, and srun no longer asks sbatch: a rank's data workers need theirs.
cpus=$((${SLURM_CPUS_ON_NODE:-$gpus} / gpus))

# No torchrun in between: SIGUSR1 would end it, and it makes every exit status of a rank a 1. Ranks end within seconds of
# each other; should one not, --wait ends it, and its status (137) is then srun's: --kill-on-bad-exit would end all so.
# A lost node's never tell their end. Slurm misses a node after SlurmdTimeout, 300 s as a rule, and only then requeues.
# --distribution block puts ranks that follow each other, which tensor parallelism groups, on the same node.
status=0
srun --ntasks-per-node "$gpus" --cpus-per-task "$((cpus > 0 ? cpus : 1))" --distribution block \
  --kill-on-bad-exit=0 --wait=600 --output "$logs/rank_%t.log" --open-mode=append \
  "${python[@]}" -m megaspeech.train "$@" || status=$?

if [ "$status" -eq "$REQUEUE" ] || [ "$status" -eq "$DEAF" ]; then
  echo "stopped before its end: the job requeues itself" >&2
  scontrol requeue "$SLURM_JOB_ID"
elif [ "$status" -ne 0 ]; then # ranks that only lose their connection say nothing: who failed has written last
  find "$logs" -name 'rank_*.log' -size +0 -newer "$logs/began" -printf '%T@ %p\n' | sort -rn | head -n 5 |
    cut -d ' ' -f 2- | xargs -r tail -n 20 >&2
fi
exit "$status"
