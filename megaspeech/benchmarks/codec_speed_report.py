"""Encoding speeds shown and kept: a table in the terminal; JSON, Markdown and a chart."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megaspeech.benchmarks.codec_speed import MEASURED, Row
from megaspeech.kernels.benchmarks.report import grid

HEADER = ("codec", "M parameters", "", "batch", "encode x real time", "decode x real time", "peak GB", "time by part")
WHAT = (
    "Random weights, which do not change the time. `x real time`: seconds of sound a second, whole calls with "
    "waveforms from the host's memory, medians. Time by part: of other calls, which wait at the end of each part"
)


def show(rows: list[Row], console: Console) -> None:
    """The table, what was not measured in red."""
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*_cells(row), style=None if row.status == MEASURED else "red")
    console.print(table)


def write(rows: list[Row], machine: dict[str, Any], path: Path) -> None:
    """JSON to `path`; Markdown and a chart beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"what": WHAT, "machine": machine, "rows": [_rounded(asdict(row)) for row in rows]}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    named = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)
    lines = [_cells(row) for row in rows]
    parts = [
        "# Encoding speed of codecs",
        f"{named}. {WHAT}.",
        f"![time by part]({path.stem}.png)",
        grid(HEADER, lines),
    ]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw([row for row in rows if row.status == MEASURED], path.with_suffix(".png"))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """With four significant digits; figures that there are none of are null, which is JSON."""
    parts = {name: float(f"{value:.4g}") for name, value in row["parts_ms"].items()}
    speeds = {key: row[key] for key in ("encode_x_real_time", "decode_x_real_time")}
    known = {key: float(f"{value:.4g}") if value == value else None for key, value in speeds.items()}
    return {**row, **known, "parts_ms": parts}


def _cells(row: Row) -> tuple[str, ...]:
    case = row.case
    name = (row.label, f"{row.num_parameters / 1e6:.1f}", case.dtype, f"{case.batch_size} x {case.seconds:g} s")
    if row.status != MEASURED:
        return (*name, row.status, "-", "-", "-")
    total = sum(row.parts_ms.values())
    shares = ", ".join(f"{part} {value / total:.0%}" for part, value in row.parts_ms.items())
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.1f}"
    return (*name, f"{row.encode_x_real_time:,.4g}", f"{row.decode_x_real_time:,.4g}", peak, shares)


def draw(rows: list[Row], path: Path) -> None:
    """Write a PNG: milliseconds a second of sound, by part."""
    figure = Figure(figsize=(11, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for row in rows for name in row.parts_ms))
    left = [0.0] * len(rows)
    for name in names:
        sound = [row.case.batch_size * row.case.seconds for row in rows]
        widths = [row.parts_ms.get(name, 0.0) / seconds for row, seconds in zip(rows, sound, strict=True)]
        axes.barh(range(len(rows)), widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    labels = [f"{row.label}, {row.case.dtype}, {row.case.batch_size} x {row.case.seconds:g} s" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds of encoding a second of sound")
    if names:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
