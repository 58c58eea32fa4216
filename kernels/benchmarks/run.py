"""Check the kernels, then time them on one GPU against torch and other libraries.

    python kernels/benchmarks/run.py --output docs/measurements

A provider whose results are wrong is not timed. `--device cpu --tiny` runs all of this without a GPU, kernels in
Triton's interpreter; its figures mean nothing. Returns 1 where one of our kernels is wrong or does not run.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from megaspeech.kernels.benchmarks import report
from megaspeech.kernels.benchmarks.machine import describe_machine
from megaspeech.kernels.benchmarks.operations import OPERATIONS
from megaspeech.kernels.benchmarks.providers import PROVIDERS
from megaspeech.kernels.benchmarks.running import Plan, run
from megaspeech.kernels.benchmarks.shapes import MODELS, NUM_FRAMES, ModelShape

TINY, TINY_FRAMES = ModelShape("tiny", 12, 3, 2, 16, 32, 32, 2), (8, 12)
MILLISECONDS, QUICK_MILLISECONDS = 100, 40
"""How long each direction of a case is repeated by each provider."""
CPU_MEMORY = 80e9


def main(arguments: list[str] | None = None) -> int:
    """Run; see the module."""
    options = _parse(arguments)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which is when a kernel is first asked for
    elif not torch.cuda.is_available():
        print("run.py: here is no GPU; --device cpu --tiny runs without one", file=sys.stderr)
        return 1
    plan = _plan(options)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("floors", total=plan.num_steps)
        found = run(
            plan,
            machine=describe_machine(plan.device, packages=("triton", "liger-kernel")),
            advance=lambda done: progress.update(task, advance=1, description=done),
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    report.show(found, console)
    if options.output:
        console.print(f"written: {report.write(found, options.output)}, .md and .png")
    return int(any(row.is_fault for row in found.rows if row.is_ours))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [shape.name for shape in MODELS]
    names = list(dict.fromkeys(provider.name for providers in PROVIDERS.values() for provider in providers))
    parser.add_argument("--only", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS), help="operations")
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="MODEL", help=", ".join(models))
    parser.add_argument("--frames", nargs="+", type=int, help=f"{', '.join(map(str, NUM_FRAMES))} without it")
    parser.add_argument("--providers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="the fewest frames only, and repeated less")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--minutes", type=float, default=8.0, help="what has not begun by then is skipped")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--output", type=Path, help="folder for JSON, Markdown and picture; nothing is written without it"
    )
    return parser.parse_args(arguments)


def _plan(options: argparse.Namespace) -> Plan:
    frames = tuple(options.frames or (TINY_FRAMES if options.tiny else NUM_FRAMES))
    providers = {
        name: tuple(provider for provider in PROVIDERS[name] if provider.name in options.providers)
        for name in options.only
    }
    return Plan(
        providers,
        shapes=(TINY,) if options.tiny else tuple(shape for shape in MODELS if shape.name in options.models),
        frames=(min(frames),) if options.quick else frames,
        device=options.device,
        memory=torch.cuda.mem_get_info()[1] if options.device == "cuda" else CPU_MEMORY,
        milliseconds=QUICK_MILLISECONDS if options.quick else MILLISECONDS,
        minutes=options.minutes,
    )


if __name__ == "__main__":
    sys.exit(main())
