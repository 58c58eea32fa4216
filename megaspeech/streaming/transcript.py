"""The words that an answer wrote, and in which frames. Axis: T frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megaspeech.data.tasks import PROMPT_SYMBOLS
from megaspeech.data.tokenizer import NUM_SPECIAL, Tokenizer

WORD_MARK = "\u2581"
"""How sentencepiece writes the space that a word begins with."""


@dataclass(frozen=True)
class WrittenWord:
    """A word of the text stream, and the frames of its first and last pieces."""

    word: str
    first_frame: int
    last_frame: int


def written_words(text_T: np.ndarray, *, tokenizer: Tokenizer) -> list[WrittenWord]:
    """The words in a text stream `[T]`, in order.

    A piece with sentencepiece's space mark begins a word; others go on with the one before, over PADs too. Special
    ids and the prompt are no part of a word. The words, joined by spaces, are `tokenizer.decode` of the stream.
    """
    first_text_id = NUM_SPECIAL + len(PROMPT_SYMBOLS)
    groups: list[list[tuple[int, int]]] = []
    for frame, token in enumerate(text_T.tolist()):
        if not first_text_id <= token < tokenizer.vocabulary_size:
            continue
        if not groups or tokenizer.processor.id_to_piece(token).startswith(WORD_MARK):
            groups.append([])
        groups[-1].append((frame, token))
    words = [
        WrittenWord(tokenizer.decode([token for _, token in group]), group[0][0], group[-1][0]) for group in groups
    ]
    return [word for word in words if word.word]
