"""When each word of a text is heard or said, from what is known: times of its words, of its phrases, or of the whole.

All three are one thing, a clock over the characters of the text. A word of the manifest with its times is a stretch of
them, and within a stretch time goes on evenly from character to character: by characters rather than by pieces, because
how long a word sounds goes with its length, not with how frequent it was where the tokenizer was trained, so that
another tokenizer does not move the words. Times are in seconds from the start of the recording.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megaspeech.data.tokenizer import SpelledWord, Tokenizer
from megaspeech.preparation.utterance import Utterance, Word

MARGIN_SECONDS = 2.0
"""By which a text may be longer than its audio, and a word may start after its end."""


class UnusableTextError(ValueError):
    """A text that cannot be laid over its audio; says why. The sample is to be set aside, the others go on."""


@dataclass(frozen=True)
class TimedWord:
    """The pieces that are written together, and when what they stand for sounds, in seconds."""

    pieces: tuple[int, ...]
    start: float
    end: float


@dataclass(frozen=True)
class Aligned:
    """A text in time. `num_unknown` counts its stretches that the tokenizer has no piece for, which are left out."""

    words: tuple[TimedWord, ...]
    num_unknown: int


def align(utterance: Utterance, *, num_seconds: float, frame_rate: float, tokenizer: Tokenizer) -> Aligned:
    """The words of `utterance.text` in time.

    A translation that is written while the source is heard (`st`) may put a word before the one it stands for, unless
    an aligner gave each its time. So all of a phrase is written when the phrase has been heard.

    Args:
        utterance: of a task with audio.
        num_seconds: of the audio that the times of the words are those of.
        frame_rate: frames a second; one piece is written a frame.
        tokenizer: spells the text. End of sentence follows where the task is told its text.

    Raises:
        UnusableTextError: nothing is left of the text, its words spell another, or it cannot fit its audio. In a
            conversation (`s2s`) no text is that of a model that listens.
    """
    text = tokenizer.normalise(utterance.text)
    if not text and utterance.task.name == "s2s":  # a stretch of a conversation in which the model listens
        return Aligned((), num_unknown=0)
    spelled = tokenizer.spell(text, ends=not utterance.task.hears)
    check_text(text, words=spelled)
    clock = _Clock(text, utterance.words, num_seconds=num_seconds, tokenizer=tokenizer)
    together = utterance.task.name == "st"
    words: list[TimedWord] = []
    place = itertools.accumulate((word.num_characters for word in spelled), initial=0)
    groups = itertools.groupby(
        zip(spelled, place, strict=False), key=lambda item: clock.phrase(item[1]) if together else item[1]
    )
    for _, group in groups:
        items = list(group)
        pieces = tuple(piece for word, _ in items for piece in word.pieces)
        first, last = items[0][1], items[-1][1] + items[-1][0].num_characters
        if pieces:
            words.append(TimedWord(pieces, clock.at(first), clock.until(last)))
    _check_fit(words, num_seconds=num_seconds, frame_rate=frame_rate)
    return Aligned(tuple(words), num_unknown=sum(word.num_unknown for word in spelled))


def check_text(text: str, *, words: Sequence[SpelledWord]) -> None:
    """Raises UnusableTextError where a normalised text, spelled in `words`, is empty or wholly unknown."""
    if not text:
        raise UnusableTextError("empty text: nothing is left of it after normalisation")
    if not any(word.pieces for word in words):
        raise UnusableTextError(f"unknown text: the tokenizer has no piece for any of {text[:40]!r}")


def _check_fit(words: Sequence[TimedWord], *, num_seconds: float, frame_rate: float) -> None:
    num_pieces = sum(len(word.pieces) for word in words)
    if num_pieces > (num_seconds + MARGIN_SECONDS) * frame_rate:
        raise UnusableTextError(
            f"text too long: {num_pieces} pieces, one a frame, for {num_seconds * frame_rate:.0f} frames of audio; is "
            f"it the text of this audio, and has the tokenizer pieces for its language?"
        )
    latest = max(word.start for word in words)
    if latest > num_seconds + MARGIN_SECONDS:
        raise UnusableTextError(f"times beyond the audio: a word starts at {latest:.2f} s of {num_seconds:.2f} s")


class _Clock:
    """Seconds by character of a normalised text, spaces left out."""

    def __init__(self, text: str, words: Sequence[Word], *, num_seconds: float, tokenizer: Tokenizer) -> None:
        words = words or [Word(text, 0.0, num_seconds)]
        parts = [tokenizer.normalise(word.word).replace(" ", "") for word in words]
        if "".join(parts) != text.replace(" ", ""):
            raise UnusableTextError(f"text and words differ: {text[:40]!r} is not what the timed words spell")
        known = [(word, part) for word, part in zip(words, parts, strict=True) if part]
        self._words = [word for word, _ in known]
        self._firsts = list(itertools.accumulate((len(part) for _, part in known), initial=0))

    def phrase(self, place: int) -> int:
        """Which of the timed words the character `place` is in."""
        return min(bisect.bisect_right(self._firsts, place) - 1, len(self._words) - 1)

    def at(self, place: int) -> float:
        """When the character `place` begins."""
        return self._time(place, self.phrase(place))

    def until(self, place: int) -> float:
        """When the character before `place` ends."""
        return self._time(place, self.phrase(place - 1))

    def _time(self, place: int, phrase: int) -> float:
        first, last, word = self._firsts[phrase], self._firsts[phrase + 1], self._words[phrase]
        if place == last:  # to the bit, so that a word's own times give its own frame
            return word.end
        return min(word.end, word.start + (word.end - word.start) * (place - first) / (last - first))
