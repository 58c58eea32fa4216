"""What `tools/measure_loading.py` shows and keeps: tables in the terminal, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megaspeech.benchmarks.loader import UTILISATION, IndexFigures, LoaderFigures
from megaspeech.kernels.benchmarks.report import grid

AIMS = {"open s": 2.0, "in an epoch, median us": 1000.0, "resident GiB": 2.0, "times the model": 20.0}
GIB = 1 << 30


def index_lines(figures: IndexFigures) -> list[tuple[str, str, str]]:
    """(what, figure, aim)."""
    resident = [f"{size / GIB:.2f}" for size in figures.resident_bytes]
    return [
        ("hours, samples, shards", f"{figures.hours:,.0f}, {figures.num_samples:,}, {figures.num_shards:,}", ""),
        ("codes, GB (holes)", f"{figures.code_bytes / 1e9:,.1f}", ""),
        ("index, GB", f"{figures.index_bytes / 1e9:,.2f}", ""),
        ("disk an hour, MB", f"{(figures.code_bytes + figures.index_bytes) / figures.hours / 1e6:,.2f}", ""),
        ("opened in, s", f"{figures.open_seconds:.3f}", "< 2"),
        ("sample in the order of an epoch, us: median, p99", _pair(figures.in_epoch_us), "< 1,000"),
        ("sample from anywhere, us: median, p99", _pair(figures.anywhere_us), ""),
        (f"resident GiB, opened and after each quarter of {figures.num_drawn:,}", ", ".join(resident), "< 2"),
    ]


def loader_lines(figures: Sequence[LoaderFigures]) -> list[tuple[str, ...]]:
    """A line a measurement; the last cell judges the worker against the aim."""
    return [
        (
            f"{one.global_batch_size:,} on {one.dp_size}",
            f"{one.alone:,.0f}",
            f"{one.worker:,.0f}",
            f"{one.padding:.1%}",
            f"{one.eaten:,.0f}",
            f"{one.worker / one.eaten:.1f}x, aim {AIMS['times the model']:.0f}x",
        )
        for one in figures
    ]


LOADER_HEADER = ("samples a step, on ranks", "frames/s alone", "one worker", "padding", "the model eats", "worker")


def show(index: IndexFigures, loader: Sequence[LoaderFigures], console: Console) -> None:
    """Both tables."""
    first = Table("a set of shards", "", "aim")
    for line in index_lines(index):
        first.add_row(*line)
    second = Table(*LOADER_HEADER)
    for line in loader_lines(loader):
        second.add_row(*line)
    for table in (first, second):
        console.print(table)


def write(index: IndexFigures, loader: Sequence[LoaderFigures], path: Path, *, machine: dict[str, Any]) -> None:
    """JSON to `path`, and Markdown beside it."""
    values = {"machine": machine, "index": asdict(index), "loader": [asdict(one) for one in loader]}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    said = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)
    text = f"""# Opening and loading shards

{said}. Utterances of 11.5 s in the mean, packed into rows of 4,096 frames of 33 streams, by `tools/measure_loading.py`.
The index is real; samples are holes of a sparse file, so that reading one costs the call and the checksum, not the
disk.

{grid(("a set of shards", "", "aim"), index_lines(index))}

What one rank's loader gives, in the process that trains and in one worker beside it, against what the 8B model takes
on one {loader[0].gpu} at {UTILISATION:.0%} of its BF16 rate (by count). Every rank looks at the lengths of the whole
global batch, so that the packing is the same everywhere.

{grid(LOADER_HEADER, loader_lines(loader))}
"""
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def _pair(values: tuple[float, float]) -> str:
    return ", ".join(f"{value:,.0f}" for value in values)
