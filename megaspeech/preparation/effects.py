"""Doing a `Plan` to a waveform: speed, room, other sounds at a ratio, telephone, level. Shapes: N samples, float32.

Only the speed changes a waveform's length; a sound that is heard at some moment is heard there afterwards, too. Levels
are those of sounding speech: the mean power of the frames of 20 ms within 30 dB of the loudest one, so that pauses do
not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megaspeech.preparation.recording import Layer, Plan, Recording, Room
from megaspeech.preparation.rooms import from_direct_sound, simulate

PEAK = 0.99
"""No sample of what is mixed lies above; the whole is made quieter instead."""
_FRAME_SECONDS, _ACTIVE_DB = 0.02, 30.0
_LINE_RATE, _LINE_BAND, _MU = 8000, (300.0, 3400.0), 255.0  # ITU-T G.711 and G.712


def alter(
    waveform_N: np.ndarray, plan: Plan, *, sample_rate: int, background: Mapping[Recording, np.ndarray]
) -> np.ndarray:
    """Do what a plan says.

    Args:
        waveform_N: as decoded, float32, full scale 1.0; it is not changed.
        plan: what to do.
        sample_rate: Hz, of all waveforms.
        background: waveforms of `plan.others`. One that is lacking, because it cannot be decoded, or is silent is
            left out.

    Returns:
        A waveform, float32, of round(N / plan.speed) samples, none above full scale.

    Raises:
        ImportError: soxr, scipy or pyroomacoustics is needed and not installed.
    """
    waveform = change_speed(waveform_N, plan.speed, sample_rate=sample_rate)
    if (level := active_power(waveform, sample_rate=sample_rate)) == 0.0:
        return waveform  # silence has no ratio to anything
    response = _response(plan.room, sample_rate=sample_rate, background=background)
    mixed = reverberate(waveform, response, sample_rate=sample_rate).copy()
    for layer in plan.layers:
        sound = _lay(layer, len(mixed), sample_rate=sample_rate, background=background)
        if layer.kind == "talker":
            sound = reverberate(sound, response, sample_rate=sample_rate)  # they sit in one room
        power = active_power(sound, sample_rate=sample_rate)
        if power > 0:
            mixed += sound * np.float32(np.sqrt(level / power) * 10 ** (-layer.snr / 20))
    if plan.telephone:
        mixed = telephone(mixed, sample_rate=sample_rate)
    mixed *= np.float32(10 ** (plan.level_db / 20))
    return mixed * np.float32(PEAK / max(PEAK, float(np.abs(mixed).max())))


def active_power(waveform_N: np.ndarray, *, sample_rate: int) -> float:
    """Mean square of what sounds; 0 for silence."""
    size = max(1, round(_FRAME_SECONDS * sample_rate))
    whole = len(waveform_N) // size * size
    if whole == 0:
        return float(np.mean(np.square(waveform_N, dtype=np.float64))) if len(waveform_N) else 0.0
    power = np.square(waveform_N[:whole], dtype=np.float64).reshape(-1, size).mean(1)
    return float(power[power >= power.max() * 10 ** (-_ACTIVE_DB / 10)].mean())


def change_speed(waveform_N: np.ndarray, factor: float, *, sample_rate: int) -> np.ndarray:
    """As a recording that runs faster by `factor`: round(N / factor) samples, float32."""
    if factor == 1.0:
        return np.asarray(waveform_N, dtype=np.float32)
    return _resampled(waveform_N, sample_rate * factor, sample_rate, num_samples=round(len(waveform_N) / factor))


def reverberate(waveform_N: np.ndarray, response_K: np.ndarray | None, *, sample_rate: int) -> np.ndarray:
    """What is heard in a room, at the level it had; the reverberation of its very end is cut off."""
    before = active_power(waveform_N, sample_rate=sample_rate)
    if response_K is None or before == 0:
        return waveform_N
    heard = _import_signal().oaconvolve(waveform_N, response_K)[: len(waveform_N)]
    return (heard * np.sqrt(before / active_power(heard, sample_rate=sample_rate))).astype(np.float32)


def telephone(waveform_N: np.ndarray, *, sample_rate: int) -> np.ndarray:
    """Through a line of 8 kHz: 300 to 3,400 Hz (ITU-T G.712), 8 bits by the mu-law of ITU-T G.711."""
    signal = _import_signal()
    margin = _LINE_RATE // 10  # for the filter to settle in
    line = np.pad(_resampled(waveform_N, sample_rate, _LINE_RATE), margin)
    # Forwards and backwards, which leaves everything at its time.
    line = signal.sosfiltfilt(signal.butter(3, _LINE_BAND, "bandpass", fs=_LINE_RATE, output="sos"), line)
    line = line[margin : len(line) - margin]
    largest = max(1.0, float(np.abs(line).max(initial=0.0)))
    coded = np.round(np.sign(line) * np.log1p(_MU * np.abs(line) / largest) / np.log1p(_MU) * 127) / 127
    line = np.sign(coded) * np.expm1(np.abs(coded) * np.log1p(_MU)) / _MU * largest
    return _resampled(line, _LINE_RATE, sample_rate, num_samples=len(waveform_N))


def _lay(layer: Layer, num_samples: int, *, sample_rate: int, background: Mapping[Recording, np.ndarray]) -> np.ndarray:
    """The sum `[num_samples]` of a layer's sounds, voices equally loud."""
    total = np.zeros(num_samples, dtype=np.float32)
    for recording, offset in zip(layer.recordings, layer.offsets, strict=True):
        sound = background.get(recording)
        if sound is None or (power := active_power(sound, sample_rate=sample_rate)) == 0.0:
            continue
        sound = sound * np.float32(1 / np.sqrt(power))
        if layer.kind == "talker":
            first = int(offset * num_samples)
            total[first : first + len(sound)] += sound[: num_samples - first]
        else:
            first = int(offset * len(sound))
            total += np.take(sound, np.arange(first, first + num_samples), mode="wrap")
    return total


def _response(
    room: Room | Recording | None, *, sample_rate: int, background: Mapping[Recording, np.ndarray]
) -> np.ndarray | None:
    if isinstance(room, Room):
        return simulate(room, sample_rate=sample_rate)
    recorded = None if room is None else background.get(room)
    return None if recorded is None or not recorded.any() else from_direct_sound(recorded)


def _resampled(waveform_N: np.ndarray, source: float, target: float, *, num_samples: int | None = None) -> np.ndarray:
    """At another rate in Hz, float32; brought to `num_samples`, from which the resampler is off by one at most."""
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"this augmentation needs soxr ({error}): pip install megaspeech[augmentation]") from None
    resampled = soxr.resample(np.asarray(waveform_N, dtype=np.float32), source, target)
    if num_samples is None:
        return resampled
    return np.pad(resampled[:num_samples], (0, max(0, num_samples - len(resampled))))


def _import_signal() -> Any:
    try:
        import scipy.signal
    except ImportError as error:
        raise ImportError(f"this augmentation needs scipy ({error}): pip install megaspeech[augmentation]") from None
    return scipy.signal
