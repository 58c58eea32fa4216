"""What is done to a waveform is what its plan says: ratios, levels, times, lengths."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspeech.preparation.effects import active_power, alter, telephone
from megaspeech.preparation.recording import Layer, Plan, Recording, Room
from megaspeech.preparation.rooms import draw_room, from_direct_sound, simulate

pytest.importorskip("soxr")
pytest.importorskip("pyroomacoustics")

RATE = 24000
ROOM = Room((6.0, 5.0, 3.0), (1.5, 2.0, 1.2), (2.5, 1.1, 1.0), 0.5)
OTHER, ANOTHER = Recording(Path("other.wav")), Recording(Path("another.wav"))


def _speech(seconds: float = 2.0, *, seed: int = 0, peak: float = 0.1) -> np.ndarray:
    """Bursts of noise of unlike loudness with pauses between, as speech has them."""
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.choice([0.0, 0.5, 1.0], int(seconds * 10) + 1), RATE // 10)[: int(seconds * RATE)]
    loudness[:4800] = 1.0
    samples = rng.standard_normal(len(loudness)) * loudness
    return (samples * peak / np.abs(samples).max()).astype(np.float32)


def _ratio(signal: np.ndarray, sound: np.ndarray) -> float:
    return 10 * np.log10(active_power(signal, sample_rate=RATE) / active_power(sound, sample_rate=RATE))


@pytest.mark.parametrize("snr", [-5.0, 0.0, 7.5, 20.0])
@pytest.mark.parametrize("kind, others", [("noise", (OTHER,)), ("babble", (OTHER, ANOTHER)), ("talker", (OTHER,))])
def test_the_ratio_is_the_one_asked_for(kind, others, snr):
    speech, background = _speech(), {OTHER: _speech(0.7, seed=1), ANOTHER: _speech(5.0, seed=2, peak=0.9)}
    plan = Plan(1, layers=(Layer(kind, others, (0.3, 0.6)[: len(others)], snr),))
    mixed = alter(speech, plan, sample_rate=RATE, background=background)
    assert abs(_ratio(speech, mixed - speech) - snr) < 0.1


def test_the_ratio_is_of_what_sounds():
    """A tone for a tenth of the time under steady noise: by hand, without the code's own measure of level."""
    tone = np.random.default_rng(1).normal(0, 1e-4, 10 * RATE).astype(np.float32)  # a pause is never quite silent
    tone[:RATE] = 0.1 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    noise = np.random.default_rng(0).standard_normal(3 * RATE).astype(np.float32)
    plan = Plan(1, layers=(Layer("noise", (OTHER,), (0.0,), 12.0),))
    residual = alter(tone, plan, sample_rate=RATE, background={OTHER: noise}) - tone
    assert 10 * np.log10(0.1**2 / 2 / np.mean(residual**2)) == pytest.approx(12.0, abs=0.1)


def test_nothing_clips_and_the_ratio_stays():
    speech, noise = _speech(peak=0.95), _speech(3.0, seed=1)
    plan = Plan(1, layers=(Layer("noise", (OTHER,), (0.5,), 0.0),))
    mixed = alter(speech, plan, sample_rate=RATE, background={OTHER: noise})
    assert np.abs(mixed).max() == pytest.approx(0.99, abs=1e-5)
    quiet = alter(0.1 * speech, plan, sample_rate=RATE, background={OTHER: noise})
    assert np.allclose(mixed / np.abs(mixed).max(), quiet / np.abs(quiet).max(), atol=1e-5)


def test_voices_of_a_babble_are_equally_loud():
    low = 0.01 * np.sin(2 * np.pi * 300 * np.arange(RATE) / RATE).astype(np.float32)
    high = 0.9 * np.sin(2 * np.pi * 3000 * np.arange(RATE) / RATE).astype(np.float32)
    speech = np.full(RATE, 0.1, dtype=np.float32)
    plan = Plan(1, layers=(Layer("babble", (OTHER, ANOTHER), (0.0, 0.0), 10.0),))
    heard = alter(speech, plan, sample_rate=RATE, background={OTHER: low, ANOTHER: high})
    spectrum = np.abs(np.fft.rfft(heard))
    assert spectrum[300] == pytest.approx(spectrum[3000], rel=0.01)


