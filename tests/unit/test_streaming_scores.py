"""Error rates and latencies of answers whose words, sounds and step times are known."""

from __future__ import annotations

import numpy as np
import pytest

from megaspeech.config.schema import StreamsSection
from megaspeech.data.tasks import Task, Timing, text_stream
from megaspeech.data.tokenizer import Tokenizer, train_tokenizer
from megaspeech.data.transcript import WrittenWord, written_words
from megaspeech.streaming import latency, scoring
from megaspeech.streaming.session import Answer

PAD = 3
ASR, ST, TTS = Task("asr", "en", "en"), Task("st", "ja", "en"), Task("tts", "en", "en")
S2ST = Task("s2st", "ja", "en")
TIMING = Timing(task_delay=3, speech_lead=1)
FRAME_RATE = 12.5
SAMPLE_RATE = 8000
FRAME_SIZE = 640
STREAMS = StreamsSection(text_cardinality=64, num_codebooks=4, num_given_codebooks=4, cardinality=32, delays=(0,) * 9)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    rng = np.random.default_rng(0)
    return train_tokenizer(
        [" ".join(rng.choice(words, 5)) for _ in range(200)], vocabulary_size=64, languages=["en", "ja"]
    )


# ---- scoring -------------------------------------------------------------------------------------------------------


def test_errors_are_counted_over_the_corpus() -> None:
    references = ["one two three", "four", "五 六"]
    assert scoring.score(references, references, language="en").word_error_rate == 0.0
    # one substitution; one deletion (empty hypothesis); one insertion
    found = scoring.score(references, ["one nine three", "", "五 五 六"], language="en")
    assert (found.num_samples, found.num_words, found.num_word_errors) == (3, 6, 3)
    assert found.word_error_rate == pytest.approx(3 / 6)


def test_errors_of_empty_sides() -> None:
    assert scoring.score(["one", ""], ["one", "two two"], language="en").word_error_rate == pytest.approx(2.0)
    assert scoring.score(["one", ""], ["", ""], language="en").word_error_rate == 1.0
    assert scoring.score([""], ["one"], language="en").word_error_rate is None
    with pytest.raises(ValueError, match="1 references but 2 hypotheses"):
        scoring.score(["one"], ["one", ""], language="en")


def test_characters_count_spaces_only_where_words_have_them() -> None:
    """ "a b" lacks one of three characters to "ab"; 今日 は lacks none to 今日は."""
    english = scoring.score(["a b"], ["ab"], language="en")
    assert (english.num_characters, english.num_character_errors) == (3, 1)
    japanese = scoring.score(["今日 は 晴れ"], ["今日は雨"], language="ja")
    assert (japanese.num_characters, japanese.num_character_errors) == (5, 2)


def test_plain_text() -> None:
    assert scoring.plain("Don\u2019t  STOP, twenty-one! Straße") == "dont stop twenty one strasse"
    assert scoring.plain("今日は、晴れ。") == "今日は 晴れ"
    assert scoring.score(["Yes, I do."], ["yes i do"], language="en").num_character_errors == 0


def test_entries_of_results() -> None:
    found = scoring.score(["one two"], ["one"], language="en")
    assert scoring.result_entries({"st-ja-en": found}) == {"st_ja_en_wer": 0.5}


def written(tokenizer: Tokenizer, task: Task, words: list[tuple[int, str]], *, step: float = 0.01) -> Answer:
    """An answer of 50 frames that writes `words` at their frames, each step taking `step` seconds."""
    pieces = [(frame, tokenizer.encode_word(word)) for frame, word in words]
    text = text_stream(pieces, prompt=tokenizer.encode_prompt(task), num_frames=50, streams=STREAMS)
    return Answer(text, np.zeros((4, 50), np.int64), np.full(50, step))


def spell(tokenizer: Tokenizer, word: str) -> list[int]:
    """A word in several pieces, however the tokenizer has it whole."""
    return tokenizer.processor.piece_to_id(["\u2581", *word])


def tone(*spans: tuple[float, float]) -> np.ndarray:
    """50 frames of faint noise with a tone in the given spans of seconds, and a click at 0.1 s."""
    time = np.arange(50 * FRAME_SIZE) / SAMPLE_RATE
    wave = 0.001 * np.random.default_rng(0).standard_normal(len(time))
    for start, end in spans:
        wave += np.where((time >= start) & (time < end), 0.3 * np.sin(2 * np.pi * 440 * time), 0)
    wave[800:804] = 0.9
    return wave


