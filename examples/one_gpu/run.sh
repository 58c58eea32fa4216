#!/bin/bash
# One GPU, from the repository's root: examples/one_gpu/run.sh [section.field=value ...]
# After a fault the ranks start again and go on from the newest checkpoint (docs/faults.md).
PATH=$PWD/.venv/bin:$PATH
exec torchrun --standalone --nproc-per-node 1 --max-restarts 3 -m megaspeech.train examples/one_gpu/config.toml "$@"
