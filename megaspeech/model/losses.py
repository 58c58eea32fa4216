"""From cross entropies by token to the two sums that are minimised and the statistics that are reported."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS = ("loss", "count", "correct")
"""Columns of `Losses.statistics`: sum of the unweighted cross entropies, tokens counted, tokens predicted rightly."""


class Losses(NamedTuple):
    """What the last stage returns of one microbatch, on this tensor parallel rank.

    `weighted`: sum(w * cross entropy) of text and of audio `[2]`, with gradient. Divided by the *global* sums of w
    and added, they are the loss: both are weighted means, as in moshi-finetune.
    `statistics`: `[P, 3]` by predicted stream, without gradient; to be summed over microbatches, tensor, context
    and data parallel ranks.
    """

    weighted: Tensor
    statistics: Tensor


def stream_losses(
    text: tuple[Tensor, Tensor, Tensor],
    audio: tuple[Tensor, Tensor, Tensor],
    *,
    tensor_parallel_size: int,
) -> Losses:
    """Sum up a microbatch.

    Args:
        text: (cross entropy, correct, weight), each `[N]`: all frames, the same on every tensor parallel rank.
        audio: the same `[Q, n]`: this tensor parallel rank's frames.
        tensor_parallel_size: text statistics are divided by it, so that summing them over the group counts them once.
    """
    text_loss, text_correct, text_weight = text
    audio_loss, audio_correct, audio_weight = audio
    weighted = torch.stack([(text_loss * text_weight).sum(), (audio_loss * audio_weight).sum()])
    with torch.no_grad():
        text_row = _statistics(text_loss[None], text_correct[None], text_weight[None]) / tensor_parallel_size
        statistics = torch.cat([text_row, _statistics(audio_loss, audio_correct, audio_weight)])
    return Losses(weighted, statistics)


def _statistics(loss_PN: Tensor, correct_PN: Tensor, weight_PN: Tensor) -> Tensor:
    counted = weight_PN > 0
    return torch.stack([x.float().sum(-1) for x in (loss_PN * counted, counted, correct_PN & counted)], dim=-1)
