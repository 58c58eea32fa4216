"""Plan a run before it is submitted: the layouts that fit, what they take, how fast they should be.

    python tools/plan_layout.py --model 40b --gpus 256 --gpu h100-96gb --gpus-per-node 4 --global-batch 512

Memory is counted; times come of a model whose efficiencies are assumed until they are measured. Arguments
section.field=value override the config (precision, optimizer, streams; the layout is what is looked for). --write DIR
writes config.toml, a Slurm script and a torchrun line of the first layout; --sweep shows how time falls with more GPUs.
Returns 1 where nothing fits, 2 for a fault of the arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megaspeech.config import Config, read_config
from megaspeech.config.presets import PRESETS
from megaspeech.planning import efficiency, plan_report
from megaspeech.planning.gpus import GPUS
from megaspeech.planning.launch_files import write_launch
from megaspeech.planning.nodes import find_node
from megaspeech.planning.search import Machine, obvious, plans


def main(arguments: list[str] | None = None) -> int:
    """Run; see the module."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        base, machine = _config(options), _machine(options, num_gpus=options.gpus)
    except ValueError as error:
        print(f"plan_layout: {error}", file=sys.stderr)
        return 2
    plan_report.show_obvious(obvious(base, machine), console)
    found = plans(base, machine, most=options.best)
    if not found:
        print("plan_layout: no layout fits; take more GPUs, or fewer bits (docs/speed_and_memory.md)", file=sys.stderr)
        return 1
    plan_report.show(found, console, audio_hours=options.audio_hours, frame_rate=options.frame_rate)
    if options.json:
        options.json.write_text(json.dumps([plan_report.as_json(plan) for plan in found], indent=1) + "\n")
    if options.chart:
        plan_report.draw_memory(found[0], options.chart)
    if options.write:
        for path in write_launch(found[0], options.write, name=f"{options.model}-{options.gpus}"):
            console.print(f"written: {path}")
    if options.sweep:
        _sweep(base, options, console)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of the config")
    parser.add_argument("--model", choices=list(PRESETS), required=True, help="a preset")
    parser.add_argument("--gpus", type=int, required=True, help="in all")
    parser.add_argument("--gpu", choices=[gpu.key for gpu in GPUS], default="h100-80gb")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--global-batch", type=int, default=512, help="samples a step")
    parser.add_argument("--frames", type=int, default=4096, help="of every sample")
    parser.add_argument("--recipe", default="bf16", help="precision.recipe")
    parser.add_argument("--best", type=int, default=10, help="layouts to show")
    parser.add_argument("--audio-hours", type=float, default=1e6, help="to train on once")
    parser.add_argument("--frame-rate", type=float, default=12.5, help="frames a second of audio")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--chart", type=Path, help="draw the first layout's memory by stage here")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write what submits the first layout")
    parser.add_argument("--sweep", type=_numbers, metavar="N,...", help="numbers of GPUs to compare")
    return parser.parse_intermixed_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def _machine(options: argparse.Namespace, *, num_gpus: int) -> Machine:
    gpu = next(gpu for gpu in GPUS if gpu.key == options.gpu)
    return Machine(gpu, find_node(options.gpus_per_node), num_gpus)


def _config(options: argparse.Namespace) -> Config:
    given = (
        f"data.num_frames={options.frames}",
        f"data.length_multiple={options.frames}",
        f"training.global_batch_size={options.global_batch}",
        "training.micro_batch_size=1",
        f"precision.recipe={options.recipe}",
        "model.kernels=triton",
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "config.toml")
        path.write_text(f'[model]\npreset = "{options.model}"\n')
        return read_config(path, [*given, *options.overrides])


def _sweep(base: Config, options: argparse.Namespace, console: Console) -> None:
    table = Table(title=f"the same step of {options.global_batch} samples on more GPUs")
    for name in ("GPUs", "step s", "frames/s", "of ideal", "MFU", f"hours for {options.audio_hours:,.0f} h", "layout"):
        table.add_column(name, justify="right")
    single = None
    for num_gpus in options.sweep:
        found = plans(base, _machine(options, num_gpus=num_gpus), most=1)
        if not found:
            table.add_row(f"{num_gpus:,}", *["-"] * 5, "none fits, or the batch cannot be shared out")
            continue
        time = found[0].time
        single = single or time.frames_per_second / num_gpus
        hours = time.hours(options.audio_hours, frame_rate=options.frame_rate)
        rates = (f"{time.seconds:.2f}", f"{time.frames_per_second:,.0f}")
        shares = (f"{time.frames_per_second / num_gpus / single:.0%}", f"{time.utilisation:.1%}", f"{hours:,.1f}")
        words = found[0].config.parallel.describe(found[0].data_parallel_size)
        table.add_row(f"{num_gpus:,}", *rates, *shares, words)
    console.print(table)
    names = [name for name in vars(efficiency) if name.isupper()]
    console.print("assumed: " + ", ".join(f"{name} {getattr(efficiency, name)}" for name in names))
    console.print("not in it: stragglers, failures, checkpoints, traffic of others, latency of small messages")


if __name__ == "__main__":
    sys.exit(main())
