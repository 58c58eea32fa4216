"""Plan a run before it is submitted: the layouts that fit, what they take, how fast they should be.

    python tools/plan_layout.py --model 40b --gpus 256 --gpu h100-96gb --gpus-per-node 4 --global-batch 512

Memory is counted; times come of a model whose efficiencies are assumed until they are measured. --model is a preset, or
a config of yours, whose own layout is shown beside what is found. Arguments section.field=value override the config
(precision, optimizer, streams; the layout is what is looked for). --write DIR writes config.toml, a Slurm script and a
torchrun line of the first layout; --sweep shows how time falls with more GPUs. Returns 1 where nothing fits, 2 for a
fault of the arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from megaspeech.config import Config, ConfigError, config_of, read_tables
from megaspeech.config.presets import PRESETS
from megaspeech.planning import plan_report
from megaspeech.planning.gpus import GPUS
from megaspeech.planning.launch_files import write_launch
from megaspeech.planning.nodes import find_node
from megaspeech.planning.plan_chart import draw
from megaspeech.planning.search import Machine, Plan, is_valid, obvious, plan_of, plans, without_layout


def main(arguments: list[str] | None = None) -> int:
    """Run; see the module."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        return _plan(options, console)
    except ValueError as error:
        print(f"plan_layout: {error}", file=sys.stderr)
        return 2


def _plan(options: argparse.Namespace, console: Console) -> int:
    tables, machine = _tables(options), _machine(options, num_gpus=options.gpus)
    base = _base(without_layout(tables), options)
    own = {} if options.model in PRESETS else _own(tables, options, machine)
    plan_report.show_tries(own | obvious(base, machine), console)
    found = plans(base, machine, most=options.best)
    if not found:
        print("plan_layout: no layout fits; take more GPUs, or fewer bits (docs/speed_and_memory.md)", file=sys.stderr)
        return 1
    audio = {"audio_hours": options.audio_hours, "frame_rate": options.frame_rate}
    plan_report.show(found, console, **audio)
    if options.json:
        options.json.write_text(json.dumps([plan_report.as_json(plan, **audio) for plan in found], indent=1) + "\n")
    if options.write:
        for path in write_launch(found[0], options.write, tables=tables):
            console.print(f"written: {path}")
    machines = [_machine(options, num_gpus=num_gpus) for num_gpus in options.sweep]
    sweep = {machine.num_gpus: next(iter(plans(base, machine, most=1)), None) for machine in machines}
    if sweep:
        plan_report.show_sweep(sweep, console, **audio)
    if options.chart:
        draw(found[0], sweep, options.chart)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of the config")
    parser.add_argument("--model", required=True, help=f"a preset ({', '.join(PRESETS)}) or a run's config.toml")
    parser.add_argument("--gpus", type=int, required=True, help="in all")
    parser.add_argument("--gpu", choices=[gpu.key for gpu in GPUS], default="h100-80gb")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--global-batch", type=int, help="samples a step; of a packed run, rows (512, or the config's)")
    parser.add_argument("--frames", type=int, help="of every sample (4096, or the config's)")
    parser.add_argument("--recipe", help="precision.recipe (bf16, or the config's)")
    parser.add_argument("--best", type=int, default=10, help="layouts to show")
    parser.add_argument("--audio-hours", type=float, default=1e6, help="to train on once")
    parser.add_argument("--frame-rate", type=float, default=12.5, help="frames a second of audio")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--chart", type=Path, help="draw the first layout's memory by stage here, and the sweep")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write what submits the first layout")
    parser.add_argument("--sweep", type=_numbers, default=[], metavar="N,...", help="numbers of GPUs to compare")
    return parser.parse_intermixed_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def _machine(options: argparse.Namespace, *, num_gpus: int) -> Machine:
    gpu = next(gpu for gpu in GPUS if gpu.key == options.gpu)
    return Machine(gpu, find_node(options.gpus_per_node), num_gpus)


def _tables(options: argparse.Namespace) -> dict[str, Any]:
    """What the run's config says, by section: the file's or the preset's, with the options and overrides."""
    frames, batch, recipe, own = options.frames, options.global_batch, options.recipe, []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(options.model)
        if options.model in PRESETS:
            path, name = Path(directory, "config.toml"), f"{options.model}-{options.gpus}"
            path.write_text(f'[model]\npreset = "{options.model}"\nkernels = "triton"\n')
            frames, batch, recipe = frames or 4096, batch or 512, recipe or "bf16"
            own = [f"run.name={name}", f"run.directory=runs/{name}", f"data.length_multiple={frames}"]
            own += ["training.micro_batch_size=1"]
        elif not path.is_file():
            raise ValueError(
                f"--model: {options.model} is neither a config nor a preset; these are {', '.join(PRESETS)}"
            )
        elif read_tables(path, options.overrides).get("data", {}).get("pack"):
            batch = None  # rows; the config counts the samples in them
        given = {"data.num_frames": frames, "training.global_batch_size": batch, "precision.recipe": recipe}
        given = [f"{key}={value}" for key, value in given.items() if value is not None]
        return read_tables(path, [*own, *given, *options.overrides])


def _base(tables: dict[str, Any], options: argparse.Namespace) -> Config:
    """The config as it is planned for: of a packed run, a step of so many full rows."""
    config = config_of(tables, source=options.model)
    if not config.data.pack:
        return config
    if options.global_batch is None:
        raise ValueError(
            f"--global-batch: {options.model} packs its samples (data.pack); give the rows that a step comes to: "
            "training.global_batch_size x mean frames of a sample / data.num_frames"
        )
    training = config.training.model_copy(update={"global_batch_size": options.global_batch})
    return config.model_copy(update={"training": training})


def _own(tables: dict[str, Any], options: argparse.Namespace, machine: Machine) -> dict[str, Plan]:
    """The layout that the config has, where it is one for this machine and what was overridden."""
    try:
        config = _base(tables, options)
    except ConfigError:
        return {}
    return {f"as {options.model} has it": plan_of(config, machine)} if is_valid(config, num_gpus=options.gpus) else {}


if __name__ == "__main__":
    sys.exit(main())
