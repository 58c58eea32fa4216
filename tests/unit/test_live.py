"""Live sessions on the real moshi runtime (random weights): frame by frame they give what a batch gives."""

from __future__ import annotations

import io
from importlib.util import find_spec

import numpy as np
import pytest
import sentencepiece
import torch
from served_folder import make_served_folder
from small_corpus import voice

from megaspeech.data.tasks import PROMPT_FRAMES, Task
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.preparation.compose import timing_of
from megaspeech.streaming import live
from megaspeech.streaming.folder import ServedFolder, open_folder
from megaspeech.streaming.live import LiveSession, LiveText, Said, spelled
from megaspeech.streaming.session import Answer, Request, acoustic_delay, answer

pytestmark = pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")

UNDELAYED, DELAYED = "streams.delays=[0, 0, 0, 0, 0, 0, 0, 0, 0]", "streams.delays=[0, 0, 1, 1, 2, 0, 1, 1, 1]"
ASR, TTS, S2ST = Task("asr", "en", "en"), Task("tts", "en", "en"), Task("s2st", "en", "en")
SOUND = voice(1.5, pitch=130.0)  # 18.75 frames


@pytest.fixture(scope="module", params=[UNDELAYED, DELAYED])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ServedFolder:
    return open_folder(make_served_folder(tmp_path_factory.mktemp("served") / "model", request.param))


def frames_of(sound: np.ndarray, served: ServedFolder) -> list[np.ndarray]:
    size = served.codec.frame_size
    return [sound[first : first + size] for first in range(0, len(sound), size)]


def stream(served: ServedFolder, task: Task, *, num_steps: int, text: str | None = None) -> list[Said]:
    """`num_steps` after the opening, silence after the sound."""
    sound = [] if text else frames_of(SOUND, served)
    with LiveSession(served, task=task, text=text) as session:
        return [session.open(), *(session.step(sound[i] if i < len(sound) else None) for i in range(num_steps))]


def batch(served: ServedFolder, task: Task, *, num_frames: int, text: str | None = None) -> Answer:
    heard = None if text else served.codec.encode(torch.from_numpy(SOUND)[None])[0].numpy()
    words = spelled(text, tokenizer=served.tokenizer) if text else None
    (got,) = answer(
        served.lm,
        [Request(task, num_frames=num_frames, heard=heard, words=words)],
        tokenizer=served.tokenizer,
        streams=served.config.streams,
        timing=timing_of(served.config),
        silence=served.codec.silence_codes.numpy(),
    )
    return got


@pytest.mark.parametrize(("task", "text"), [(ASR, None), (S2ST, None), (TTS, "three seven zero")])
def test_a_live_session_gives_the_very_answer_of_a_batch(served: ServedFolder, task: Task, text: str | None) -> None:
    said = stream(served, task, num_steps=30, text=text)
    expected = batch(served, task, num_frames=PROMPT_FRAMES + len(said), text=text)
    assert [one.token for one in said] == expected.text[PROMPT_FRAMES:].tolist()
    assert [one.frame for one in said] == list(range(31))
    assert len({one.token for one in said}) > 2 or text, "constant answers would prove nothing"
    decoder = served.codec.streaming_decoder()
    frames = [decoder.step(torch.from_numpy(codes)[None])[0].clamp(-1, 1).numpy() for codes in expected.codes.T]
    delay = acoustic_delay(served.config.streams)
    np.testing.assert_array_equal(
        np.concatenate([one.samples_N for one in said]), np.concatenate(frames[PROMPT_FRAMES : len(frames) - delay])
    )
    # The sound of frame f comes out of the step of frame f + delay, never later.
    assert [len(one.samples_N) for one in said] == [0] * delay + [served.codec.frame_size] * (31 - delay)


def test_the_text_adds_up(served: ServedFolder) -> None:
    said = stream(served, ASR, num_steps=30)
    written = "".join(one.text for one in said)
    assert written.split() == served.tokenizer.decode([one.token for one in said]).split() != []
    said = stream(served, TTS, num_steps=90, text="three seven zero")
    assert "".join(one.text for one in said) == " three seven zero"


def test_sessions_of_one_model_do_not_see_each_other(served: ServedFolder) -> None:
    first, _, third = (stream(served, task, num_steps=12) for task in (ASR, S2ST, ASR))
    assert [one.token for one in first] == [one.token for one in third]
    with LiveSession(served, task=ASR) as session:
        session.open()
        with pytest.raises(AssertionError, match="more than a frame"):
            session.step(np.zeros(served.codec.frame_size + 1, dtype=np.float32))
    assert [one.token for one in stream(served, ASR, num_steps=12)] == [one.token for one in first]


def test_a_session_ends_when_nothing_more_is_said(served: ServedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LONGEST_REST", 4.0)
    sound = frames_of(SOUND, served)
    with LiveSession(served, task=ASR) as session:  # a model that was not trained never falls silent
        assert len(list(session.run(sound))) == 1 + len(sound) + 50
    monkeypatch.setattr(live, "_is_quiet", lambda said: said.frame >= 25)
    patience = timing_of(served.config).task_delay + round(live.QUIET_SECONDS * served.codec.frame_rate)
    with LiveSession(served, task=ASR) as session:
        assert len(list(session.run(sound))) == 25 + patience
    monkeypatch.setattr(live, "_is_quiet", lambda said: True)
    with LiveSession(served, task=TTS, text="one two three four five six") as session:  # not before all is said
        assert "".join(one.text for one in session.run([])) == " one two three four five six"


def test_draws_have_a_temperature(served: ServedFolder) -> None:
    torch.manual_seed(0)
    tokens = []
    for temperature in (None, 0.0, 0.9):
        with LiveSession(served, task=ASR, temperature=temperature) as session:
            tokens.append([session.open().token, *(session.step(None).token for _ in range(20))])
    greedy, cold, warm = tokens
    assert greedy == cold != warm


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        (TTS, None, "tts-en: it says a text"),
        (ASR, "one", "asr-en: it hears"),
        (None, "one", "no task: it hears"),
        (TTS, "\u0001", "no piece for any of it"),
        (Task("text", "en", "en"), None, "nothing is heard or said"),
        (Task("asr", "fr", "fr"), None, "<fr>"),
    ],
)
def test_what_does_not_fit_is_named(served: ServedFolder, task: Task | None, text: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiveSession(served, task=task, text=text)


def test_characters_in_bytes_come_whole() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.processor.encode("a 東京 b")
    live_text = LiveText(tokenizer)
    parts = [live_text.push(token) for token in tokens]
    assert "".join(parts) == " a 東京 b"
    assert "" in parts, "no character was in bytes"
    cut = [token for token in tokens if tokenizer.processor.is_byte(token)][:2] + tokenizer.processor.encode("b")
    live_text = LiveText(tokenizer)
    assert "".join(map(live_text.push, cut)) == "\N{REPLACEMENT CHARACTER} b"


def byte_tokenizer() -> Tokenizer:
    """Knows a and b; all else is spelled in bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b", "b a"] * 5), model_writer=model, vocab_size=266, byte_fallback=True,
        model_type="unigram", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(model.getvalue())
