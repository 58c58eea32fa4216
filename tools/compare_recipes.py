"""Check that the precision recipes train the same model: one run of a config in each, from one seed checkpoint.

    python tools/compare_recipes.py CONFIG.toml --recipes bf16,fp8-tensorwise --output DIR [section.field=value ...]

Alone or under torchrun, on the layout that the config names. A final loss is the mean over the last tenth of the steps;
each recipe's, text and audio by themselves too, is held against that of the first recipe that runs. The exit status is
0 where all that ran are within the band, 1 where one is not, or none ran. DIR gets the runs, recipes.json, recipes.png.

"control" among the recipes repeats the first one in microbatches of half the size, its sums in another order: what lies
no further apart than these two says nothing about a recipe, and where they leave the band, the band is too narrow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megaspeech.config.computation import ParallelSection
from megaspeech.parallel import groups
from megaspeech.parallel.launch import take_variables_from_slurm
from megaspeech.training.recipe_chart import draw
from megaspeech.training.recipes import CONTROL, JUDGED, Trained, Verdict, exit_status, judge, train_recipes

RECIPES = f"bf16,{CONTROL},fp8-delayed,fp8-tensorwise,fp8-blockwise"


def main() -> int:
    """Run; see above for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the run; it needs its shards")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--recipes", default=RECIPES, help="of precision.recipe")
    parser.add_argument("--steps", type=int, default=300, help="of every run")
    parser.add_argument("--band", type=float, default=0.01, help="largest difference of a final loss, as a share")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything; all nodes share it")
    parser.add_argument("--json", type=Path, help="if not DIR/recipes.json; the picture goes beside it")
    arguments = parser.parse_intermixed_args()
    warnings.filterwarnings("ignore")
    take_variables_from_slurm()
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        groups.join(ParallelSection())
        trained = _train(arguments, console=Console(stderr=True, quiet=not is_first))
        dist.barrier()
        groups.shut_down()  # not where one fails: it would wait for the others, which wait for it
    except ValueError as error:
        if is_first:
            print(f"compare_recipes: {error}", file=sys.stderr)
        return 1
    verdicts = judge(trained, band=arguments.band)
    if is_first:
        _report(trained, verdicts, arguments)
    return exit_status(verdicts)


def _train(arguments: argparse.Namespace, *, console: Console) -> list[Trained]:
    recipes = arguments.recipes.split(",")
    runs = train_recipes(
        recipes,
        config_path=arguments.config,
        overrides=arguments.overrides,
        directory=arguments.output,
        train_steps=arguments.steps,
    )
    trained = []
    with console.status("") as status:
        for recipe in recipes:
            status.update(f"{recipe}: {arguments.steps} steps ({len(trained) + 1} of {len(recipes)})")
            trained.append(next(runs))
            console.print(f"{recipe}: {trained[-1].fault or 'done'}", highlight=False)
    return trained


def _report(trained: list[Trained], verdicts: list[Verdict], arguments: argparse.Namespace) -> None:
    """The table, the figures, the picture."""
    Console(width=None if sys.stdout.isatty() else 150).print(_table(verdicts))
    for verdict in verdicts:
        if verdict.fault:
            print(f"{verdict.recipe}: {verdict.fault}")
    machine = {"device": _device(), "torch": torch.__version__, "python": platform.python_version()}
    curves = {run.recipe: {name: _rounded(run.losses[name]) for name in JUDGED if run.has_run} for run in trained}
    name = f"{arguments.config.resolve().parent.name}/{arguments.config.name}"
    asked = {"config": name, "overrides": arguments.overrides, "steps": arguments.steps}
    found = {**asked, "machine": machine, "verdicts": [_row(verdict) for verdict in verdicts], "curves": curves}
    path = arguments.json or arguments.output / "recipes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if reference := verdicts[0].reference:
        title = f"{' '.join([name, *arguments.overrides])}: {arguments.steps} steps from one seed, {machine['device']}"
        draw(trained, path.with_suffix(".png"), reference=reference, band=arguments.band, title=title)


def _table(verdicts: list[Verdict]) -> Table:
    reference, band = verdicts[0].reference, verdicts[0].band
    table = Table("recipe", *JUDGED, "stream that differs most", f"within {band:.1%} of {reference}")
    for verdict in verdicts:
        if not verdict.has_run:
            table.add_row(verdict.recipe, *["-"] * (len(JUDGED) + 1), "not run")
            continue
        figures = [f"{verdict.finals[name]:.4f} ({verdict.differences.get(name, 0):+.2%})" for name in JUDGED]
        stream = verdict.worst_stream
        largest = f"{stream} {verdict.differences[stream]:+.2%}" if stream else "-"
        table.add_row(verdict.recipe, *figures, largest, "[green]yes" if verdict.holds else "[red]NO")
    return table


def _row(verdict: Verdict) -> dict:
    return {**asdict(verdict), "holds": verdict.holds}


def _device() -> str:
    """The GPU's name, or the processor's where /proc tells it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text(encoding="utf-8").splitlines() if processor.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]


if __name__ == "__main__":
    sys.exit(main())
