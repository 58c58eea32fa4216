"""A plan as files to submit: config.toml, a script for Slurm, the torchrun line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w

from megaspeech.config import read_config
from megaspeech.planning.search import Plan

SLURM = """\
#!/bin/bash
# {what}
# From the repository's root, once config.toml names the data: {script} [section.field=value ...]
# Three minutes before the time limit a checkpoint is saved and the job requeues itself (docs/faults.md).
exec sbatch --nodes {nodes} --gpus-per-node {per_node} --job-name {name} --time 24:00:00 \\
  examples/slurm/train.sh {config} "$@"
"""


def write_launch(plan: Plan, directory: Path, *, name: str) -> list[Path]:
    """Write the files, having had the config read and checked for this number of ranks.

    Raises:
        ConfigError: the config has faults; nothing of a plan should.
    """
    directory.mkdir(parents=True, exist_ok=True)
    machine, config = plan.machine, plan.config
    paths = [directory / each for each in ("config.toml", "submit.sh", "launch.txt")]
    paths[0].write_text(tomli_w.dumps(_tables(plan, name=name)), encoding="utf-8")
    read_config(paths[0], world_size=machine.num_gpus)
    nodes, per_node = -(-machine.num_gpus // machine.node.num_gpus), min(machine.num_gpus, machine.node.num_gpus)
    what = f"{name}: {config.parallel.describe(plan.data_parallel_size)} on {machine.num_gpus} x {machine.gpu.name}"
    fields = {"what": what, "script": paths[1], "nodes": nodes, "per_node": per_node, "name": name, "config": paths[0]}
    paths[1].write_text(SLURM.format(**fields), encoding="utf-8")
    paths[1].chmod(0o755)
    line = f"torchrun --nnodes {nodes} --nproc-per-node {per_node} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    paths[2].write_text(f"{line} -m megaspeech.train {paths[0]}\n", encoding="utf-8")
    return paths


def _tables(plan: Plan, *, name: str) -> dict[str, Any]:
    """What differs from the defaults, section by section, without what the preset says itself."""
    tables = plan.config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    for section in ("streams", "temporal", "depth"):
        tables.pop(section, None)
    tables["run"] = {"name": name, "directory": f"runs/{name}"}
    tables["model"] = {**tables.get("model", {}), "preset": plan.config.model.preset}
    return tables
