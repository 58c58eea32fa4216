"""How a run of the benchmarks is shown and kept: a table in the terminal; JSON, Markdown and a picture in a folder."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megaspeech.kernels.benchmarks.aims import Judged, judge
from megaspeech.kernels.benchmarks.plot import draw
from megaspeech.kernels.benchmarks.providers import PROVIDERS
from megaspeech.kernels.benchmarks.rows import MEASURED, Report, Row, by_case

HEADER = ("model", "frames", "provider", "forward ms", "rate", "floor", "backward ms", "rate", "floor", "peak GB")
AIMS_HEADER = ("operation", "aim", "bound", "worst", "where", "cases", "verdict")
COLOURS = {"pass": "green", "fail": "red", "not measured": "yellow"}


def show(report: Report, console: Console) -> None:
    """The tables, what failed in red."""
    for operation, lines in _lines(report).items():
        table = Table(*HEADER, title=f"{operation}, rates in {_unit(report, operation)}")
        for line, is_fault in lines:
            table.add_row(*line, style="red" if is_fault else None)
        console.print(table)
    for check in (check for check in report.checks if not check["passed"]):
        where = f"{check['operation']}, {check['model']}, {check['provider']}, {check['dtype']}"
        console.print(f"[red]check failed[/]: {where}: {_errors(check)}")
    aims = Table(*AIMS_HEADER, title="aims")
    for judged in judge(report.rows):
        aims.add_row(*_aim_cells(judged), style=COLOURS[judged.verdict])
    console.print(aims)


def write(report: Report, directory: Path) -> Path:
    """kernels_DEVICE.json, .md and .png in `directory`; returns the first."""
    directory.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "_", report.machine["device"].lower()).strip("_")
    path = directory / f"kernels_{slug}.json"
    aims = [asdict(judged) for judged in judge(report.rows)]
    kept = {
        "machine": report.machine,
        "floors": report.floors,
        "aims": aims,
        "rows": [asdict(row) for row in report.rows],
        "checks": report.checks,
    }
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_markdown(report, picture=path.with_suffix(".png").name), encoding="utf-8")
    draw(report, path.with_suffix(".png"))
    return path


def _markdown(report: Report, *, picture: str) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in report.machine.items() if value is not None)
    floors = ", ".join(f"{value:,.1f} {unit}" for unit, value in report.floors.items())
    parts = [
        "# Kernels",
        f"{machine}. Floors, a copy and a matrix product in the same run: {floors}. Times are medians of repetitions "
        "from a cold L2 cache; `floor` is the rate as a share of the floor; `peak` is above the inputs, over both "
        "directions. Made by `python kernels/benchmarks/run.py`; quartiles and errors are in the JSON beside this.",
        f"![rates]({picture})",
        "## Aims, judged by the worst case",
        grid(AIMS_HEADER, [_aim_cells(judged) for judged in judge(report.rows)]),
    ]
    for operation, lines in _lines(report).items():
        legend = "; ".join(f"{provider.name}: {provider.what}" for provider in PROVIDERS[operation])
        title = f"## {operation}, {_unit(report, operation)}"
        parts += [title, f"{legend}.", grid(HEADER, [line for line, _ in lines])]
    return "\n\n".join(parts) + "\n"


def grid(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    rule = ("---",) * len(header)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (header, rule, *lines))


def _unit(report: Report, operation: str) -> str:
    return next(row.unit for row in report.rows if row.operation == operation)


def _lines(report: Report) -> dict[str, list[tuple[tuple[str, ...], bool]]]:
    """By operation: the cells of a case and provider, and whether it is at fault."""
    lines: dict[str, list] = {}
    for (operation, model, frames), providers in by_case(report.rows).items():
        for name, directions in providers.items():
            forward, backward = directions["forward"], directions["backward"]
            cells = (model, f"{frames:,}", name, *_figures(forward, backward))
            lines.setdefault(operation, []).append((cells, forward.is_fault))
    return lines


def _figures(*directions: Row) -> tuple[str, ...]:
    """Time, rate and share of the floor of each direction, and the peak; or why there are none."""
    status = directions[0].status
    if status != MEASURED:
        return status, *("-",) * 6
    peaks = [row.peak_bytes for row in directions]
    cells = [(f"{row.median_ms:.3f}", f"{row.rate:,.1f}", f"{row.share_of_floor:.0%}") for row in directions]
    return *cells[0], *cells[1], "-" if None in peaks else f"{max(peaks) / 1e9:.2f}"


def _aim_cells(judged: Judged) -> tuple[str, ...]:
    worst = "-" if judged.worst is None else f"{judged.worst:.3g}"
    where, cases = judged.worst_case or "-", f"{judged.cases} of {judged.all_cases}"
    return judged.operation, judged.text, f"{judged.bound:.3g}", worst, where, cases, judged.verdict


def _errors(check: dict) -> str:
    results = check["errors"].items()
    return "; ".join(f"{name} off by {x['error']:.3g}, {x['allowed']:.3g} allowed" for name, x in results)
