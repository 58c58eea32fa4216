"""Which text tokens are forced on the model while it streams.

Every session opens with the prompt's pieces. After it, `asr`, `st` and `s2st` write freely. `tts` is steered as in
Kyutai's delayed-streams text to speech (arXiv 2509.08753; `moshi.models.tts.StateMachine`): the model only says *when*
the next word starts, by writing EPAD instead of PAD, and the word's pieces are then forced from the next frame on.

Axes: B requests of a batch, V text tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from megaspeech.config.schema import StreamsSection

PATIENCE = 20
"""Frames that a steered model may stay on PAD before the next word is started for it."""


class TextScript:
    """The text stream of one request, frame after frame.

    Args:
        prompt: piece ids, forced in the first frames.
        words: pieces of the words to say, or None to let the model write.
        streams: names PAD and EPAD.
    """

    def __init__(
        self, prompt: Sequence[int], *, words: Sequence[Sequence[int]] | None, streams: StreamsSection
    ) -> None:
        self.steered = words is not None
        self._forced = deque(prompt)
        self._words = deque(words or ())
        self._waited = 0
        self._pad, self._end_pad = streams.text_pad_id, streams.text_end_pad_id

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to force."""
        return not self._forced and not self._words

    def choose(self, token: int) -> int:
        """The token of this frame, given the model's own choice. To be called once a frame, in order."""
        if self._forced:
            return self._forced.popleft()
        if not self.steered:
            return token
        if not self._words:
            return self._pad
        if token != self._end_pad and self._waited < PATIENCE:
            self._waited += 1
            return self._pad
        self._waited = 0
        self._forced.extend(self._words.popleft())
        return self._end_pad


class TextSteering:
    """The scripts of a batch, as the two hooks of a generator.

    Args:
        scripts: one a request.
        streams: names PAD, EPAD and the number of text tokens.
        device: of the model.
    """

    def __init__(self, scripts: Sequence[TextScript], *, streams: StreamsSection, device: torch.device) -> None:
        self._scripts = list(scripts)
        steered_B = torch.tensor([script.steered for script in scripts], device=device)
        pauses_V = torch.zeros(streams.text_cardinality, dtype=torch.bool, device=device)
        pauses_V[[streams.text_pad_id, streams.text_end_pad_id]] = True
        self._forbidden = (steered_B[:, None] & ~pauses_V)[:, None, None]

    def restrict(self, logits: torch.Tensor) -> None:
        """Leave steered requests only PAD and EPAD. Changes `logits` `[B, 1, 1, V]` in place."""
        logits.masked_fill_(self._forbidden, float("-inf"))

    def force(self, tokens: torch.Tensor) -> None:
        """Put every script's token in place of the model's. Changes `tokens` `[B]` in place."""
        chosen = [script.choose(token) for script, token in zip(self._scripts, tokens.tolist(), strict=True)]
        tokens.copy_(torch.tensor(chosen, dtype=tokens.dtype))
