"""The picture of a run: frames a second of every case, and where the time of our steps goes."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megaspeech.benchmarks.figures import Row
from megaspeech.benchmarks.parts import OTHER, PARTS

PART_COLOURS = {part: "lightgrey" if part == OTHER else f"C{index}" for index, part in enumerate(PARTS)}


def draw(rows: list[Row], path: Path, *, title: str) -> None:
    """Write a PNG: bars of frames a second on the left, of microseconds a frame by part on the right."""
    names = [f"{row.name}, {row.num_layers} layers" for row in rows]
    figure = Figure(figsize=(13, 1.8 + 0.45 * len(rows)), layout="constrained")
    speed, parts = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        if row.has_figures:
            speed.barh(place, row.frames_per_second, color="C0" if row.parts_ms else "grey")
            whence = f" ({row.status})" if row.quartiles_ms is None else ""
            utilised = "" if row.share_of_product is None else f", {row.share_of_product:.0%} of the product's rate"
            speed.text(
                row.frames_per_second,
                place,
                f" {row.frames_per_second:,.0f}{utilised}{whence}",
                va="center",
                fontsize=8,
            )
        else:
            lines = textwrap.wrap(row.status, 90)[:2]
            speed.text(0, place, "\n".join(lines), va="center", fontsize=7, color="red")
    speed.set_yticks(range(len(rows)), names, fontsize=8)
    speed.invert_yaxis()
    speed.set_xlim(right=1.6 * max((row.frames_per_second or 0 for row in rows), default=1) or 1)
    speed.set_xlabel("frames a second", fontsize=9)
    _draw_parts(parts, rows)
    figure.legend(*parts.get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _draw_parts(axes: Axes, rows: list[Row]) -> None:
    for part, colour in PART_COLOURS.items():
        spent = [1e3 * row.parts_ms.get(part, 0.0) / row.frames for row in rows]
        before = [
            1e3 * sum(row.parts_ms.get(each, 0.0) for each in PARTS[: PARTS.index(part)]) / row.frames for row in rows
        ]
        axes.barh(range(len(rows)), spent, left=before, color=colour, label=part)
    axes.set_xlabel("microseconds a frame, by part", fontsize=9)
    for place, row in enumerate(rows):
        if row.has_figures and not row.parts_ms:  # a peer, whose parts are not taken
            axes.barh(place, 1e6 / row.frames_per_second, color="white", edgecolor="grey", hatch="//")
