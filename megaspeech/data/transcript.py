"""The words that a text stream holds, and in which frames. Axis: T frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megaspeech.data.tokenizer import Tokenizer, begins_word


@dataclass(frozen=True)
class WrittenWord:
    """A word of the text stream, and the frames of its first and last pieces."""

    word: str
    first_frame: int
    last_frame: int


def written_words(text_T: np.ndarray, *, tokenizer: Tokenizer) -> list[WrittenWord]:
    """The words in a text stream `[T]`, in order; in scripts without spaces between words, every piece is one.

    A piece that begins no word goes on with the one before, over PADs too. Special ids and the prompt are no part of a
    word. Words with spaces between them, joined by spaces, are `tokenizer.decode` of the stream.
    """
    groups: list[list[tuple[int, int]]] = []
    before = ""
    for frame, token in enumerate(text_T.tolist()):
        if not tokenizer.is_text(token):
            continue
        piece = tokenizer.processor.id_to_piece(token)
        if not groups or begins_word(piece, after=before):
            groups.append([])
        groups[-1].append((frame, token))
        before = piece
    words = [
        WrittenWord(tokenizer.decode([token for _, token in group]), group[0][0], group[-1][0]) for group in groups
    ]
    return [word for word in words if word.word]
