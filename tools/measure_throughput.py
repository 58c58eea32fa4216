"""Measure whole training steps on this machine's GPU: frames a second, operations, memory, time by part.

    python tools/measure_throughput.py --model 8b --recipe bf16,fp8-tensorwise --peer moshi --peer-layers 4,12 --json F

Every number of layers in every recipe is a case, measured in a process of its own with the trainer's own step on
synthetic samples; --peer measures the same shape in what people would pick instead, and where all layers do not fit it,
two numbers of them tell what they would take. Arguments section.field=value override the config of every case.
--dry-run counts parameters, operations and bytes, without a GPU. A case that cannot run is a row that says why. Returns
1 where none could, 2 for a fault of the arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megaspeech.benchmarks import report
from megaspeech.benchmarks.case import OURS, PEERS, Case, config_of
from megaspeech.benchmarks.run import run
from megaspeech.config.presets import PRESETS
from megaspeech.kernels.benchmarks.rows import MEASURED

PEER_RECIPE = "bf16"
"""What moshi-finetune trains in."""


def main(arguments: list[str] | None = None) -> int:
    """Run; see the module."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        cases = _cases(options)
        configs = [config_of(case) for case in cases]  # every fault of the arguments, before anything is measured
    except ValueError as error:
        print(f"measure_throughput: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        for case, config in zip(cases, configs, strict=True):
            report.show_plan(case, config, console)
        return 0
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the processes that measure
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(case.num_steps for case in cases))
        found = run(
            cases, minutes=options.minutes, hear=lambda line: progress.update(task, advance=1, description=line)
        )
    report.show(found, console)
    if options.json:
        report.write(found, options.json)
        console.print(f"written: {options.json}, .md and .png")
    return int(all(row.status != MEASURED for row in found.rows))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of the config, for every case")
    parser.add_argument("--model", choices=list(PRESETS), default="8b", help="a preset")
    layers = {"type": layers_of, "metavar": "N,...", "help": "of the temporal transformer: numbers, or all"}
    parser.add_argument("--layers", default="all", **layers)
    parser.add_argument("--recipe", default="bf16", metavar="NAME,...", help="of precision.recipe")
    parser.add_argument("--frames", type=int, default=16384, help="a step, in all")
    parser.add_argument("--sample-frames", type=int, default=2048, help="length of every sample")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="samples")
    parser.add_argument("--peer", choices=PEERS, help="measure it too")
    parser.add_argument("--peer-layers", **{**layers, "help": "of the peer's; as --layers without it"})
    parser.add_argument("--steps", type=int, default=8, help="timed; half as many again are timed by part")
    parser.add_argument("--minutes", type=float, default=8.0, help="what has not begun by then is skipped")
    parser.add_argument("--json", type=Path, help="write the figures here, Markdown and a chart beside them")
    parser.add_argument("--dry-run", action="store_true", help="count, measure nothing")
    return parser.parse_intermixed_args(arguments)


def _cases(options: argparse.Namespace) -> list[Case]:
    """Ours, then the peer's."""
    named = [(OURS, layers, recipe) for layers in options.layers for recipe in options.recipe.split(",")]
    if options.peer:
        named += [(options.peer, layers, PEER_RECIPE) for layers in options.peer_layers or options.layers]
    return [
        Case(
            provider,
            options.model,
            layers,
            recipe,
            frames=options.frames,
            sample_frames=options.sample_frames,
            micro_batch_size=options.micro_batch_size,
            overrides=tuple(options.overrides),
            steps=options.steps,
        )
        for provider, layers, recipe in named
    ]


def layers_of(text: str) -> list[int | None]:
    """[4, None] of "4,all"."""
    return [None if each == "all" else int(each) for each in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
