"""Cutting what is longer than a sample: nothing is lost, nothing comes twice, times and order hold."""

import math
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspeech.data.tasks import Task
from megaspeech.preparation.cutting import cut_to_length
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance, Word

HUNDREDTHS = st.integers(0, 400).map(lambda value: value / 100)
FILE = Path("long.wav")


def _utterance(task: str, words: list[Word], *, total: float, separator: str = " ", start: float = 0.0) -> Utterance:
    audio = Recording(FILE, start=start, end=start + total if start else None, duration=total)
    task = Task(task, "en", "en")
    return Utterance(
        task=task,
        text=separator.join(word.word for word in words),
        words=tuple(words),
        heard=audio if task.hears else None,
        spoken=audio if task.speaks else None,
        source_words=tuple(Word("x", word.start, word.end) for word in words) if task.name == "st" else (),
    )


@st.composite
def utterances(draw: st.DrawFn) -> Utterance:
    """Words that may overlap, with and without silence between; in text with and without spaces."""
    steps = draw(st.lists(st.tuples(HUNDREDTHS, HUNDREDTHS), max_size=30))
    starts = accumulate(step for step, _ in steps)
    words = [
        Word(f"w{place}", start, start + step[1]) for place, (start, step) in enumerate(zip(starts, steps, strict=True))
    ]
    total = max([word.end for word in words], default=0.0) + draw(HUNDREDTHS) + 0.5
    task = draw(st.sampled_from(["asr", "st", "tts", "s2s"]))
    separator = draw(st.sampled_from([" ", "", "  "]))
    return _utterance(task, words, total=total, separator=separator, start=draw(st.sampled_from([0.0, 12.5])))


@settings(max_examples=300, deadline=None)
@given(utterance=utterances(), most=st.sampled_from([1.0, 3.0, 10.0]))
def test_nothing_is_lost_and_nothing_comes_twice(utterance, most):
    pieces = cut_to_length(utterance, max_seconds=most)
    whole = utterance.recordings[0]
    position = 0.0
    words, source_words = [], []
    for piece in pieces:
        (audio,) = set(piece.recordings)
        assert len(piece.recordings) == len(utterance.recordings)
        assert audio.start == pytest.approx(whole.start + position)
        assert (piece.task, audio.path) == (utterance.task, FILE)
        assert "".join(piece.text.split()) == "".join(word.word for word in piece.words)
        assert piece.text == piece.text.strip()
        for word in piece.words + piece.source_words:
            assert 0 <= word.start <= word.end <= audio.duration + 1e-9
        words += [(word.word, word.start + position, word.end + position) for word in piece.words]
        source_words += [(word.start + position, word.end + position) for word in piece.source_words]
        position += audio.duration
        if piece is not pieces[-1]:
            assert audio.end == pytest.approx(whole.start + position)
    assert pieces[-1].recordings[0].end == whole.end
    assert position == pytest.approx(whole.duration)
    assert [name for name, *_ in words] == [word.word for word in utterance.words]
    assert [start for _, start, _ in words] == pytest.approx([word.start for word in utterance.words])
    if utterance.task.name == "s2s":
        assert all(piece.heard.duration <= most + 1e-9 for piece in pieces)
    else:  # no word is cut through
        assert [end for *_, end in words] == pytest.approx([word.end for word in utterance.words])
        assert len(source_words) == len(utterance.source_words)


@settings(max_examples=200, deadline=None)
@given(utterance=utterances(), most=st.sampled_from([1.0, 3.0, 10.0]))
def test_a_piece_is_too_long_only_where_there_is_no_gap(utterance, most):
    slack = 1e-6
    for piece in cut_to_length(utterance, max_seconds=most):
        if piece.recordings[0].duration > most + slack:
            spans = [(word.start + slack, word.end - slack) for word in piece.words + piece.source_words]
            ends = [word.end for word in piece.words]
            # Nowhere might it have been cut: not where a word ends, and not between its start and the first word.
            inside = [time for time in ends if slack < time <= most or slack < time < max(ends) - slack]
            assert all(any(start < time < end for start, end in spans) for time in inside)
            assert min(start for start, _ in spans) < 2 * slack


def test_a_conversation_is_cut_where_the_model_is_silent_if_it_ever_is():
    words = [Word("a", 0.0, 4.0), Word("b", 6.0, 10.0), Word("c", 10.5, 30.0)]
    pieces = cut_to_length(_utterance("s2s", words, total=31.0), max_seconds=8.0)
    assert [piece.heard.start for piece in pieces] == pytest.approx([0.0, 5.0, 10.25, 18.25, 26.25])
    assert [piece.text for piece in pieces] == ["a", "b", "c", "", ""]
    assert pieces[2].words == (Word("c", 0.25, 8.0),)


def test_the_widest_gap_of_the_second_half_is_taken():
    words = [Word("a", 0, 1), Word("b", 4, 6), Word("c", 6.1, 7), Word("d", 8, 9), Word("e", 9.2, 12)]
    first, second = cut_to_length(_utterance("asr", words, total=13.0), max_seconds=10.0)
    assert (first.text, second.text) == ("a b c", "d e")
    assert (first.heard.end, second.heard.start, second.heard.duration) == (7.5, 7.5, 5.5)


def test_a_long_silence_is_kept_as_pieces_without_words():
    words = [Word("a", 0.0, 1.0), Word("b", 50.0, 51.0)]
    pieces = cut_to_length(_utterance("tts", words, total=52.0), max_seconds=20.0)
    assert [piece.text for piece in pieces] == ["a", "", "b"]
    assert all(piece.spoken.duration <= 20 for piece in pieces)


def test_japanese_text_is_cut_as_it_stands():
    words = [Word("今日は、", 0.0, 4.0), Word("いい天気", 5.0, 8.0), Word("です。", 8.0, 12.0)]
    pieces = cut_to_length(_utterance("asr", words, total=12.0, separator=""), max_seconds=6.0)
    assert [piece.text for piece in pieces] == ["今日は、", "いい天気", "です。"]


@pytest.mark.parametrize(
    "utterance",
    [
        _utterance("asr", [Word("short", 0, 1)], total=10.0),
        _utterance("asr", [Word("one phrase for all of it", 0, 40)], total=40.0),
        _utterance("text", [Word("no audio", 0, math.inf)], total=40.0),
        Utterance(Task("asr", "en", "en"), "x", (Word("x", 0, math.inf),), heard=Recording(FILE)),
        Utterance(
            Task("s2st", "ja", "en"),
            "a b",
            (Word("a", 0, 1), Word("b", 30, 31)),
            heard=Recording(FILE, duration=40.0),
            spoken=Recording(FILE),
        ),
    ],
    ids=["short", "no gap", "text", "length unknown", "an answer that trails"],
)
def test_what_need_not_or_cannot_be_cut_is_left_whole(utterance):
    assert cut_to_length(utterance, max_seconds=10.0) == [utterance]
