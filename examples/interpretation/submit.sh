#!/bin/bash
# 4 nodes of 8 GPUs under Slurm, from the repository's root: examples/interpretation/submit.sh [section.field=value ...]
exec sbatch --nodes 4 --gpus-per-node 8 --job-name interpretation --time 24:00:00 \
  examples/slurm/train.sh examples/interpretation/config.toml "$@"
