#!/bin/bash
# Audio to shards by a Slurm job array, of any number of tasks; each encodes on a GPU of its own.
#
#   tools/prepare_data.py CONFIG.toml --dry-run                          units, hours, shards, bytes
#   tools/prepare_data.py CONFIG.toml --fit                              codec and tokenizer, where they are missing
#   sbatch --array 0-31 examples/prepare/slurm_array.sh CONFIG.toml      again, for what a killed task left
#
#SBATCH --job-name prepare
#SBATCH --nodes 1
#SBATCH --ntasks 1
#SBATCH --gpus 1
#SBATCH --cpus-per-task 8
#SBATCH --time 24:00:00
#SBATCH --requeue
#SBATCH --output slurm-%x-%A_%a.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

export OMP_NUM_THREADS=1 # decoding has threads of its own
exec "${PYTHON:-.venv/bin/python}" tools/prepare_data.py "$@" \
  preparation.num_threads="${SLURM_CPUS_PER_TASK:-8}"
