"""Recordings that are longer than a training sample, cut where nobody speaks.

Pieces follow each other without a gap, so that nothing of a recording is lost: a piece in which nothing is said has no
words. Times are seconds from the start of the stretch that is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from megaspeech.preparation.manifests.line import squeezed
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance, Word

Gap = tuple[float, float]
"""A time in which no word sounds, which may have no length: where one word ends and the next begins."""


def cut_to_length(utterance: Utterance, *, max_seconds: float) -> list[Utterance]:
    """An utterance as pieces of at most `max_seconds`, cut between its words.

    A conversation (`s2s`) is cut everywhere, through a word if there is no gap. An answer that trails what it answers
    (`s2st`) is never cut, since a cut would part the two. What has no gap soon enough stays in a piece that is too
    long, for the caller to set aside; so does all that has no length in its manifest.

    Args:
        utterance: its words in order of their starts.
        max_seconds: what a sample holds.

    Returns:
        The pieces in order: each word in one of them, their texts slices of the text.
    """
    lengths = [recording.seconds for recording in utterance.recordings]
    is_untimed = utterance.text and not utterance.words
    if utterance.task.name == "s2st" or is_untimed or None in lengths or max(lengths, default=0.0) <= max_seconds:
        return [utterance]
    total = max(lengths)
    talks = utterance.task.name == "s2s"  # then another may speak while the model is silent
    gaps = list(_gaps(utterance.words + (() if talks else utterance.source_words), total=total))
    cuts = list(_cuts(gaps, total=total, most=max_seconds, anywhere=talks))
    return list(_pieces(utterance, [0.0, *cuts, total]))


def _gaps(words: Sequence[Word], *, total: float) -> Iterator[Gap]:
    """When nobody speaks, in order. What sounds beyond the end is taken to end there."""
    spans = sorted((min(word.start, total), min(word.end, total)) for word in words)
    quiet = accumulate((end for _, end in spans), max, initial=0.0)
    for since, start in zip(quiet, [*(start for start, _ in spans), total], strict=True):
        if since <= start:
            yield since, start


def _cuts(gaps: Sequence[Gap], *, total: float, most: float, anywhere: bool) -> Iterator[float]:
    """Times to cut at: each time in the widest gap of the second half of what still fits, or the last gap that does."""
    at = 0.0
    while total - at > most:
        left = [(max(first, at), last) for first, last in gaps if last > at]
        # In the middle of a gap, so that no sound of a word is lost; in a long silence as late as it may be.
        places = [(min((first + last) / 2, at + most), last - first) for first, last in left if first <= at + most]
        places = [(time, width) for time, width in places if at < time < total]
        later = [place for place in places if place[0] > at + most / 2]
        if later:
            at = max(later, key=lambda place: (place[1], place[0]))[0]
        elif anywhere:
            at += most
        elif places:
            at = places[-1][0]
        else:  # words without a gap for longer than a sample: cut as soon as there is one
            at = next(((first + last) / 2 for first, last in left if first > at + most and last < total), total)
        if at < total:
            yield at


def _pieces(utterance: Utterance, edges: Sequence[float]) -> Iterator[Utterance]:
    rest = utterance.text
    for number, (start, end) in enumerate(pairwise(edges), 1):
        is_last = number == len(edges) - 1
        words = _within(utterance.words, start, end, is_last=is_last)
        num_letters = len(squeezed(rest)) if is_last else sum(len(squeezed(word.word)) for word in words)
        text, rest = _take(rest, num_letters)
        yield replace(
            utterance,
            text=text,
            words=words,
            heard=_stretch(utterance.heard, start, end, is_last=is_last),
            spoken=_stretch(utterance.spoken, start, end, is_last=is_last),
            source_words=_within(utterance.source_words, start, end, is_last=is_last),
        )


def _within(words: Sequence[Word], start: float, end: float, *, is_last: bool) -> tuple[Word, ...]:
    """The words that start in a piece, in its time."""
    return tuple(
        Word(word.word, word.start - start, (word.end if is_last else min(word.end, end)) - start)
        for word in words
        if start <= word.start and (word.start < end or is_last)
    )


def _take(text: str, num_letters: int) -> tuple[str, str]:
    """(the first so many letters, the rest), whitespace not counted."""
    counts = accumulate(not letter.isspace() for letter in text)
    end = next((place + 1 for place, count in enumerate(counts) if count == num_letters), 0) if num_letters else 0
    return text[:end].strip(), text[end:]


def _stretch(recording: Recording | None, start: float, end: float, *, is_last: bool) -> Recording | None:
    """The piece of a recording; the last one ends where the recording does."""
    if recording is None:
        return None
    seconds = recording.seconds
    assert seconds is not None
    return replace(
        recording,
        start=recording.start + start,
        end=recording.end if is_last else recording.start + end,
        duration=(seconds if is_last else end) - start,
    )
