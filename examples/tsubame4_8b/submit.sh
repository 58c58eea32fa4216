#!/bin/bash
# 8 nodes of 4 GPUs under Slurm, from the repository's root:
#   examples/tsubame4_8b/submit.sh tensor|fsdp [section.field=value ...]
kind=${1:?tensor or fsdp}
shift
IB_PORTS=4 exec sbatch --nodes 8 --gpus-per-node 4 --job-name tsubame4_8b --time 24:00:00 \
  examples/slurm/train.sh "examples/tsubame4_8b/$kind.toml" "$@"
