"""Do the native model and the runtime's agree? Logits of both sides on the same random codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaspeech.config.schema import StreamsSection
from megaspeech.data.tasks import ZERO_TOKEN
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
    codes_BST = random_codes(streams, least=ZERO_TOKEN, num_frames=num_frames, seed=seed)
    text_BTV, audio_BQTV = model.eval()(codes_BST)
    ours = [text_BTV, *audio_BQTV.unbind(1)]
    theirs = runtime_logits(lm, codes_BST)
    differences = []
    for mine, other, delay in zip(ours, theirs, streams.delays[: len(ours)], strict=True):
        # Position t is the prediction of frame t - delay; what is predicted before frame 0 is never used.
        differences.append((mine[:, delay:] - other[:, delay:].float()).abs().max())
    return float(torch.stack(differences).max())


def random_codes(streams: StreamsSection, *, least: int, num_frames: int, seed: int) -> Tensor:
    """Codes `[2, S, num_frames]` of all streams, from `least` up."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(least, size, (2, num_frames), generator=generator) for size in streams.cardinalities]
    return torch.stack(rows, dim=1)


def runtime_logits(lm: LMModel, codes_BST: Tensor) -> list[Tensor]:
    """Logits `[B, T, V]` of text and of every codebook that the model speaks, by step: position t predicts frame t -
    delay. By the steps of `LMModel.forward`, whose own refuses a model of fewer than two codebooks."""
    from moshi.models.lm_utils import _delay_sequence

    initial_BS1 = lm._get_initial_token().expand(len(codes_BST), -1, -1)
    delayed_BST = torch.cat([initial_BS1, _delay_sequence(lm.delays, codes_BST, initial_BS1)], dim=2)
    hidden_BTH, text_B1TV = lm.forward_text(delayed_BST[:, :, :-1])
    read_BST = delayed_BST[:, :, 1:]
    if lm.dep_q > 1:
        return [text_B1TV[:, 0], *lm.forward_depformer_training(read_BST, hidden_BTH).unbind(1)]
    if lm.dep_q == 0:
        return [text_B1TV[:, 0]]
    with lm.depformer.streaming(hidden_BTH.shape[0] * hidden_BTH.shape[1]):
        frames_N11 = read_BST[:, 0].reshape(-1, 1, 1)
        logits_N11V = lm.forward_depformer(0, frames_N11, hidden_BTH.flatten(0, 1)[:, None])
    return [text_B1TV[:, 0], logits_N11V.view(*hidden_BTH.shape[:2], -1)]
