"""Words in time, from their own times, those of their phrases, or none; and what is counted where they do not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_rank import make_config

from megaspeech.config import Config
from megaspeech.data.tasks import PROMPT_FRAMES, ZERO_TOKEN, Task
from megaspeech.data.tokenizer import Tokenizer, train_tokenizer
from megaspeech.data.transcript import written_words
from megaspeech.preparation.alignment import Aligned, UnusableTextError, align
from megaspeech.preparation.compose import Composed, compose
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance, Word

ASR, ST, TTS, S2S, TEXT = (Task(name, "en", "en") for name in ("asr", "st", "tts", "s2s", "text"))
RATE, DELAY, EPAD, END = 12.5, 3, 0, 2
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
KANJI = list("零一二三四五六七八九")
TEXTS = [" ".join(words[i:] + words[:i]) for words in (DIGITS, KANJI) for i in range(10)]
CODEC = SimpleNamespace(frame_rate=RATE, silence_codes=torch.arange(1, 5))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 5, vocabulary_size=64, languages=["en", "ja"])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_config(tmp_path_factory.mktemp("config"), "streams.text_cardinality=64")


@pytest.fixture(scope="module")
def tools(config: Config, tokenizer: Tokenizer) -> dict:
    return {"config": config, "tokenizer": tokenizer}


def utterance(task: Task, text: str, *words: tuple[str, float, float]) -> Utterance:
    audio = Recording(Path("x.wav")) if task.name != "text" else None
    return Utterance(
        task,
        text,
        tuple(Word(*word) for word in words),
        heard=audio if task.hears else None,
        spoken=audio if task.speaks else None,
    )


def aligned(one: Utterance, *, tokenizer: Tokenizer, seconds: float = 4.0) -> Aligned:
    return align(one, num_seconds=seconds, frame_rate=RATE, tokenizer=tokenizer)


def spans(one: Utterance, *, tokenizer: Tokenizer, seconds: float = 4.0) -> list[tuple[str, float, float]]:
    words = aligned(one, tokenizer=tokenizer, seconds=seconds).words
    return [(tokenizer.decode(word.pieces), word.start, word.end) for word in words]


def test_words_with_times_keep_them_to_the_bit(tokenizer: Tokenizer) -> None:
    words = [("three", 0.1, 0.3), ("seven", 0.19, 0.88)]  # 0.19 + (0.88 - 0.19) is less, and a frame before
    assert spans(utterance(ASR, "three seven", *words), tokenizer=tokenizer) == words
    japanese = [("三", 0.1, 0.3), ("七", 0.19, 0.88)]
    assert spans(utterance(ASR, "三七", *japanese), tokenizer=tokenizer) == japanese  # though the text has no space


def test_a_phrase_is_spread_by_its_characters(tokenizer: Tokenizer) -> None:
    one = utterance(ASR, "three six two nine", ("three six", 1.0, 2.6), ("two nine", 3.0, 3.7))
    expected = [("three", 1.0, 2.0), ("six", 2.0, 2.6), ("two", 3.0, 3.3), ("nine", 3.3, 3.7)]
    assert spans(one, tokenizer=tokenizer) == [(word, pytest.approx(a), pytest.approx(b)) for word, a, b in expected]


def test_without_times_the_whole_is_spread(tokenizer: Tokenizer) -> None:
    expected = [("one", 0.0, 1.2), ("seven", 1.2, 3.2), ("零", 3.2, 3.6), ("九", 3.6, 4.0)]
    found = spans(utterance(ASR, "one seven 零九"), tokenizer=tokenizer)
    assert found == [(word, pytest.approx(a), pytest.approx(b)) for word, a, b in expected]


def test_a_japanese_phrase_is_laid_out_over_its_span(tokenizer: Tokenizer) -> None:
    found = spans(utterance(ASR, "三七二八", ("三七", 0.0, 1.0), ("二八", 2.0, 3.0)), tokenizer=tokenizer)
    expected = [("三", 0.0, 0.5), ("七", 0.5, 1.0), ("二", 2.0, 2.5), ("八", 2.5, 3.0)]
    assert found == [(word, pytest.approx(a), pytest.approx(b)) for word, a, b in expected]


def test_a_translated_phrase_is_written_when_it_has_been_heard(tokenizer: Tokenizer) -> None:
    one = utterance(ST, "three six two nine", ("three six", 1.0, 2.6), ("two", 3.0, 3.3), ("nine", 3.3, 3.7))
    assert [(word, end) for word, _, end in spans(one, tokenizer=tokenizer)] == [
        ("three six", 2.6), ("two", 3.3), ("nine", 3.7),
    ]  # fmt: skip
    (whole,) = spans(utterance(ST, "three six"), tokenizer=tokenizer)
    assert whole == ("three six", 0.0, 4.0)


def test_unclean_words_are_still_found(tokenizer: Tokenizer) -> None:
    one = utterance(ASR, "\ufeffthree  \uff53ix", ("three\x00", 0.0, 1.0), ("\u200b", 1.0, 1.1), (" six", 2.0, 3.0))
    assert spans(one, tokenizer=tokenizer) == [("three", 0.0, 1.0), ("six", 2.0, 3.0)]


@pytest.mark.parametrize(
    "text, words, seconds, reason",
    [
        (" \x07\n", [], 4.0, "empty text"),
        ("山川", [], 4.0, "unknown text: .* '山川'"),
        ("three six", [("three", 0.0, 1.0)], 4.0, "text and words differ: 'three six'"),
        ("three", [("three", 6.5, 6.9)], 4.0, "times beyond the audio: a word starts at 6.50 s of 4.00 s"),
        ("three " * 40, [], 1.0, "text too long: 40 pieces, one a frame, for 12 frames"),
    ],
)
@pytest.mark.parametrize("task", [ASR, ST, TTS])
def test_what_cannot_be_used_is_refused_with_a_reason(
    tokenizer: Tokenizer, task: Task, text: str, words: list, seconds: float, reason: str
) -> None:
    reason = reason.replace("40 pieces", "4[01] pieces")  # with end of sentence where it is told
    with pytest.raises(UnusableTextError, match=reason):
        aligned(utterance(task, text, *words), tokenizer=tokenizer, seconds=seconds)


@st.composite
def timed_phrases(draw: st.DrawFn) -> list[tuple[str, float, float]]:
    """Phrases of one to four words, some of them Japanese, in order, meeting or apart."""
    clock, phrases = 0.0, []
    for _ in range(draw(st.integers(1, 5))):
        words = draw(st.lists(st.sampled_from(DIGITS + KANJI), min_size=1, max_size=4))
        start = clock + draw(st.floats(0, 1))
        clock = start + draw(st.floats(0, 2))
        phrases.append((" ".join(words), start, clock))
    return phrases


@settings(max_examples=60, deadline=None)
@given(phrases=timed_phrases(), task=st.sampled_from([ASR, ST, TTS, S2S]), joined=st.booleans())
def test_every_word_is_there_once_in_order_and_within_its_phrase(
    tokenizer: Tokenizer, phrases: list, task: Task, joined: bool
) -> None:
    text = " ".join(phrase for phrase, _, _ in phrases)
    one = utterance(task, text, *([(phrase.replace(" ", ""), a, b) for phrase, a, b in phrases] if joined else phrases))
    words = aligned(one, tokenizer=tokenizer, seconds=phrases[-1][2] + 9).words
    assert tokenizer.decode(piece for word in words for piece in word.pieces) == text
    assert all(word.start <= word.end for word in words)
    ends = [word.end for word in words]
    assert ends == sorted(ends)
    for word in words:
        assert any(a - 1e-9 <= word.start and word.end <= b + 1e-9 for _, a, b in phrases)
    assert (words[0].start, words[-1].end) == (phrases[0][1], phrases[-1][2])


def composed(one: Utterance, *, num_frames: int, **tools: Config | Tokenizer) -> Composed:
    codes = dict.fromkeys(one.recordings, np.arange(4 * num_frames).reshape(4, num_frames) % 32)
    return compose(one, codes, codec=CODEC, **tools)


def counts(one: Composed) -> tuple[int, int, int, int]:
    return one.moved_words, one.largest_shift, one.frames_past_end, one.unknown_pieces


def test_words_that_meet_are_counted(tools: dict) -> None:
    times = [("three", 0.0, 0.5), ("six", 0.5, 0.52), ("two", 0.52, 0.53), ("nine", 2.0, 2.1)]
    one = composed(utterance(ASR, "three six two nine", *times), num_frames=40, **tools)
    heard = PROMPT_FRAMES + 6 + DELAY  # all three end in frame 6
    frames = [word.first_frame for word in written_words(one.codes_ST[0], tokenizer=tools["tokenizer"])]
    assert frames == [heard, heard + 1, heard + 2, PROMPT_FRAMES + 26 + DELAY]
    assert counts(one) == (2, 2, 0, 0)


def test_text_past_the_end_of_the_audio_is_counted(tools: dict) -> None:
    late = utterance(ASR, "three six", ("three", 0.0, 0.4), ("six", 0.4, 0.8))
    assert counts(composed(late, num_frames=10, **tools)) == (0, 0, 1, 0)  # 0.8 s: frame 10
    assert counts(composed(late, num_frames=11, **tools)) == (0, 0, 0, 0)
    assert counts(composed(late, num_frames=7, **tools)) == (0, 0, 4, 0)
    many = composed(utterance(ST, "one " * 9), num_frames=3, **tools)
    assert many.frames_past_end == 9 and tools["tokenizer"].decode(many.codes_ST[0].tolist()) == ("one " * 9).strip()
    said = utterance(
        TTS, "three six", ("three", 0.0, 0.4), ("six", 0.7, 0.8)
    )  # six in frame 8, its text and end at 7, 8
    assert counts(composed(said, num_frames=9, **tools)) == (0, 0, 0, 0)
    assert counts(composed(said, num_frames=8, **tools)) == (0, 0, 1, 0)


def test_unknown_pieces_are_counted_and_are_no_epad(tools: dict) -> None:
    one = composed(utterance(S2S, "three 山 nine", ("three 山 nine", 0.5, 3.0)), num_frames=40, **tools)
    assert one.unknown_pieces == 1 and one.codes_ST[0].tolist().count(EPAD) == 2


def test_text_alone(tools: dict) -> None:
    task = Task("text", "ja", "ja")
    one = composed(utterance(task, "三 seven"), num_frames=0, **tools)
    tokenizer = tools["tokenizer"]
    pieces = [*tokenizer.encode_word("三"), *tokenizer.encode_word("seven")]
    assert one.codes_ST[0].tolist() == [*tokenizer.encode_prompt(task), *pieces, END]
    assert (one.codes_ST[1:] == ZERO_TOKEN).all() and counts(one) == (0, 0, 0, 0)
    with pytest.raises(UnusableTextError, match="empty"):
        composed(utterance(TEXT, " "), num_frames=0, **tools)


def test_a_task_without_prompt_is_no_fault_of_the_sample(tools: dict) -> None:
    one = utterance(Task("asr", "de", "de"), "three")
    with pytest.raises(ValueError, match="<de>") as caught:
        composed(one, num_frames=20, **tools)
    assert not isinstance(caught.value, UnusableTextError)


def test_a_stretch_in_which_the_model_listens_has_no_text(tools: dict) -> None:
    silent = composed(utterance(S2S, ""), num_frames=20, **tools)
    assert counts(silent) == (0, 0, 0, 0) and silent.codes_ST.shape[1] == PROMPT_FRAMES + 20
    assert (silent.codes_ST[0, PROMPT_FRAMES:] == 3).all()
    with pytest.raises(UnusableTextError, match="empty text"):
        composed(utterance(ASR, ""), num_frames=20, **tools)
