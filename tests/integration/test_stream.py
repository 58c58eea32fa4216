"""tools/stream.py: files of many kinds, a microphone that is played, and what is wrong with either said in a line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from served_folder import make_served_folder
from small_corpus import FRAME, RATE, voice

from megaspeech.data.tasks import Task
from megaspeech.streaming import live, sound
from megaspeech.streaming.folder import open_folder
from megaspeech.streaming.live import LiveSession

sys.path.insert(0, str(Path(__file__).parents[2]))

pytestmark = pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")
SOUND = voice(1.5, pitch=130.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_folder(tmp_path_factory.mktemp("stream") / "model")


@pytest.fixture(autouse=True)
def short_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was not trained never falls silent."""
    monkeypatch.setattr(live, "LONGEST_REST", 0.8)


@pytest.fixture
def stream(folder: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    from tools import stream as tool

    def run(*options: str | Path) -> tuple[int, str, str]:
        status = tool.main(["--device", "cpu", str(folder), *map(str, options)])
        return (status, *capsys.readouterr())

    return run


def expected(folder: Path) -> tuple[str, np.ndarray]:
    served = open_folder(folder)
    with LiveSession(served, task=Task.parse("s2s-en")) as session:
        said = list(session.run([SOUND[first : first + FRAME] for first in range(0, len(SOUND), FRAME)]))
    return "".join(one.text for one in said), np.concatenate([one.samples_N for one in said])


def test_a_file_is_heard_and_answered(folder: Path, stream: Callable, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "in.wav", SOUND, RATE, subtype="FLOAT")
    status, out, _ = stream(tmp_path / "in.wav", "--task", "s2s-en", "--output", tmp_path / "out.wav")
    text, samples = expected(folder)
    assert status == 0 and out == f"{text}\n" and len(text) > 20
    written, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert rate == RATE
    np.testing.assert_allclose(written, samples, atol=1 / 32000)
    status, out, _ = stream(tmp_path / "in.wav", "--task", "s2s-en", "--output", tmp_path / "x.wav", "--timestamps")
    times = [float(line.split(" s ")[0]) for line in out.splitlines() if " s " in line]
    assert times == sorted(times) and len(times) > 10 and times[-1] < 1.5 + 1.0


def test_files_of_any_rate_and_channels_are_read(tmp_path: Path) -> None:
    tone = np.sin(np.arange(44100) / 44100 * 2 * np.pi * 440).astype(np.float32)
    soundfile.write(tmp_path / "stereo.flac", np.stack([tone, 0 * tone], axis=1), 44100)
    frames = sound.read_frames(tmp_path / "stereo.flac", sample_rate=16000, frame_size=1280)
    assert [len(frame) for frame in frames] == [1280] * 12 + [640]
    spectrum = np.abs(np.fft.rfft(np.concatenate(frames)))
    assert spectrum.argmax() == 440 and abs(np.concatenate(frames).max() - 0.5) < 0.02


def test_a_text_is_said(stream: Callable, tmp_path: Path) -> None:
    status, out, _ = stream("--task", "tts-en", "--text", "three seven", "--output", tmp_path / "out.wav")
    assert (status, out) == (0, " three seven\n")
    assert len(soundfile.read(tmp_path / "out.wav")[0]) >= 10 * FRAME


def test_real_time_is_kept() -> None:
    began, times = time.monotonic(), []
    for _ in sound.in_real_time([SOUND] * 4, frame_rate=20.0):
        times.append(time.monotonic() - began)
    assert all(seconds >= index / 20 for index, seconds in enumerate(times, start=1)) and times[-1] < 1.0


class Interrupted:
    """A sound device: hears a file, then Ctrl-C; keeps what is played."""

    def __init__(self, played: list[np.ndarray], **shape: object) -> None:
        assert shape == {"samplerate": RATE, "channels": 1, "dtype": "float32", "blocksize": FRAME}
        self.played, self.place = played, 0

    def __enter__(self) -> Interrupted:
        return self

    def __exit__(self, *raised: object) -> None:
        self.played.append(np.full(1, np.nan))

    def read(self, size: int) -> tuple[np.ndarray, bool]:
        if self.place >= len(SOUND) - size:
            raise KeyboardInterrupt
        self.place += size
        return SOUND[self.place - size : self.place, None], False

    def write(self, samples_NC: np.ndarray) -> None:
        assert samples_NC.shape[1] == 1
        self.played.append(samples_NC[:, 0])


def test_the_microphone_is_heard_and_the_speakers_play(
    folder: Path, stream: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[np.ndarray] = []
    streams = {name: lambda **shape: Interrupted(played, **shape) for name in ("InputStream", "OutputStream")}
    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace(**streams, PortAudioError=RuntimeError))
    status, out, _ = stream("--microphone", "--task", "s2s-en")
    text, samples = expected(folder)
    assert status == 0 and len(out) > 20 and text.startswith(out.rstrip("\n"))
    *spoken, first_end, second_end = played
    assert np.isnan(first_end).all() and np.isnan(second_end).all(), "the devices are closed"
    np.testing.assert_array_equal(np.concatenate(spoken), samples[: len(np.concatenate(spoken))])
    assert len(np.concatenate(spoken)) >= 17 * FRAME


def no_device(**_: object) -> None:
    raise RuntimeError("Error querying device -1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.wav", "--task", "asr-en"], "missing.wav: missing: there is no such file"),
        (["README.md", "--task", "asr-en"], "README.md: wrong type"),
        ([".", "--task", "asr-en"], ".: unreadable"),
        (["README.md"], "--task is missing"),
        (["README.md", "--task", "asr"], "'asr' is no task"),
        (["README.md", "--task", "asr-fr"], "<fr>"),
        (["README.md", "--task", "s2s-en"], "--output is missing"),
        (["README.md", "--task", "tts-en", "--output", "x.wav"], "tts-en: it says a text"),
        (["--task", "asr-en"], "give one of a sound file"),
        (["README.md", "--microphone", "--task", "asr-en"], "give one of a sound file"),
        (["--text", "one", "--task", "tts-en", "--output", "/no/such/folder/x.wav"], "x.wav: cannot be written"),
        (["--microphone", "--task", "asr-en"], "--microphone: Error querying device -1; plug one in"),
        (["--text", "a", "--device", "gpu"], "--device gpu: "),
        (["--text", "a", "--device", "xpu"], "--device xpu: "),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    stream: Callable, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = SimpleNamespace(InputStream=no_device, PortAudioError=RuntimeError)
    monkeypatch.setitem(sys.modules, "sounddevice", devices)
    status, _, error = stream(*options)
    assert status == 1 and message in error and error.count("\n") == 1


def test_without_sounddevice_the_remedy_is_named(stream: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    status, _, error = stream("--microphone", "--task", "asr-en")
    assert status == 1 and "pip install megaspeech[serve]" in error
