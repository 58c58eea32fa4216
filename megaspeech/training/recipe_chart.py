"""The picture of a comparison of recipes: their losses together, and how far each lies from the first one's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megaspeech.training.recipes import Trained, smooth

PANELS = {"text_loss": "text", "audio_loss": "audio"}


def draw(trained: Sequence[Trained], path: Path, *, reference: str, band: float, title: str) -> None:
    """Write a PNG: above, losses by step, smoothed over the pale raw ones; below, the difference from the reference.

    Args:
        trained: recipes; those that have not run are left out.
        path: of the PNG.
        reference: recipe that the others are held against.
        band: difference that is allowed at the end, as a share.
        title: what was trained, and where.
    """
    runs = [run for run in trained if run.has_run]
    expected = next(run for run in runs if run.recipe == reference)
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    panels = figure.subplots(2, len(PANELS), sharex=True, height_ratios=(2, 1))
    for column, (name, word) in enumerate(PANELS.items()):
        above, below = panels[:, column]
        for index, run in enumerate(runs):
            _draw_loss(above, run.losses[name], label=run.recipe, colour=f"C{index}")
            if run is not expected:
                _draw_difference(below, run.losses[name], expected.losses[name], colour=f"C{index}")
        above.set_title(f"{word} loss", fontsize=11)
        above.set_ylabel("nats a token, weighted")
        above.legend(title="smoothed over the last tenth\nof the steps; pale: as measured", title_fontsize=8)
        below.axhspan(-band, band, color="grey", alpha=0.2, linewidth=0, label=f"allowed at the end: {band:.1%}")
        below.axhline(0, color="black", linewidth=0.8)
        below.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1))
        below.set_ylabel(f"smoothed, against {reference}")
        below.set_xlabel("optimizer step")
        below.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)


def _draw_loss(axes: Axes, values: Sequence[float], *, label: str, colour: str) -> None:
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values), color=colour, linewidth=1.6, label=label)


def _draw_difference(axes: Axes, values: Sequence[float], expected: Sequence[float], *, colour: str) -> None:
    """Over the steps that both have: a run may have stopped before its end."""
    pairs = list(zip(smooth(values), smooth(expected), strict=False))
    axes.plot(range(1, len(pairs) + 1), [own / other - 1 for own, other in pairs], color=colour, linewidth=1.4)
