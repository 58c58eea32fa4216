"""Losses and accuracies by stream, reduced over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaspeech.config.schema import StreamsSection
from megaspeech.parallel.reductions import sum_over_stage


@dataclass(frozen=True)
class StreamMetrics:
    """Means over a global batch.

    `loss` is what is minimised, `text` and `audio` its two parts; `losses` and `accuracies` are unweighted, by
    predicted stream, and leave out streams without a counted token. `num_frames` leaves out padding, which is the
    share `padding` of all frames.
    """

    loss: float
    text: float
    audio: float
    losses: dict[str, float]
    accuracies: dict[str, float]
    num_frames: int
    padding: float


def predicted_stream_names(streams: StreamsSection) -> list[str]:
    """`text`, then `codebook_0` and so on."""
    return ["text", *(f"codebook_{index}" for index in range(streams.num_codebooks))]


def reduce_metrics(reports: Sequence[dict[str, Tensor]], *, totals: Tensor, streams: StreamsSection) -> StreamMetrics:
    """The metrics of a step from its microbatches' reports; all ranks of the last stage call this.

    Args:
        reports: what the loss function of `training.forward_step` reported.
        totals: `Batch.totals` of the global batch `[4]`.
        streams: names the predicted streams.
    """
    weighted = torch.stack([report["weighted"] for report in reports]).sum(0)
    statistics = torch.stack([report["statistics"] for report in reports]).sum(0)
    total = torch.cat([weighted.double(), statistics.double().flatten()])
    total = sum_over_stage(total).cpu()
    text, audio = (total[:2] / totals[:2].cpu().clamp(min=1e-9)).tolist()
    losses, accuracies = {}, {}
    rows = total[2:].view(-1, 3).tolist()
    for name, (loss, count, correct) in zip(predicted_stream_names(streams), rows, strict=True):
        if count:
            losses[name], accuracies[name] = loss / count, correct / count
    frames, all_frames = totals[2:].tolist()
    return StreamMetrics(
        text + audio, text, audio, losses, accuracies, num_frames=int(frames), padding=1 - frames / all_frames
    )
