"""Measure whole training steps on this machine's GPU: frames a second, operations, memory, time by part.

    python tools/measure_throughput.py --model 8b --layers all,16 --recipe bf16,fp8-tensorwise --peer moshi --json F.json

Every number of layers in every recipe is a case, measured in a process of its own with the trainer's own step on
synthetic samples; --peer measures the same shape, once for every number of layers, in what people would pick instead.
Arguments section.field=value override the config. --dry-run counts parameters, operations and bytes, without a GPU. A
case that cannot run is a row that says why. Returns 1 where none could, 2 for a fault of the arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megaspeech.benchmarks import report
from megaspeech.benchmarks.case import OURS, PEERS, Case
from megaspeech.benchmarks.run import config_of, run
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
    parser.add_argument("--layers", default="all", metavar="N,...", help="of the temporal transformer: numbers, or all")
    parser.add_argument("--recipe", default="bf16", metavar="NAME,...", help="of precision.recipe")
    parser.add_argument("--frames", type=int, default=16384, help="a step, in all")
    parser.add_argument("--sample-frames", type=int, default=2048, help="length of every sample")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="samples")
    parser.add_argument("--peer", choices=PEERS, help="measure it too")
    parser.add_argument("--steps", type=int, default=8, help="timed; half as many again are timed by part")
    parser.add_argument("--minutes", type=float, default=8.0, help="what has not begun by then is skipped")
    parser.add_argument("--json", type=Path, help="write the figures here, Markdown and a chart beside them")
    parser.add_argument("--dry-run", action="store_true", help="count, measure nothing")
    return parser.parse_intermixed_args(arguments)


def _cases(options: argparse.Namespace) -> list[Case]:
    """All of a run: by number of layers, the peer last."""
    recipes = [(OURS, recipe) for recipe in options.recipe.split(",")]
    recipes += [(options.peer, PEER_RECIPE)] if options.peer else []
    return [
        Case(
            provider,
            options.model,
            _layers(text),
            recipe,
            frames=options.frames,
            sample_frames=options.sample_frames,
            micro_batch_size=options.micro_batch_size,
            overrides=tuple(options.overrides),
            steps=options.steps,
        )
        for text, (provider, recipe) in product(options.layers.split(","), recipes)
    ]


def _layers(text: str) -> int | None:
    if text != "all" and not text.isdecimal():
        raise ValueError(f"--layers: {text!r} is no number of layers; write numbers or all, with commas between them")
    return None if text == "all" else int(text)


if __name__ == "__main__":
    sys.exit(main())
