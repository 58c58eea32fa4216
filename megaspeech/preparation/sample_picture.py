"""A picture of one sample: what each party sounds like, the words over their frames, the streams below.

Axes: Q codebooks, T frames.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.mlab import specgram

from megaspeech.data.tasks import PROMPT_FRAMES, ZERO_TOKEN
from megaspeech.preparation.inspection import Inspected, Party

WINDOW = 512
"""Samples of a window of the spectrogram."""
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans JP", "IPAexGothic", "IPAGothic", "Hiragino Sans", "Yu Gothic")
"""Asked one after the other for a character; those that are installed. One that none of them has becomes a box."""


def draw_sample(sample: Inspected, path: str | Path) -> None:
    """Write the picture; the suffix of `path` names the format."""
    num_frames = sample.codes_ST.shape[1]
    heights = [2.0] * len(sample.parties) + [1.6]
    figure = Figure(figsize=(min(60, max(9, 0.16 * num_frames)), 1.3 * sum(heights) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (name, party) in zip(rows, sample.parties.items(), strict=False):
        _spectrogram(axes, party, sample=sample)
        _words(axes, sample)
        axes.set_ylabel(f"{name}, kHz")
    _streams(rows[-1], sample)
    rows[-1].set_xlim(0, num_frames)
    rows[-1].set_xlabel(f"frame ({1000 / sample.frame_rate:g} ms)")
    rows[0].set_title(f"{sample.task.key}: {' '.join(word.word for word in sample.words)[:120]}", fontsize=10)
    fonts = [font for font in FONTS if font in get_font_names()]
    for text in (rows[0].title, *(text for axes in rows for text in axes.texts)):
        text.set_fontfamily(fonts)
    figure.savefig(path, dpi=110)


def _spectrogram(axes: Axes, party: Party, *, sample: Inspected) -> None:
    """Log power, 80 dB deep, on the clock of the frames."""
    samples_N = np.pad(party.waveform, (0, max(0, WINDOW - len(party.waveform))))
    power, _, _ = specgram(samples_N + 1e-7, NFFT=WINDOW, noverlap=WINDOW * 3 // 4, Fs=sample.sample_rate)
    decibels = 10 * np.log10(power + 1e-12)
    extent = (0, len(samples_N) / sample.sample_rate * sample.frame_rate, 0, sample.sample_rate / 2000)
    axes.imshow(
        decibels, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=decibels.max() - 80, rasterized=True
    )


def _words(axes: Axes, sample: Inspected) -> None:
    """Where the text stream writes each word."""
    top = sample.sample_rate / 2000
    for word in sample.words:
        axes.axvspan(word.first_frame, word.last_frame + 1, color="white", alpha=0.2, linewidth=0)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(word.first_frame, 0.93 * top, word.word, fontsize=7, va="center", clip_on=True, bbox=box)


def _streams(axes: Axes, sample: Inspected) -> None:
    """Every stream's tokens in colours of its own range; white where there is none."""
    codes_ST = sample.codes_ST
    present = codes_ST != ZERO_TOKEN
    most = np.where(present, codes_ST, 1).max(1, keepdims=True).clip(1)
    shown = np.ma.masked_array(codes_ST / most, mask=~present)
    axes.imshow(
        shown, aspect="auto", interpolation="nearest", cmap="viridis", extent=(0, codes_ST.shape[1], len(codes_ST), 0)
    )
    axes.axvline(PROMPT_FRAMES, color="black", linewidth=0.8)
    bounds = [0, 1, 1 + sample.num_codebooks, len(codes_ST)]
    axes.set_yticks(np.convolve(bounds, (0.5, 0.5), "valid"), ["text", "says", "hears"])
    for bound in bounds[1:-1]:
        axes.axhline(bound, color="white", linewidth=2)
