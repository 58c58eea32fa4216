"""The quickstart's one picture: what was learned, what it sounds like, when it answers."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from megaspeech.codecs.protocol import Codec  # noqa: E402
from megaspeech.data.tasks import Timing  # noqa: E402
from megaspeech.data.tokenizer import Tokenizer  # noqa: E402
from megaspeech.data.transcript import written_words  # noqa: E402
from megaspeech.streaming.evaluation import Evaluated  # noqa: E402


def draw(
    directory: Path, results: list[Evaluated], *, codes: dict, codec: Codec, tokenizer: Tokenizer, timing: Timing
) -> None:
    """Write picture.png: loss by task, reference and model's speech, an answer's timing on the frames."""
    figure = plt.figure(figsize=(13, 11), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1, 0.8, 1))
    text_axes, audio_axes = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    draw_losses(directory / "train" / "metrics.jsonl", text_axes, audio_axes)
    spoken = next(result for result in results if result.utterance.task.key == "tts-en")
    reference = codec.decode(torch.from_numpy(codes[spoken.utterance.spoken])[None])[0].numpy()
    said = spoken.reference
    for place, (title, samples) in enumerate(
        ((f'held-out "{said}", through the codec', reference), (f'the model says "{said}"', spoken.waveform_N))
    ):
        axes = figure.add_subplot(grid[1, place])
        _spectrogram(axes, samples, sample_rate=codec.sample_rate)
        axes.set_title(title, fontsize=10)
    answer = next(result for result in results if result.utterance.task.key == "s2st-ja-en")
    _timeline(figure.add_subplot(grid[2, :]), answer, codec=codec, tokenizer=tokenizer, timing=timing, codes=codes)
    figure.savefig(directory / "picture.png", dpi=110)
    plt.close(figure)


def draw_losses(metrics: Path, text_axes: plt.Axes, audio_axes: plt.Axes) -> None:
    """Validation losses by task from a run's metrics.jsonl; audio of the tasks that speak."""
    curves: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for record in map(json.loads, metrics.read_text().splitlines()):
        if record["kind"].startswith("valid/"):
            task = record["kind"].rpartition("/")[2]  # valid/SET/TASK
            curves[task].append((record["step"], record["text_loss"], record["audio_loss"]))
    for axes, column, title in ((text_axes, 1, "validation loss, text"), (audio_axes, 2, "validation loss, audio")):
        for task, rows in curves.items():
            if column == 1 or task.startswith(("tts", "s2st")):
                axes.plot([row[0] for row in rows], [row[column] for row in rows], marker=".", label=task)
        axes.set(title=title, xlabel="step", yscale="log")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)


def _spectrogram(axes: plt.Axes, samples: np.ndarray, *, sample_rate: int, start: float = 0.0) -> None:
    """Log power, 80 dB deep, the clock starting at `start` seconds."""
    padded = np.asarray(samples, dtype=np.float32) + 1e-7
    power, frequencies, times = matplotlib.mlab.specgram(padded, NFFT=512, Fs=sample_rate, noverlap=384)
    decibels = 10 * np.log10(power + 1e-12)
    axes.pcolormesh(
        times + start, frequencies / 1000, decibels, vmin=decibels.max() - 80, cmap="magma", rasterized=True
    )
    axes.set(xlabel="seconds", ylabel="kHz")


def _timeline(
    axes: plt.Axes, result: Evaluated, *, codec: Codec, tokenizer: Tokenizer, timing: Timing, codes: dict
) -> None:
    """Heard words, written words and spoken sound of one speech-to-speech answer, on the session's clock."""
    utterance, frame = result.utterance, 1 / codec.frame_rate
    origin = timing.speech_origin(utterance.task) * frame
    heard = codec.decode(torch.from_numpy(codes[utterance.heard])[None])[0].numpy()
    rows = ((2.0, heard, origin, "heard"), (0.0, result.waveform_N, 0.0, "said"))
    for height, samples, start, name in rows:
        scaled = np.asarray(samples) / max(1e-6, float(np.abs(samples).max())) * 0.6
        seconds = start + np.arange(len(scaled)) / codec.sample_rate
        axes.plot(seconds, height + scaled, linewidth=0.4, color="tab:blue" if name == "heard" else "tab:orange")
        axes.text(-0.02, height, name, ha="right", va="center")
    for word in utterance.source_words:
        axes.axvspan(origin + word.start, origin + word.end, ymin=0.66, ymax=0.98, alpha=0.15, color="tab:blue")
    for word in written_words(result.answer.text, tokenizer=tokenizer):
        axes.axvspan(word.first_frame * frame, (word.last_frame + 1) * frame, ymin=0.42, ymax=0.58, color="tab:green")
        axes.text(word.first_frame * frame, 1.0, f" {word.word}", va="center", fontsize=9)
    axes.text(-0.02, 1.0, "written", ha="right", va="center")
    axes.set_xticks(np.arange(0, len(result.answer.text) + 1, 5) * frame, minor=False)
    axes.set_xticks(np.arange(len(result.answer.text) + 1) * frame, minor=True)
    axes.grid(which="both", axis="x", alpha=0.25)
    axes.set(
        ylim=(-0.9, 2.9),
        yticks=[],
        xlabel="seconds of the session (grid: frames of 80 ms)",
        title=f"speech to speech: heard in Japanese, answered in English: {' '.join(result.reference)}",
    )
