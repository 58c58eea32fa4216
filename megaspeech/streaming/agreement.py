"""Do the native model and the runtime's agree? Logits of both sides on the same random codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megaspeech.config.schema import StreamsSection
from megaspeech.model.speech_text_model import SpeechTextModel

if TYPE_CHECKING:
    from moshi.models import LMModel


@torch.no_grad()
def largest_difference(
    model: SpeechTextModel, lm: LMModel, *, streams: StreamsSection, num_frames: int = 32, seed: int = 0
) -> float:
    """Largest absolute difference of text and audio logits, zero tokens among the codes, where both are defined.

    Args:
        model: the whole native model on one rank.
        lm: the runtime's model.
        streams: of both.
        num_frames: length of the codes.
        seed: of the codes.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(-1, size, (2, num_frames), generator=generator) for size in streams.cardinalities]
    codes_BST = torch.stack(rows, dim=1)
    text_BTV, audio_BQTV = model.eval()(codes_BST)
    runtime = lm(codes_BST)
    ours = [text_BTV, *audio_BQTV.unbind(1)]
    theirs = [runtime.text_logits[:, 0], *runtime.logits.unbind(1)]
    differences = []
    for mine, other, delay in zip(ours, theirs, streams.delays[: len(ours)], strict=True):
        # Position t of ours is the prediction of frame t - delay; the runtime has moved it there.
        differences.append((mine[:, delay:] - other[:, : num_frames - delay].float()).abs().max())
    return float(torch.stack(differences).max())
