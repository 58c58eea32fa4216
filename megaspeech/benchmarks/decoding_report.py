"""What `tools/measure_decoding.py` shows and keeps: tables in the terminal, JSON and Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from megaspeech.benchmarks.decoders import PROVIDERS
from megaspeech.benchmarks.decoding import SAMPLE_RATE, DecodingFigures, Row
from megaspeech.kernels.benchmarks.report import grid

KINDS = {"to_waveform": "file to waveform", "to_codes": "file to codes"}


def lines(figures: DecodingFigures, kind: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, a line a kind of file) of the medians of `Row.to_waveform` or `Row.to_codes`."""
    providers = list(dict.fromkeys(row.provider for row in figures.rows))
    of_case: dict[tuple[str, str], dict[str, Row]] = {}
    for row in figures.rows:
        of_case.setdefault((row.format, row.source), {})[row.provider] = row
    header = (f"{KINDS[kind]}, h a CPU-second", *providers)
    return header, [
        (", ".join(case), *(_cell(by_provider[name], kind) for name in providers))
        for case, by_provider in of_case.items()
    ]


def faults(figures: DecodingFigures) -> list[str]:
    """Who did not decode what, and why; once where the reason is the same for all."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in figures.rows:
        if row.fault:
            where.setdefault((row.provider, row.fault), []).append(f"{row.format}, {row.source}")
    return [f"{provider}, {'; '.join(cases)}: {fault}" for (provider, fault), cases in where.items()]


def end_to_end_line(figures: DecodingFigures) -> str:
    """What the preparation's own path came to."""
    one = figures.end_to_end
    return (
        f"All {figures.num_files} files in turn, {one.hours:.2f} h, to codes by the preparation's own path with one "
        f"decoding thread: {one.per_cpu_second:.3f} h a CPU-second, {one.per_second:.3f} h a second; the encoder "
        f"waited {one.share_waited:.1%} of its time, over {one.num_windows} windows of files."
    )


def spread(figures: DecodingFigures) -> float:
    """The largest factor between two rounds of one figure."""
    rounds = [values for row in figures.rows for values in (row.to_waveform, row.to_codes) if values]
    return max((max(values) / min(values) for values in rounds), default=1.0)


def show(figures: DecodingFigures, console: Console) -> None:
    """All of it."""
    for kind in KINDS:
        header, cells = lines(figures, kind)
        table = Table(*header)
        for line in cells:
            table.add_row(*line)
        console.print(table)
    for said in (*faults(figures), end_to_end_line(figures)):
        console.print(said, highlight=False, markup=False)


def write(figures: DecodingFigures, path: Path, *, machine: dict[str, Any], note: str) -> None:
    """JSON to `path`, and Markdown beside it; `note` says what else the figures depend on."""
    values = {"machine": machine, "note": note, **asdict(figures)}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    said = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)
    legend = "\n".join(f"- {provider.name}: {provider.what}." for provider in PROVIDERS)
    missing = "\n".join(f"- {fault}" for fault in faults(figures))
    text = f"""# Decoding audio

{" ".join(filter(None, (f"{said}.", note)))}

By `tools/measure_decoding.py`: {figures.hours:.2f} hours of espeak-ng's speech in {figures.num_files} files of two
sentences, the same in every kind of file, written by libsndfile at its default qualities and read from the page cache.
Hours of audio a second of CPU time, user and system, of all threads: medians of {figures.num_rounds} rounds in which
providers take turns; two rounds of one figure differ by a factor of {spread(figures):.2f} at most. Before, the length
and level of every waveform are checked.

{legend}

To waveforms of {SAMPLE_RATE // 1000} kHz and one channel:

{grid(*lines(figures, "to_waveform"))}

To waveforms at the rate of the `spectral` codec (16 kHz) and its codes, encoded in batches as preparation does:

{grid(*lines(figures, "to_codes"))}
{f"{chr(10)}Left out:{chr(10)}{chr(10)}{missing}{chr(10)}" if missing else ""}
{end_to_end_line(figures)}
"""
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def _cell(row: Row, kind: str) -> str:
    return row.fault.partition(":")[0] if row.fault else f"{median(getattr(row, kind)):.3f}"
