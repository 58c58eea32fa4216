"""A plan as files to submit: config.toml, a script for Slurm, the torchrun line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import tomli_w

from megaspeech.config import read_config
from megaspeech.planning.search import Plan

SLURM = """\
#!/bin/bash
# {what}
# From the repository's root{once}: {script} [section.field=value ...]
# Three minutes before the time limit a checkpoint is saved and the job requeues itself (docs/faults.md).
exec sbatch --nodes {nodes} --gpus-per-node {per_node} --job-name {name} --time 24:00:00 \\
  examples/slurm/train.sh {config} "$@"
"""


def write_launch(plan: Plan, directory: Path, *, tables: dict[str, Any]) -> list[Path]:
    """Write the files, having had the config read and checked for this number of ranks.

    Args:
        plan: the layout and the machine.
        directory: of the files.
        tables: what the run's config says by section (`config.read_tables`); the plan's layout and microbatch go in.

    Raises:
        ConfigError: the config has faults; with the layout of a plan that can be one of a packed run's global batch.
    """
    directory.mkdir(parents=True, exist_ok=True)
    machine, layout = plan.machine, plan.config.parallel
    paths = [directory / each for each in ("config.toml", "submit.sh", "launch.txt")]
    paths[0].write_text(tomli_w.dumps(_with_layout(tables, plan)), encoding="utf-8")
    config = read_config(paths[0], world_size=machine.num_gpus)
    nodes, per_node = -(-machine.num_gpus // machine.node.num_gpus), min(machine.num_gpus, machine.node.num_gpus)
    name = config.run.name
    script, path = (shlex.quote(str(each)) for each in (paths[1], paths[0]))
    fields = {
        "what": f"{name}: {layout.describe(plan.data_parallel_size)} on {machine.num_gpus} x {machine.gpu.name}",
        "once": "" if config.sources else ", once config.toml names the data",
        **{"script": script, "nodes": nodes, "per_node": per_node, "name": shlex.quote(name), "config": path},
    }
    paths[1].write_text(SLURM.format(**fields), encoding="utf-8")
    paths[1].chmod(0o755)
    line = f"torchrun --nnodes {nodes} --nproc-per-node {per_node} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    paths[2].write_text(f"{line} -m megaspeech.train {path}\n", encoding="utf-8")
    return paths


def _with_layout(tables: dict[str, Any], plan: Plan) -> dict[str, Any]:
    layout = plan.config.parallel.model_dump(mode="json", exclude_defaults=True)
    training = {**tables.get("training", {}), "micro_batch_size": plan.config.training.micro_batch_size}
    return {**tables, "parallel": layout, "training": training}
