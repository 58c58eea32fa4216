#!/bin/bash
# One node of 8 GPUs, from the repository's root: examples/one_node/run.sh [section.field=value ...]
# After a fault the ranks start again and go on from the newest checkpoint (docs/faults.md).
PATH=$PWD/.venv/bin:$PATH
exec torchrun --standalone --nproc-per-node 8 --max-restarts 3 -m megaspeech.train examples/one_node/config.toml "$@"
