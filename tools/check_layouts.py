"""Check that layouts train the same model as one rank: run it on your own machines before a long job.

Each layout trains some steps from one seed checkpoint; losses by stream and gradient norms are held against one rank's.
Layouts are written "tp=2,pp=2,sp=1", apart by ";"; ">" goes on with another layout half-way. Layouts run under torchrun
on this machine, with as many ranks as each needs; inside a launch (torchrun or srun on a cluster) all of them take the
launch's ranks, and --directory is a folder that all nodes share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megaspeech.config.computation import ParallelSection
from megaspeech.parallel import groups
from megaspeech.parallel.launch import take_variables_from_slurm
from megaspeech.training.layouts import SHORT, Job, Plan, compare, prepare_jobs, run_jobs

DEFAULT = (
    "tp=2; tp=2,sp=1; pp=2; pp=2,vp=2; cp=2; dp=2; dp=2,zero=0; dp=2,data=fsdp2; tp=2,pp=2,sp=1; tp=2,cp=2; "
    "tp=2,dp=2,data=fsdp2; tp=2,pp=2,sp=1 > dp=4,data=fsdp2 > dp=2,cp=2"
)
DONE = "layout done:"
SECONDS_FOR_REFERENCES = 3600.0
PER_LAUNCH = 12
"""Layouts that share a launch: importing takes seconds, but torch keeps threads of every group that there was."""


def main() -> int:
    """Run; returns 1 where a layout is out of its band or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="whose model and optimizer to take; else the preset tiny")
    parser.add_argument("--layouts", default=DEFAULT, help=f"names: dp, {', '.join(SHORT)}, or section.field")
    parser.add_argument("--steps", type=int, default=20, help="of every run")
    parser.add_argument("--frames", type=int, default=16, help="length of the synthetic samples")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--directory", type=Path, help="where to work; a temporary folder without it")
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)  # how the tool starts itself under torchrun
    arguments = parser.parse_args()
    take_variables_from_slurm()
    if arguments.jobs:
        groups.join(ParallelSection())
        return _work(Job.read_all(arguments.jobs), config_path=arguments.config)
    try:
        plans = [Plan.parse(text) for text in arguments.layouts.split(";") if text.strip()]
        if "RANK" in os.environ:
            return _in_a_launch(arguments, plans)
        with tempfile.TemporaryDirectory() as temporary:
            directory = arguments.directory or Path(temporary)
            references, jobs = _prepare(arguments, plans, directory)
            with Progress(console=Console(stderr=True)) as progress:
                task = progress.add_task("layouts", total=len(references) + len(jobs))
                _launch(references, arguments, ranks=1, advance=lambda: progress.advance(task))
                for ranks in sorted({job.plan.ranks for job in jobs}):
                    mine = [job for job in jobs if job.plan.ranks == ranks]
                    _launch(mine, arguments, ranks=ranks, advance=lambda: progress.advance(task))
            return _report(jobs, arguments)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"check_layouts: {error}", file=sys.stderr)
        return 1


def _prepare(arguments: argparse.Namespace, plans: list[Plan], directory: Path) -> tuple[list[Job], list[Job]]:
    """See `prepare_jobs`; what an earlier check left in the directory, which would be gone on with, is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in (path for kind in ("reference", "shards", "plan") for path in directory.glob(f"{kind}[0-9]*")):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    if not arguments.config:
        arguments.config = directory / "tiny.toml"
        arguments.config.write_text('[model]\npreset = "tiny"\n', encoding="utf-8")
    sizes = {"num_frames": arguments.frames, "train_steps": arguments.steps}
    return prepare_jobs(plans, config_path=arguments.config, directory=directory, **sizes)


def _launch(jobs: list[Job], arguments: argparse.Namespace, *, ranks: int, advance: Callable[[], None]) -> None:
    """Run jobs in one launch of torchrun; their errors go to this command's standard error."""
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in launched and "ELASTIC" not in key}
    environment |= {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"), "PYTHONWARNINGS": "ignore"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    while jobs:
        path = jobs[0].directory.with_suffix(".jobs.json")
        Job.write_all(jobs[:PER_LAUNCH], path)
        command = [*torchrun, str(Path(__file__).resolve()), str(arguments.config), "--jobs", str(path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            done = sum(line.startswith(DONE) and advance() is None for line in process.stdout)
        # Where one failed and took the launch with it, the others still get their turn.
        jobs = jobs[done if done == PER_LAUNCH else done + 1 :]


def _work(jobs: list[Job], *, config_path: Path) -> int:
    """What each rank of a launch does; process groups are up, and taken down here, but by a rank that fails: to leave
    NCCL's it would wait for the others, which wait for it."""
    for job in run_jobs(jobs, config_path=config_path):
        if dist.get_rank() == 0:
            print(f"{DONE} {job.plan.name}", flush=True)
    groups.shut_down()
    return 0


def _in_a_launch(arguments: argparse.Namespace, plans: list[Plan]) -> int:
    """All plans on the ranks of the launch; the first rank alone makes the references before, and the report after."""
    if arguments.directory is None:
        raise ValueError("--directory: inside a launch, name a folder that all nodes share")
    groups.join(ParallelSection(), timeout=SECONDS_FOR_REFERENCES)
    prepared: list = [None, None]
    if dist.get_rank() == 0:
        references, jobs = _prepare(arguments, plans, arguments.directory)
        _launch(references, arguments, ranks=1, advance=lambda: None)
        prepared = [jobs, arguments.config]
    dist.broadcast_object_list(prepared)
    is_first, (jobs, config_path) = dist.get_rank() == 0, prepared
    _work(jobs, config_path=config_path)
    return _report(jobs, arguments) if is_first else 0


def _report(jobs: list[Job], arguments: argparse.Namespace) -> int:
    verdicts = [compare(job) for job in jobs]
    table = Table("layout", "ranks needed", "loss, largest difference", "gradient norm", "frames/s", "within")
    for verdict in verdicts:
        figures = [f"{verdict.loss:.1e}", f"{verdict.grad_norm:.1e}", f"{verdict.frames_per_second:,.0f}"]
        mark = "[green]yes" if verdict.holds else "[red]NO"
        figures = ["-"] * len(figures) if verdict.fault else figures
        table.add_row(verdict.plan, str(verdict.ranks), *figures, f"{mark}, {verdict.band:.0e}")
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    for verdict in filter(lambda verdict: verdict.fault, verdicts):
        print(f"{verdict.plan}: {verdict.fault}")
    if arguments.json:
        text = json.dumps([asdict(verdict) for verdict in verdicts], indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(verdict.holds for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
