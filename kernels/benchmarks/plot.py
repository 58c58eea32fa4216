"""The picture of a run: rates of all providers against the floor, forward and backward."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megaspeech.kernels.benchmarks.rows import DIRECTIONS, Report, Row


def draw(report: Report, path: Path) -> None:
    """Write a PNG: a row of panels an operation, a group of bars a case, a bar a provider; no bar where no figure."""
    operations = list(dict.fromkeys(row.operation for row in report.rows))
    providers = list(dict.fromkeys(row.provider for row in report.rows))
    colours = {provider: f"C{index}" for index, provider in enumerate(providers)}
    cases = len({row.case[1:] for row in report.rows})
    figure = Figure(figsize=(2 * max(4.0, 0.9 * cases), 1 + 2.6 * len(operations)), layout="constrained")
    panels = figure.subplots(len(operations), len(DIRECTIONS), squeeze=False)
    for operation, line in zip(operations, panels, strict=True):
        for direction, axes in zip(DIRECTIONS, line, strict=True):
            rows = [row for row in report.rows if (row.operation, row.direction) == (operation, direction)]
            _draw_panel(axes, rows, colours=colours, floor=report.floors[rows[0].unit])
            axes.set_title(f"{operation}, {direction}", fontsize=9)
    bars = {label: bar for axes in panels.flat for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(bars.values(), bars.keys(), loc="outside lower center", ncols=len(bars), fontsize=8)
    figure.suptitle(f"{report.machine['device']}. Dashed: the floor, measured in the same run", fontsize=10)
    figure.savefig(path, dpi=120)


def _draw_panel(axes: Axes, rows: list[Row], *, colours: dict[str, str], floor: float) -> None:
    cases = list(dict.fromkeys((row.model, row.frames) for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows))
    width = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        rates = [row.rate or 0.0 for row in rows if row.provider == provider]
        places = [place + (index - (len(providers) - 1) / 2) * width for place in range(len(cases))]
        axes.bar(places, rates, width, label=provider, color=colours[provider])
    axes.axhline(floor, color="black", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(cases)), [f"{model}\n{frames:,}" for model, frames in cases], fontsize=7)
    axes.set_ylabel(rows[0].unit, fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