def test_another_talker_begins_later_and_ends_with_the_first():
    speech, other = _speech(), _speech(3.0, seed=1)
    plan = Plan(1, layers=(Layer("talker", (OTHER,), (0.25,), 0.0),))
    added = alter(speech, plan, sample_rate=RATE, background={OTHER: other}) - speech
    assert len(added) == len(speech) and not added[: len(speech) // 4].any()
    gain = added[len(speech) // 4] / other[0]
    assert np.allclose(added[len(speech) // 4 :], gain * other[: len(added) * 3 // 4], atol=1e-5)


@pytest.mark.parametrize("plan", [Plan(1, room=ROOM), Plan(1, telephone=True)])
def test_what_sounds_stays_at_its_time(plan):
    """The best fit between before and after lies at no shift at all, or one sample."""
    speech = _speech(3.0)
    heard = alter(speech, plan, sample_rate=RATE, background={})
    correlation = np.fft.irfft(np.fft.rfft(heard, 2**18) * np.conj(np.fft.rfft(speech, 2**18)))
    shift = (int(correlation.argmax()) + 2**17) % 2**18 - 2**17
    assert len(heard) == len(speech) and abs(shift) <= 1


def test_a_room_keeps_the_level_and_has_its_reverberation():
    speech = _speech(3.0)
    assert abs(_ratio(speech, alter(speech, Plan(1, room=ROOM), sample_rate=RATE, background={}))) < 0.1
    response = simulate(ROOM, sample_rate=RATE).astype(np.float64)
    decay = 10 * np.log10(np.cumsum(response[::-1] ** 2)[::-1] / np.sum(response**2))  # Schroeder's integral
    start, stop = (int(np.argmax(decay < level)) for level in (-5, -25))
    assert 3 * (stop - start) / RATE == pytest.approx(ROOM.reverberation, rel=0.3)
    assert response[0] == 1.0 and np.abs(response).max() == 1.0


def test_rooms_are_fit_for_speech():
    rooms = [draw_room(np.random.default_rng(number), reverberation=(0.2, 0.6)) for number in range(6)]
    assert len(set(rooms)) == 6
    for room in rooms:
        assert 0.4 <= np.linalg.norm(np.subtract(room.talker, room.microphone)) <= 2.51
        response = simulate(room, sample_rate=16000).astype(np.float64) ** 2
        early, late = response[:800].sum(), response[800:].sum()  # clarity C50 of ISO 3382
        assert -1 < 10 * np.log10(early / late) < 40
    assert rooms == [draw_room(np.random.default_rng(number), reverberation=(0.2, 0.6)) for number in range(6)]


def test_a_recorded_response_begins_with_its_direct_sound():
    recorded = np.concatenate([np.zeros(500), [0.01, -0.5, 0.2, 0.1]]).astype(np.float32)
    assert np.allclose(from_direct_sound(recorded), [1.0, -0.4, -0.2])
    speech = _speech()
    heard = alter(speech, Plan(1, room=OTHER), sample_rate=RATE, background={OTHER: recorded})
    wanted = np.convolve(speech, [1.0, -0.4, -0.2])[: len(speech)]
    assert np.corrcoef(heard, wanted)[0, 1] > 0.9999
    with pytest.raises(ValueError, match="silent"):
        from_direct_sound(np.zeros(3))


def test_a_telephone_passes_its_band_alone():
    time = np.arange(RATE) / RATE
    levels = {}
    for hertz in (100, 1000, 6000):
        tone = 0.3 * np.sin(2 * np.pi * hertz * time).astype(np.float32)
        levels[hertz] = _ratio(telephone(tone, sample_rate=RATE), tone)
    tone = 0.3 * np.sin(2 * np.pi * 400 * time).astype(np.float32)
    assert np.corrcoef(tone, telephone(tone, sample_rate=RATE))[0, 1] > 0.98  # in step: the filter delays nothing
    assert abs(levels[1000]) < 0.5 and levels[100] < -20 and levels[6000] < -30
    noise = telephone(_speech(), sample_rate=RATE)
    assert len(np.unique(noise)) > 1000  # of the line's rate it is no more


@settings(max_examples=40, deadline=None)
@given(
    num_samples=st.integers(1, 6000),
    speed=st.floats(0.5, 2).map(lambda value: round(value, 3)),
    kinds=st.sets(st.sampled_from(["talker", "babble", "noise"])),
    room=st.booleans(),
    is_telephone=st.booleans(),
    level_db=st.floats(-30, 20),
    snr=st.floats(-20, 40),
    offset=st.floats(0, 0.9999),
    length=st.integers(0, 9000),
)
def test_lengths_peaks_and_the_original(num_samples, speed, kinds, room, is_telephone, level_db, snr, offset, length):
    rng = np.random.default_rng(num_samples)
    waveform = rng.uniform(-1, 1, num_samples).astype(np.float32)
    others = {OTHER: rng.uniform(-1, 1, length).astype(np.float32)}
    before, theirs = waveform.copy(), others[OTHER].copy()
    layers = tuple(Layer(kind, (OTHER, ANOTHER), (offset, offset), snr) for kind in sorted(kinds))
    plan = Plan(1, speed, OTHER if room else None, layers, is_telephone, level_db)
    altered = alter(waveform, plan, sample_rate=RATE, background=others)
    assert altered.dtype == np.float32 and len(altered) == round(num_samples / speed)
    assert np.isfinite(altered).all() and np.abs(altered).max(initial=0) <= 0.9901
    assert np.array_equal(waveform, before) and np.array_equal(others[OTHER], theirs)
    assert np.array_equal(altered, alter(waveform, plan, sample_rate=RATE, background=others))


@pytest.mark.parametrize("length", [0, 1000])
def test_silence_stays_silence(length):
    plan = Plan(1, room=ROOM, layers=(Layer("noise", (OTHER,), (0.0,), 0.0),), telephone=True)
    silence = np.zeros(length, dtype=np.float32)
    assert not alter(silence, plan, sample_rate=RATE, background={OTHER: _speech()}).any()


@pytest.mark.parametrize(
    "package, plan",
    [
        ("soxr", Plan(1, speed=1.1)),
        ("scipy.signal", Plan(1, telephone=True)),
        ("pyroomacoustics", Plan(1, room=Room((5.0, 4.0, 3.0), (1.0, 1.0, 1.0), (2.0, 2.0, 1.0), 0.2))),
    ],
)
def test_a_package_that_lacks_is_named(package, plan, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install megaspeech\[augmentation\]"):
        alter(_speech(0.2), plan, sample_rate=RATE, background={})
