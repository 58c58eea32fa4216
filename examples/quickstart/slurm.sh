#!/bin/bash
# The training of a config on GPU nodes under Slurm: sbatch --nodes 4 --gpus-per-node 4 slurm.sh CONFIG.toml [section.field=value ...]
# Submit it again (or let Slurm requeue it) and it goes on from the newest checkpoint.
#SBATCH --job-name megaspeech
#SBATCH --ntasks-per-node 1
#SBATCH --requeue
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun .venv/bin/torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m megaspeech.train "$@"
