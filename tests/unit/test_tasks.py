"""What a sample looks like: prompt, PAD and EPAD, words at their frames, and the streams of every task."""

from __future__ import annotations

import numpy as np
import pytest

from megaspeech.config.schema import StreamsSection
from megaspeech.data.tasks import PROMPT_FRAMES, TASKS, ZERO_TOKEN, Task, Timing, lay_out, text_stream

PAD, EPAD = 3, 0
STREAMS = StreamsSection(
    text_cardinality=48, num_codebooks=2, num_given_codebooks=3, cardinality=32, delays=(0, 0, 1, 0, 1, 1)
)
SILENCE = np.array([7, 8, 9, 10])  # of a codec with more codebooks than the streams have
PROMPT = [40, 41]


def row(words: list[tuple[int, list[int]]], *, num_frames: int = 0) -> list[int]:
    return text_stream(words, prompt=PROMPT, num_frames=num_frames, streams=STREAMS).tolist()


def codes(num_frames: int, *, first: int) -> np.ndarray:
    """Codes `[4, T]`, every one of them another."""
    return first + np.arange(4 * num_frames).reshape(4, num_frames)


@pytest.mark.parametrize(
    "task, key, prompt, hears, speaks",
    [
        (Task("asr", "en", "en"), "asr-en", ("<asr>", "<en>"), True, False),
        (Task("st", "ja", "en"), "st-ja-en", ("<st>", "<en>"), True, False),
        (Task("tts", "ja", "ja"), "tts-ja", ("<tts>", "<ja>"), False, True),
        (Task("s2st", "en", "ja"), "s2st-en-ja", ("<s2st>", "<ja>"), True, True),
        (Task("s2s", "ja", "ja"), "s2s-ja", ("<s2s>", "<ja>"), True, True),
        (Task("text", "en", "en"), "text-en", ("<text>", "<en>"), False, False),
    ],
)
def test_task(task: Task, key: str, prompt: tuple, hears: bool, speaks: bool) -> None:
    assert (task.key, task.prompt, task.hears, task.speaks) == (key, prompt, hears, speaks)
    assert len(task.prompt) == PROMPT_FRAMES


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("as", "en", "en"), "'as' is not one of asr, st,"),
        (("st", "ja", "english"), "language 'english' is no code such as 'en'"),
        (("st", "zh-hant", "en"), "language 'zh-hant'"),
    ],
)
def test_unknown_tasks_and_languages_are_refused(arguments: tuple, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Task(*arguments)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("source, target", [("en", "en"), ("yue", "pt-BR"), ("zh-Hant", "en"), ("zh-Hant", "zh-Hant")])
def test_keys_are_read_back(name: str, source: str, target: str) -> None:
    assert Task.parse(Task(name, source, target).key) == Task(name, source, target)


@pytest.mark.parametrize("key", ["asr", "asr-EN", "asr-en-ja-fr", "sing-en", "digits/asr-en"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' is no task such as 'asr-en'"):
        Task.parse(key)


def test_heard_words_are_written_once_heard() -> None:
    timing = Timing(task_delay=3, speech_lead=1)
    for name in ("asr", "st"):
        # Ends in frame 9 of the audio (0.72 to 0.80 s), which starts at frame 2.
        frame = timing.text_frame(Task(name, "ja", "en"), start=0.1, end=0.75, frame_rate=12.5)
        assert frame == 2 + 9 + 3


def test_said_words_are_written_before_they_are_said() -> None:
    timing = Timing(task_delay=3, speech_lead=2)
    # tts: prompt, then a frame for EPAD, then the lead; so the first word's text stands right after EPAD.
    assert timing.speech_origin(Task("tts", "en", "en")) == 2 + 1 + 2
    assert timing.text_frame(Task("tts", "en", "en"), start=0.0, end=0.3, frame_rate=12.5) == 3
    assert timing.text_frame(Task("tts", "en", "en"), start=0.75, end=9.0, frame_rate=12.5) == 5 + 9 - 2
    assert timing.text_frame(Task("s2st", "ja", "en"), start=0.75, end=9.0, frame_rate=12.5) == 2 + 9 - 2


def test_text_is_pad_with_epad_before_words() -> None:
    assert row([(5, [10, 11]), (9, [12])], num_frames=12) == [
        *PROMPT, PAD, PAD, EPAD, 10, 11, PAD, EPAD, 12, PAD, PAD,
    ]  # fmt: skip


def test_words_that_meet_move_right_in_order() -> None:
    assert row([(4, [10, 11, 12]), (5, [13]), (6, [14])]) == [*PROMPT, PAD, EPAD, 10, 11, 12, 13, 14]
    # Moved to just behind: the frame before is the other word's, and stays.
    assert row([(3, [10]), (4, [11]), (6, [12])]) == [*PROMPT, EPAD, 10, 11, EPAD, 12]


def test_prompt_is_never_overwritten() -> None:
    assert row([(0, [10])]) == [*PROMPT, 10]
    assert row([(2, [10])], num_frames=4) == [*PROMPT, 10, PAD]
    assert row([], num_frames=1) == PROMPT
    assert text_stream([(2, [10])], prompt=[40, PAD], num_frames=0, streams=STREAMS).tolist() == [40, PAD, 10]


def test_text_longer_than_asked_for_grows() -> None:
    assert len(row([(6, [10, 11, 12])], num_frames=3)) == 9


def sample(task: Task, *, text_frames: int, heard: int | None = None, spoken: int | None = None) -> np.ndarray:
    return lay_out(
        task,
        text=np.full(text_frames, 20),
        heard=None if heard is None else codes(heard, first=100),
        spoken=None if spoken is None else codes(spoken, first=500),
        silence=SILENCE,
        timing=Timing(task_delay=3, speech_lead=1),
        streams=STREAMS,
    )


def test_streams_of_a_listening_task() -> None:
    out = sample(Task("asr", "en", "en"), text_frames=9, heard=4)
    assert out.shape == (6, 9 + 3) and out.dtype == np.int64  # silence goes on for the task delay
    assert (out[0, :9] == 20).all() and (out[0, 9:] == PAD).all()
    assert (out[1:3] == SILENCE[:2, None]).all()  # the model is silent of its own accord
    assert (out[3:, :2] == ZERO_TOKEN).all()  # nobody speaks during the prompt
    assert (out[3:, 2:6] == codes(4, first=100)[:3]).all()
    assert (out[3:, 6:] == SILENCE[:3, None]).all()


def test_streams_of_a_speaking_task() -> None:
    out = sample(Task("tts", "en", "en"), text_frames=5, spoken=6)
    origin = 2 + 1 + 1
    assert out.shape == (6, origin + 6)  # the sound is longer than the text
    assert (out[0, :5] == 20).all() and (out[0, 5:] == PAD).all()
    assert (out[1:3, :origin] == SILENCE[:2, None]).all()
    assert (out[1:3, origin:] == codes(6, first=500)[:2]).all()
    assert (out[3:] == ZERO_TOKEN).all()


def test_streams_of_speech_to_speech_share_a_clock() -> None:
    out = sample(Task("s2st", "ja", "en"), text_frames=3, heard=4, spoken=7)
    assert out.shape == (6, 9 + 3)
    assert (out[1:3, 2:9] == codes(7, first=500)[:2]).all()
    assert (out[1:3, :2] == SILENCE[:2, None]).all() and (out[1:3, 9:] == SILENCE[:2, None]).all()
    assert (out[3:, 2:6] == codes(4, first=100)[:3]).all() and (out[3:, 6:] == SILENCE[:3, None]).all()


def test_a_conversation_has_both_parties_on_one_clock_and_no_end() -> None:
    out = sample(Task("s2s", "en", "en"), text_frames=3, heard=7, spoken=7)
    assert out.shape == (6, 9)
    assert (out[1:3, 2:] == codes(7, first=500)[:2]).all() and (out[3:, 2:] == codes(7, first=100)[:3]).all()
    assert (out[1:3, :2] == SILENCE[:2, None]).all() and (out[3:, :2] == ZERO_TOKEN).all()


def test_text_alone_has_no_audio_at_all() -> None:
    out = sample(Task("text", "en", "en"), text_frames=5)
    assert out.shape == (6, 5) and (out[0] == 20).all() and (out[1:] == ZERO_TOKEN).all()
