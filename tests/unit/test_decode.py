"""Decoding by DALI: equal to soundfile, in order, and a bad file of any kind is set aside with its reason."""

import builtins
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("nvidia.dali")

from megaspeech.preparation.decode import Rejection, decode_files  # noqa: E402

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


def _other_format(folder: Path) -> Path:
    soundfile.write(folder / "bad.aiff", _tone(0.2, hertz=440), RATE)
    return folder / "bad.aiff"


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


@pytest.mark.parametrize(
    "make, reason",
    [
        (_missing, "missing"),
        (_directory, "unreadable"),
        (_no_bytes, "empty: the file has no bytes"),
        (_no_samples, "empty: the file has no samples"),
        (lambda folder: _cut(folder, "wav"), "truncated"),
        (lambda folder: _cut(folder, "flac"), "truncated"),
        (lambda folder: _cut(folder, "ogg"), "truncated"),
        (_scrambled, "damaged"),
        (_text, "not audio"),
        (_other_format, "wrong type: AIFF"),
        (lambda folder: _not_finite(folder, np.nan), "NaN"),
        (lambda folder: _not_finite(folder, np.inf), "infinity"),
    ],
)
def test_a_bad_file_is_set_aside_and_its_batch_goes_on(tmp_path, make, reason):
    good, bad = _good(tmp_path), make(tmp_path)
    results = _decode([good, bad, good, good, bad], batch_size=3)
    for index in (1, 4):
        assert isinstance(results[index], Rejection) and results[index].path == bad
        assert reason in results[index].reason and "\n" not in results[index].reason
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
