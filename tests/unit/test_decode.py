"""Decoding: equal to soundfile, in order, in stretches and channels; bad audio is set aside and says why."""

import builtins
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("nvidia.dali")

from megaspeech.preparation.audio_checks import kind_of  # noqa: E402
from megaspeech.preparation.decode import Decoder, Rejection, decode_files  # noqa: E402
from megaspeech.preparation.other_formats import StretchReader  # noqa: E402
from megaspeech.preparation.recording import Recording  # noqa: E402

RATE = 16000


def _tone(seconds: float, *, hertz: float, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def _decode(paths: list[Path], **settings) -> list:
    results = list(decode_files(paths, sample_rate=RATE, **settings))
    assert [index for index, _ in results] == list(range(len(paths)))
    return [result for _, result in results]


def _good(folder: Path) -> Path:
    path = folder / "good.wav"
    soundfile.write(path, _tone(0.5, hertz=440), RATE)
    return path


@pytest.mark.parametrize(
    "suffix, settings", [("wav", {"subtype": "PCM_16"}), ("wav", {"subtype": "FLOAT"}), ("flac", {}), ("ogg", {})]
)
def test_equals_soundfile(tmp_path, suffix, settings):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, np.stack([_tone(1.0, hertz=300), _tone(1.0, hertz=500)], axis=1), RATE, **settings)
    (waveform,) = _decode([path])
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    wanted = soundfile.read(path, dtype="float32")[0].mean(axis=1)
    np.testing.assert_allclose(waveform, wanted, atol=2e-4)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_resamples(tmp_path, rate):
    path = tmp_path / "x.wav"
    soundfile.write(path, _tone(1.0, hertz=440, rate=rate), rate)
    (waveform,) = _decode([path])
    assert len(waveform) == RATE
    inner = slice(RATE // 10, -RATE // 10)  # resamplers differ at the ends
    np.testing.assert_allclose(waveform[inner], _tone(1.0, hertz=440)[inner], atol=5e-3)


def test_in_order_whatever_the_batches(tmp_path):
    paths = []
    for index in range(11):
        paths.append(tmp_path / f"{index}.wav")
        soundfile.write(paths[-1], np.full(100 + index, index / 20, dtype=np.float32), RATE)
    for batch_size, num_threads in ((1, 1), (4, 2), (32, 1)):
        results = _decode(paths, batch_size=batch_size, num_threads=num_threads)
        assert [len(result) for result in results] == [100 + index for index in range(11)]
        assert [round(float(result[50]) * 20) for result in results] == list(range(11))


def test_results_outlive_the_batch(tmp_path):
    paths = [tmp_path / f"{index}.wav" for index in range(4)]
    for index, path in enumerate(paths):
        soundfile.write(path, np.full(1000, index / 8, dtype=np.float32), RATE)
    means = [float(result.mean()) for result in _decode(paths, batch_size=1)]
    np.testing.assert_allclose(means, [0, 0.125, 0.25, 0.375], atol=1e-4)


def _missing(folder: Path) -> Path:
    return folder / "missing.wav"


def _no_bytes(folder: Path) -> Path:
    (folder / "bad.wav").write_bytes(b"")
    return folder / "bad.wav"


def _no_samples(folder: Path) -> Path:
    soundfile.write(folder / "bad.wav", np.zeros(0, dtype=np.float32), RATE)
    return folder / "bad.wav"


def _cut(folder: Path, suffix: str) -> Path:
    noise = np.random.default_rng(0).normal(0, 0.1, RATE)  # which does not compress to nothing
    path = folder / f"bad.{suffix}"
    soundfile.write(path, noise, RATE)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    return path


def _text(folder: Path) -> Path:
    (folder / "bad.wav").write_text("no sound here " * 50)
    return folder / "bad.wav"


def _picture(folder: Path) -> Path:
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4)
    return folder / "bad.png"


