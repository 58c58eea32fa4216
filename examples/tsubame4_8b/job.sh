#!/bin/bash
# 8 nodes of TSUBAME4.0, which has Altair Grid Engine and no Slurm, from the repository's root:
#   qsub -g GROUP examples/tsubame4_8b/job.sh tensor|fsdp [section.field=value ...]
# The time limit kills: what follows the newest checkpoint is lost. Submit the same line several times with
# -hold_jid tsubame4_8b, and each job goes on where the one before it was.
#$ -S /bin/bash
#$ -N tsubame4_8b
#$ -cwd
#$ -j y
#$ -l node_f=8
#$ -l h_rt=24:00:00
set -euo pipefail
kind=${1:?tensor or fsdp}
shift

source /etc/profile.d/modules.sh
module load openmpi # starts one torchrun a node, and nothing else
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export PATH=$PWD/.venv/bin:$PATH
logs=logs/$JOB_ID
mkdir -p "$logs"

mpirun -npernode 1 -n "$NHOSTS" --bind-to none -x PATH -x NCCL_DEBUG \
  torchrun --nnodes "$NHOSTS" --nproc-per-node 4 --max-restarts 3 --log-dir "$logs" --redirects 3 --tee 0:3 \
  --rdzv-backend c10d --rdzv-id "$JOB_ID" --rdzv-endpoint "$(hostname):29500" \
  -m megaspeech.train "examples/tsubame4_8b/$kind.toml" "$@"
