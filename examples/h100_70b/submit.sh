#!/bin/bash
# 64 nodes of 8 GPUs under Slurm, from the repository's root: examples/h100_70b/submit.sh [section.field=value ...]
exec sbatch --nodes 64 --gpus-per-node 8 --job-name h100_70b --time 24:00:00 \
  examples/slurm/train.sh examples/h100_70b/config.toml "$@"