def _at_rate(folder: Path, rate: int) -> Path:
    path = _good(folder).rename(folder / "bad.wav")
    content = bytearray(path.read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(content)
    return path


def _not_finite(folder: Path, value: float) -> Path:
    samples = _tone(0.2, hertz=440)
    samples[1000] = value
    soundfile.write(folder / "bad.wav", samples, RATE, subtype="FLOAT")
    return folder / "bad.wav"


def _directory(folder: Path) -> Path:
    (folder / "bad.wav").mkdir()
    return folder / "bad.wav"


def _scrambled(folder: Path) -> Path:
    path = folder / "bad.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
    path.write_bytes(content)
    return path


def _joined(folder: Path, *parts: tuple[int, int]) -> Path:
    """Broadcasts that go over from speech to music, say."""
    contents = []
    for rate, channels in parts:
        _write_by_av(folder / "part.aac", _chirp(1.0, rate=rate, channels=channels), rate=rate, codec="aac")
        contents.append((folder / "part.aac").read_bytes())
    (folder / "bad.aac").write_bytes(b"".join(contents))
    return folder / "bad.aac"


@pytest.mark.parametrize(
    "make, reason",
    [
        (_missing, "missing"),
        (_directory, "unreadable"),
        (_no_bytes, "empty: the file has no bytes"),
        (_no_samples, "empty: the file has no samples"),
        (lambda folder: _cut(folder, "wav"), "truncated"),
        (lambda folder: _cut(folder, "flac"), "damaged or truncated"),
        (lambda folder: _cut(folder, "ogg"), "truncated"),
        (_scrambled, "damaged or truncated"),
        (_text, "wrong type"),
        (_picture, "wrong type"),
        (lambda folder: _at_rate(folder, 0), "absurd rate"),
        (lambda folder: _at_rate(folder, 10), "absurd rate"),
        (lambda folder: _at_rate(folder, 2_000_000), "absurd rate"),
        (lambda folder: _not_finite(folder, np.nan), "not finite"),
        (lambda folder: _not_finite(folder, np.inf), "not finite"),
        (lambda folder: _joined(folder, (RATE, 1), (RATE, 2)), "changes midway: from 1 channel at 16000 Hz to 2"),
        (lambda folder: _joined(folder, (RATE, 1), (24000, 1)), "changes midway: from 1 channel at 16000 Hz to 1"),
    ],
)
def test_a_bad_file_is_set_aside_and_its_batch_goes_on(tmp_path, make, reason):
    bad, good = make(tmp_path), _good(tmp_path)
    results = _decode([good, bad, good, good, bad], batch_size=3)
    for index in (1, 4):
        assert isinstance(results[index], Rejection) and results[index].path == bad
        assert results[index].reason.startswith(reason) and "\n" not in results[index].reason
        assert 0 < len(kind_of(results[index].reason)) < 25  # a word or two, which can be counted
    for index in (0, 2, 3):
        np.testing.assert_allclose(results[index], _tone(0.5, hertz=440), atol=2e-4)


def test_a_wav_written_to_a_pipe_is_not_truncated(tmp_path):
    path = _good(tmp_path)
    content = bytearray(path.read_bytes())
    content[4:8] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    (waveform,) = _decode([path])
    assert len(waveform) == RATE // 2


@pytest.mark.parametrize("key", ["sample_rate", "batch_size", "num_threads"])
def test_settings_are_checked_before_anything_is_decoded(key):
    with pytest.raises(ValueError, match=rf"{key}: 0 is not positive"):
        decode_files([], **{"sample_rate": RATE, key: 0})


def test_without_dali_the_message_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("nvidia.dali"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install megaspeech\[data\]"):
        decode_files([], sample_rate=RATE)


def _chirp(seconds: float, *, rate: int, channels: int = 1) -> np.ndarray:
    """`[N, C]`, no two stretches of it alike."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * (200 + 100 * c + 40 * time) * time) for c in range(channels)], axis=1)


def _write_by_av(path: Path, samples_NC: np.ndarray, *, rate: int, codec: str) -> None:
    av = pytest.importorskip("av")
    layout = "mono" if samples_NC.shape[1] == 1 else "stereo"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        samples_CN = np.ascontiguousarray(samples_NC.T, dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(samples_CN, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0  # so that the encoder's own delay goes into the edit list
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def _write(path: Path, samples_NC: np.ndarray, *, rate: int) -> None:
    if path.suffix == ".m4a":
        _write_by_av(path, samples_NC, rate=rate, codec="aac")
    elif path.suffix == ".opus":
        with soundfile.SoundFile(path, "w", rate, samples_NC.shape[1], format="OGG", subtype="OPUS") as file:
            file.write(samples_NC)
    else:
        soundfile.write(path, samples_NC, rate)


FORMATS = ["wav", "flac", "ogg", "opus", "mp3", "aiff", "m4a"]
LOSSY = {"opus": 0.1, "mp3": 0.05, "m4a": 0.15}  # of a chirp at 0.4


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_whole_and_in_stretches(tmp_path, suffix):
    path, sound = tmp_path / f"x.{suffix}", _chirp(6.0, rate=48000, channels=2)
    _write(path, sound, rate=48000)
    stretches = [(0.0, None), (4.0, 5.0), (0.5, 1.5), (1.0, 3.0), (5.5, None)]
    recordings = [Recording(path, start=start, end=end) for start, end in stretches]
    said: list[str] = []
    decoder = Decoder(sample_rate=48000, batch_size=3, num_threads=2, say=said.append)
    for (start, end), (_, waveform) in zip(stretches, decoder.decode(recordings), strict=True):
        end = 6.0 if end is None else end
        assert not isinstance(waveform, Rejection), waveform
        assert abs(len(waveform) - round((end - start) * 48000)) <= (2400 if suffix == "m4a" else 480)
        wanted = sound[round(start * 48000) : round(end * 48000)].mean(1)
        inner = slice(2000, min(len(waveform), len(wanted)) - 2000)
        np.testing.assert_allclose(waveform[inner], wanted[inner], atol=LOSSY.get(suffix, 0.02))
    list(decoder.decode(recordings))
    others = {"mp3": "MP3: DALI does not read it; decoded by soundfile", "m4a": "M4A: DALI", "aiff": "AIFF: DALI"}
    assert len(said) == (suffix in others)  # once a run
    assert all(line.startswith(others[suffix]) for line in said)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "m4a"])
def test_one_channel_of_two(tmp_path, suffix):
    path, sound = tmp_path / f"x.{suffix}", _chirp(1.0, rate=RATE, channels=2)
    _write(path, sound, rate=RATE)
    recordings = [Recording(path, channel=channel) for channel in (1, 0, None, 2)]
    recordings += [Recording(path, start=0.25, end=0.75, channel=1)]
    right, left, both, third, part = _results(Decoder(sample_rate=RATE), recordings)
    inner, atol = slice(1000, 15000), LOSSY.get(suffix, 2e-4)
    np.testing.assert_allclose(right[inner], sound[inner, 1], atol=atol)
    np.testing.assert_allclose(left[inner], sound[inner, 0], atol=atol)
    np.testing.assert_allclose(both[inner], sound[inner].mean(1), atol=atol)
    np.testing.assert_allclose(part[1000:7000], sound[5000:11000, 1], atol=atol)
    assert third.reason == "no such channel: 2 of a file with 2, counted from 0"


def _results(decoder: Decoder, recordings: list[Recording]) -> list:
    return [result for _, result in decoder.decode(recordings)]


def test_stretches_are_resampled(tmp_path):
    path = tmp_path / "x.flac"
    _write(path, _chirp(3.0, rate=44100), rate=44100)
    (waveform,) = _results(Decoder(sample_rate=RATE), [Recording(path, start=1.0, end=2.0)])
    inner = slice(1000, 15000)
    np.testing.assert_allclose(waveform[inner], _chirp(3.0, rate=RATE)[RATE : 2 * RATE][inner, 0], atol=5e-3)


def test_a_span_of_an_archive_is_a_file(tmp_path):
    contents = []
    for index, suffix in enumerate(("wav", "flac", "mp3")):
        _write(tmp_path / f"x.{suffix}", _chirp(0.5 + index, rate=RATE), rate=RATE)
        contents.append((tmp_path / f"x.{suffix}").read_bytes())
    archive = tmp_path / "x.tar"
    archive.write_bytes(b"head" + b"".join(contents))
    starts = 4 + np.cumsum([0, *map(len, contents)])
    spans = [(int(start), len(content)) for start, content in zip(starts, contents, strict=False)]
    recordings = [Recording(archive, span=span) for span in spans] + [Recording(archive, span=spans[1], start=0.5)]
    recordings += [Recording(archive, span=(spans[2][0], len(contents[2]) + 1))]
    *waveforms, beyond = _results(Decoder(sample_rate=RATE), recordings)
    assert [round(len(waveform) / RATE, 1) for waveform in waveforms] == [0.5, 1.5, 2.5, 1.0]
    assert beyond.reason.startswith("truncated: the archive holds")


def test_mp3_is_decoded_once_however_many_stretches(tmp_path, monkeypatch):
    """And stretches in any order have the samples of the whole."""
    path = tmp_path / "x.mp3"
    soundfile.write(path, _chirp(8.0, rate=RATE)[:, 0] + np.random.default_rng(0).normal(0, 0.05, 8 * RATE), RATE)
    whole = soundfile.read(path, dtype="float32")[0]
    opened: list[str] = []
    real = StretchReader._open
    monkeypatch.setattr(StretchReader, "_open", lambda self, one: opened.append(str(one.path)) or real(self, one))
    recordings = [Recording(path, start=place / 4, end=place / 4 + 0.5) for place in range(20)]
    for recording, waveform in zip(
        recordings, _results(Decoder(sample_rate=RATE, batch_size=7), recordings), strict=True
    ):
        first = round(recording.start * RATE)
        np.testing.assert_allclose(waveform, whole[first : first + RATE // 2], atol=1e-6)
    assert len(opened) < 40  # they overlap by half: every second one goes back
    opened.clear()
    _results(Decoder(sample_rate=RATE, batch_size=7), [recording for recording in recordings[::2]])
    assert len(opened) == 1
