"""What audio must keep to, and the level that it is brought to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("nvidia.dali")

from megaspeech.preparation.audio_checks import Limits, loudest_dbfs  # noqa: E402
from megaspeech.preparation.decode import Decoder, Rejection  # noqa: E402
from megaspeech.preparation.loudness import PEAK, Loudness  # noqa: E402
from megaspeech.preparation.recording import Recording  # noqa: E402

RATE = 16000


def _tone(seconds: float, *, hertz: float = 440) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def _decoded(decoder: Decoder, recording: Recording) -> np.ndarray | Rejection:
    ((_, result),) = decoder.decode([recording])
    return result


LIMITS = Limits(min_seconds=0.2, max_seconds=2.0, duration_tolerance=0.25, silence_dbfs=-60.0)


@pytest.mark.parametrize(
    "seconds, change, reason",
    [
        (1.0, {}, None),
        (1.0, {"duration": 1.2}, None),
        (1.0, {"duration": 1.3}, "wrong duration: 1.00 s where the manifest says 1.30"),
        (1.0, {"duration": 0.7}, "wrong duration"),
        (1.0, {"start": 0.5, "end": 1.3}, "wrong duration: 0.50 s where the manifest says 0.80"),
        (1.0, {"start": 0.5, "end": 1.1}, None),
        (1.0, {"start": 1.5}, "truncated: the file ends at 1.00 s"),
        (1.0, {"start": 0.5, "end": 0.5}, "too short"),
        (0.15, {}, "too short: 0.150 s"),
        (2.1, {}, "too long: 2.10 s, more than the 2 s of preparation.max_seconds"),
        (2.1, {"start": 0.5}, None),
        (1.0, {"gain": 3e-3}, "silent"),
        (1.0, {"gain": 4e-3}, None),
        (1.0, {"gain": 0.0}, "silent"),
    ],
)
@pytest.mark.parametrize("suffix", ["wav", "aiff"])
def test_limits(tmp_path: Path, seconds: float, change: dict, reason: str | None, suffix: str) -> None:
    change = dict(change)
    path, gain = tmp_path / f"x.{suffix}", change.pop("gain", 1.0)
    soundfile.write(path, gain * _tone(seconds), RATE, subtype="FLOAT")
    result = _decoded(Decoder(sample_rate=RATE, limits=LIMITS), Recording(path, **change))
    if reason is None:
        assert isinstance(result, np.ndarray), result
    else:
        assert isinstance(result, Rejection) and result.reason.startswith(reason), result


def test_a_word_in_silence_is_not_silent() -> None:
    samples = np.concatenate([np.zeros(5 * RATE), _tone(0.1, hertz=300), np.zeros(5 * RATE)])
    assert loudest_dbfs(samples, rate=RATE) == pytest.approx(20 * np.log10(0.4 / np.sqrt(2)), abs=0.1)
    assert loudest_dbfs(np.zeros(RATE), rate=RATE) == float("-inf")
    assert loudest_dbfs(_tone(0.01, hertz=300), rate=RATE) > -20  # shorter than a stretch


@pytest.mark.parametrize("level, gain", [(-23.0, 0.02), (-30.0, 0.4), (-23.0, 1.5)])
def test_loudness(tmp_path: Path, level: float, gain: float) -> None:
    """Measured again by pyloudnorm; a tone of any level comes out at the one asked for."""
    pyloudnorm = pytest.importorskip("pyloudnorm")
    path = tmp_path / "x.wav"
    soundfile.write(path, gain * _tone(3.0), RATE, subtype="FLOAT")
    waveform = _decoded(Decoder(sample_rate=RATE, loudness=level), Recording(path))
    assert waveform.dtype == np.float32
    assert pyloudnorm.Meter(RATE).integrated_loudness(waveform) == pytest.approx(level, abs=0.05)


def test_loudness_never_clips_and_leaves_silence() -> None:
    pytest.importorskip("pyloudnorm")
    click = 0.001 * _tone(2.0)
    click[1000] = 0.5
    raised = Loudness(-14.0, rate=RATE).apply(click)
    assert np.abs(raised).max() == pytest.approx(PEAK) and np.allclose(raised, click * (PEAK / 0.5))
    assert (Loudness(-14.0, rate=RATE).apply(np.zeros(RATE, dtype=np.float32)) == 0).all()
    short = Loudness(-20.0, rate=RATE)
    assert short.measure(short.apply(_tone(0.1))) == pytest.approx(-20, abs=0.1)