def test_written_words_and_their_frames(tokenizer) -> None:
    got = written(tokenizer, ASR, [(5, "six"), (20, "two")])
    got.text[30:36] = spell(tokenizer, "seven")
    got.text[33:37] = [PAD, *got.text[33:36]]
    first, second, third = written_words(got.text, tokenizer=tokenizer)
    assert (first.word, first.first_frame) == ("six", 5) and (second.word, second.first_frame) == ("two", 20)
    assert third == WrittenWord("seven", 30, 36)
    assert scoring.answer_text(got, tokenizer=tokenizer) == "six two seven"


def test_text_latency_counts_from_the_end_of_the_word(tokenizer) -> None:
    """A word that ends half way through heard frame 10 is due in frame 2 + 10 + 3; its last piece is five later."""
    got = written(tokenizer, ASR, [(5, "six")])
    got.text[15:21] = spell(tokenizer, "seven")
    parts = latency.text_latency(
        got, task=ASR, heard_end=10.5 / FRAME_RATE, timing=TIMING, frame_rate=FRAME_RATE, tokenizer=tokenizer
    )
    assert parts.task_delay == pytest.approx((2.5 + 5) * 80)
    assert parts.acoustic_delay == 0 and parts.compute == pytest.approx(10)
    assert parts.total == pytest.approx(610)
    silent = written(tokenizer, ASR, [])
    assert latency.text_latency(
        silent, task=ASR, heard_end=1.0, timing=TIMING, frame_rate=FRAME_RATE, tokenizer=tokenizer
    ) is None  # fmt: skip


def test_a_machine_slower_than_sound_falls_behind(tokenizer) -> None:
    np.testing.assert_allclose(latency.step_ends(np.array([0.1, 0.1, 0.01]), frame_rate=12.5), [0.1, 0.2, 0.21])
    np.testing.assert_allclose(latency.step_ends(np.array([0.01] * 3), frame_rate=12.5), [0.01, 0.09, 0.17])


def test_speech_latency_of_s2st_finds_the_last_word(tokenizer) -> None:
    """The last word's text starts in frame 20; it sounds 30 ms into frame 21, after a word that ends in frame 19."""
    got = written(tokenizer, S2ST, [(10, "six"), (20, "two")])
    onset = 21 * 0.08 + 0.03
    parts = latency.speech_latency(
        got, task=S2ST, heard_end=1.2, waveform_N=tone((0.9, 1.55), (onset, 2.2)), sample_rate=SAMPLE_RATE,
        timing=TIMING, frame_rate=FRAME_RATE, tokenizer=tokenizer, acoustic_delay=2, decode_seconds=0.005,
    )  # fmt: skip
    assert parts.task_delay == pytest.approx(1000 * (onset - 2 * 0.08 - 1.2), abs=1)
    assert parts.acoustic_delay == pytest.approx(160) and parts.compute == pytest.approx(15)


def test_speech_latency_of_tts_counts_from_the_prompt(tokenizer) -> None:
    got = written(tokenizer, TTS, [(4, "six")])
    arguments = {
        "task": TTS, "sample_rate": SAMPLE_RATE, "timing": TIMING, "frame_rate": FRAME_RATE, "tokenizer": tokenizer,
    }  # fmt: skip
    parts = latency.speech_latency(got, heard_end=None, waveform_N=tone((0.45, 0.9)), **arguments)
    assert parts.task_delay == pytest.approx(450 - 160, abs=1)
    assert latency.speech_latency(got, heard_end=None, waveform_N=np.zeros(32000), **arguments) is None
    with pytest.raises(ValueError, match="heard_end = 1.0 for tts-en"):
        latency.speech_latency(got, heard_end=1.0, waveform_N=tone((0.45, 0.9)), **arguments)


def test_onset_ignores_noise_and_clicks() -> None:
    assert latency.speech_onset(tone((1.0, 2.0)), sample_rate=SAMPLE_RATE) == pytest.approx(1.0, abs=0.011)
    assert latency.speech_onset(tone((1.0, 2.0)), sample_rate=SAMPLE_RATE, after=1.234) == 1.234
    assert latency.speech_onset(tone((1.0, 2.0)), sample_rate=SAMPLE_RATE, after=2.5) is None
    assert latency.speech_onset(np.zeros(10), sample_rate=SAMPLE_RATE) is None


def test_summaries() -> None:
    values = [latency.Latency(task_delay=float(i), acoustic_delay=80.0, compute=20.0) for i in range(101)]
    assert latency.summarise(values) == {
        "median": 150.0,
        "p99": 199.0,
        "median_parts": {"task_delay": 50.0, "acoustic_delay": 80.0, "compute": 20.0},
    }
    assert latency.summarise([])["median"] is None
