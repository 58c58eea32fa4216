"""A comparison of codecs shown and kept: tables; JSON, Markdown, a chart and spectrograms side by side."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megaspeech.benchmarks.codec_comparison import Row, Sound
from megaspeech.benchmarks.codec_quality import WHAT
from megaspeech.kernels.benchmarks.machine import describe_machine
from megaspeech.kernels.benchmarks.report import grid

HEADER = ("codec", "bit/s", "tokens/s", "compression", "mel", "SI-SDR", "STOI", "PESQ")
COST_HEADER = ("codec", "entries used", "bits of entropy a code", "encode x real time", "decode x real time", "streams")


@dataclass(frozen=True)
class Comparison:
    """Rows, on what, and where: `left_out` is (file, reason)."""

    rows: list[Row]
    num_recordings: int
    seconds: float
    left_out: list[tuple[str, str]]
    machine: dict[str, Any]
    remarks: list[str]


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, with its processor, for codecs are timed on it too."""
    machine = describe_machine(device.type, packages=("transformers", "moshi", "pystoi", "pesq"))
    return {
        **machine,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name, where /proc tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def show(found: Comparison, console: Console) -> None:
    """The tables, then what was left out."""
    for header, lines in _tables(found.rows):
        table = Table(*header)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for path, reason in found.left_out:
        console.print(f"left out: {path}: {reason}", style="red", markup=False)


def write(found: Comparison, path: Path, *, sound: Sound, heard: Sequence[Tensor]) -> None:
    """JSON to `path`; Markdown, a chart and spectrograms of one recording beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"what": WHAT, **asdict(found)}
    path.write_text(json.dumps(_rounded(kept), indent=1) + "\n", encoding="utf-8")
    pictures = path.with_suffix(".png"), path.with_name(path.stem + "_spectrograms.png")
    path.with_suffix(".md").write_text(_markdown(found, pictures=pictures), encoding="utf-8")
    draw(found.rows, pictures[0])
    draw_spectrograms(sound, heard, pictures[1], labels=[row.label for row in found.rows])


def _rounded(value: Any) -> Any:
    """With five significant digits, which is more than is meant."""
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _tables(rows: list[Row]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """(header, lines): nearness, cost, bands."""
    edges = sorted({edge for row in rows for edge in row.quality.band_db})
    starts = [0, *edges[:-1]]
    bands = ("codec", *(f"{low / 1000:g}-{high / 1000:g} kHz" for low, high in zip(starts, edges, strict=True)))
    by_band = [(row.label, *(_figure(row.quality.band_db.get(edge), ".1f") for edge in edges)) for row in rows]
    return [(HEADER, [_cells(row) for row in rows]), (COST_HEADER, [_costs(row) for row in rows]), (bands, by_band)]


def _cells(row: Row) -> tuple[str, ...]:
    quality = row.quality
    return (
        row.label,
        f"{row.bitrate:,.0f}",
        f"{row.tokens_per_second:,.4g}",
        f"{row.compression:,.0f}",
        f"{quality.mel:.3f}",
        f"{quality.si_sdr_db:.1f}",
        _figure(quality.stoi, ".3f"),
        _figure(quality.pesq, ".2f"),
    )


def _costs(row: Row) -> tuple[str, ...]:
    shares, entropies = row.use.share, row.use.entropy_bits
    return (
        row.label,
        f"{min(shares):.0%} to {max(shares):.0%}",
        f"{min(entropies):.1f} to {max(entropies):.1f} of {np.log2(row.cardinality):g}",
        f"{row.encode_x_real_time:,.0f}",
        f"{row.decode_x_real_time:,.0f}",
        "yes" if row.can_stream else "no",
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _markdown(found: Comparison, *, pictures: tuple[Path, Path]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in found.machine.items() if value is not None)
    tables = [grid(header, lines) for header, lines in _tables(found.rows)]
    frames = ", ".join(sorted({f"{row.num_frames:,}" for row in found.rows}))
    parts = [
        "# Codecs compared",
        f"{found.num_recordings} recordings, {found.seconds / 60:.1f} minutes ({frames} frames); {machine}. "
        "Labels: frames a second x codebooks of so many entries.",
        *found.remarks,
        "; ".join(f"**{name}**: {what}" for name, what in WHAT.items()) + ".",
        tables[0],
        "Share of a codebook's entries that came up at all, and entropy of its codes, least to most over the codebooks "
        "(both grow with what is encoded). Speeds are of one recording at a time, with what moves it to the device.",
        tables[1],
        "Log-spectral distance by band, dB:",
        tables[2],
        f"![nearness by bit rate, error by band, entropy by codebook]({pictures[0].name})",
        f"![one recording through each codec]({pictures[1].name})",
    ]
    if found.left_out:
        parts.append("Left out: " + "; ".join(f"{path} ({reason})" for path, reason in found.left_out) + ".")
    return "\n\n".join(parts) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Write a PNG: nearness by bit rate, error by band, entropy by codebook."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    near, bands, entropy = figure.subplots(1, 3)
    for row in rows:
        near.plot(row.bitrate, row.quality.mel, "o", label=row.label)
        edges = sorted(row.quality.band_db)
        bands.plot([edge / 1000 for edge in edges], [row.quality.band_db[edge] for edge in edges], "o-")
        entropy.plot(range(1, row.num_codebooks + 1), row.use.entropy_bits, "o-")
    near.set(xscale="log", xlabel="bits a second", ylabel="mel distance", title="nearness")
    for axis_format in (near.xaxis.set_major_formatter, near.xaxis.set_minor_formatter):
        axis_format(StrMethodFormatter("{x:,.0f}"))
    near.legend(fontsize="small")
    bands.set(xlabel="up to kHz", ylabel="log-spectral distance, dB", title="error by band", ylim=(0, None))
    entropy.set(xlabel="codebook", ylabel="bits", title="entropy of a code", ylim=(0, None))
    figure.savefig(path, dpi=110)


def draw_spectrograms(sound: Sound, heard: Sequence[Tensor], path: Path, *, labels: Sequence[str]) -> None:
    """Write a PNG: a recording, and below it what each codec made of it, at the recording's rate."""
    waves = [("as recorded", sound.samples_N), *zip(labels, (wave.numpy() for wave in heard), strict=True)]
    figure = Figure(figsize=(11, 1.9 * len(waves)), layout="constrained")
    for axes, (label, wave) in zip(
        figure.subplots(len(waves), 1, sharex=True, squeeze=False)[:, 0], waves, strict=True
    ):
        with np.errstate(divide="ignore"):  # digital silence
            axes.specgram(wave, NFFT=512, Fs=sound.rate, noverlap=384, vmin=-140, vmax=-40, cmap="magma")
        axes.set_facecolor("black")
        axes.set_title(label, fontsize="small", loc="left")
        axes.set_ylabel("Hz", fontsize="small")
    axes.set_xlabel("seconds")
    figure.savefig(path, dpi=60)  # noise does not compress
