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
from pathlib import Path

from rich.console import Console

from megaspeech.config.presets import PRESETS
from megaspeech.planning import plan_report
from megaspeech.planning.asked import Asked
from megaspeech.planning.gpus import GPUS
from megaspeech.planning.launch_files import write_launch
from megaspeech.planning.nodes import find_node
from megaspeech.planning.plan_chart import draw
from megaspeech.planning.search import Machine, candidates, obvious, plans, require_plannable


def main(arguments: list[str] | None = None) -> int:
    """Run; see the module."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        return _plan(options, console)
    except (ValueError, OSError) as error:
        print(f"plan_layout: {error}", file=sys.stderr)
        return 2


def _plan(options: argparse.Namespace, console: Console) -> int:
    machine, *machines = (_machine(options, num_gpus=num_gpus) for num_gpus in (options.gpus, *options.sweep))
    given = {
        "data.num_frames": options.frames,
        "training.global_batch_size": options.global_batch,
        "precision.recipe": options.recipe,
    }
    asked = Asked.read(options.model, given, options.overrides, name=f"{options.model}-{options.gpus}")
    require_plannable(asked.base, machine)
    own = {f"as {options.model} has it": asked.own_plan(machine)} if options.model not in PRESETS else {}
    plan_report.show_tries(own | obvious(asked.base, machine), console)
    found = plans(asked.base, machine, most=options.best)
    if not found:
        fits = "no layout fits; take more GPUs, or fewer bits (docs/speed_and_memory.md)"
        shared = "no layout shares model and global batch out over so many GPUs; change --gpus or --global-batch"
        print(f"plan_layout: {fits if any(candidates(asked.base, machine)) else shared}", file=sys.stderr)
        return 1
    audio = {"audio_hours": options.audio_hours, "frame_rate": options.frame_rate}
    plan_report.show(found, console, **audio)
    if options.json:
        options.json.write_text(json.dumps([plan_report.as_json(plan, **audio) for plan in found], indent=1) + "\n")
    if options.write:
        for path in write_launch(found[0], options.write, tables=asked.tables):
            console.print(f"written: {path}")
    sweep = {machine.num_gpus: next(iter(plans(asked.base, machine, most=1)), None) for machine in machines}
    if sweep:
        plan_report.show_sweep(sweep, console, **audio)
    if options.chart:
        draw(found[0], sweep, options.chart)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of the config")
    parser.add_argument("--model", required=True, help=f"a preset ({', '.join(PRESETS)}) or a run's config.toml")
    parser.add_argument("--gpus", type=_positive, required=True, help="in all")
    parser.add_argument("--gpu", choices=[gpu.key for gpu in GPUS], default="h100-80gb")
    parser.add_argument("--gpus-per-node", type=_positive, default=8)
    parser.add_argument(
        "--global-batch", type=_positive, help="samples a step; of a packed run, rows (512, or the config's)"
    )
    parser.add_argument("--frames", type=_positive, help="of every sample (4096, or the config's)")
    parser.add_argument("--recipe", help="precision.recipe (bf16, or the config's)")
    parser.add_argument("--best", type=_positive, default=10, help="layouts to show")
    parser.add_argument("--audio-hours", type=float, default=1e6, help="to train on once")
    parser.add_argument("--frame-rate", type=float, default=12.5, help="frames a second of audio")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--chart", type=Path, help="draw the first layout's memory by stage here, and the sweep")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write what submits the first layout")
    parser.add_argument("--sweep", type=_numbers, default=[], metavar="N,...", help="numbers of GPUs to compare")
    return parser.parse_intermixed_args(arguments)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _numbers(text: str) -> list[int]:
    return [_positive(each) for each in text.split(",")]


def _machine(options: argparse.Namespace, *, num_gpus: int) -> Machine:
    gpu, node = next(gpu for gpu in GPUS if gpu.key == options.gpu), find_node(options.gpus_per_node)
    if num_gpus > node.num_gpus and num_gpus % node.num_gpus:
        raise ValueError(f"--gpus: {num_gpus} are no whole nodes of {node.num_gpus}; choose a multiple of it")
    return Machine(gpu, node, num_gpus)


if __name__ == "__main__":
    sys.exit(main())
