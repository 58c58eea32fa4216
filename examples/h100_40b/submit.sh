#!/bin/bash
# 32 nodes of 8 GPUs under Slurm, from the repository's root: examples/h100_40b/submit.sh [section.field=value ...]
exec sbatch --nodes 32 --gpus-per-node 8 --job-name h100_40b --time 24:00:00 \
  examples/slurm/train.sh examples/h100_40b/config.toml "$@"
