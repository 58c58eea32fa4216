#!/bin/bash
# 2 nodes of 8 GPUs under Slurm, from the repository's root: examples/from_llama/submit.sh [section.field=value ...]
exec sbatch --nodes 2 --gpus-per-node 8 --job-name from_llama --time 24:00:00 \
  examples/slurm/train.sh examples/from_llama/config.toml "$@"
