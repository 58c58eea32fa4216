"""Voices, and spoken words with their times. Shapes: N samples of a waveform."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SILENCE_DB = -40.0  # a frame this far below the loudest of its word is silence
_FRAMES_PER_SECOND = 200  # the resolution of word times is 5 ms
_MARGINS_PER_SECOND = 100  # 10 ms kept, faded, around what sounds, so that a cut does not click
_LABEL = re.compile(
    r"(?P<name>mei|[A-Za-z][\w-]*(?:\+[\w-]+)?)(?:\*(?P<tract>\d\.\d+))?(?P<half_tone>[+-]\d+(?:\.\d+)?)?(?:@(?P<speed>\d\.\d+))?"
)


@dataclass(frozen=True)
class Voice:
    """Who speaks.

    Attributes:
        engine: "espeak" or "open_jtalk".
        name: espeak-ng's voice, with a variant after "+" (`en-us+f2`); the name of Open JTalk's voice is not read.
        tract: factor on all resonances, by resampling: 0.85 is a long vocal tract (a big body), 1.15 a short one.
        half_tone: pitch of Open JTalk's voice against its own, in semitones, whatever the tract.
        speed: of Open JTalk's voice, as if a recording of it ran faster: resonances, pitch and pace together.
    """

    engine: str
    name: str
    tract: float = 1.0
    half_tone: float = 0.0
    speed: float = 1.0

    @property
    def label(self) -> str:
        """The voice in a manifest, such as `en-us+f2`, `ja+m3*0.95`, `mei*0.86-7` or `mei*0.86-7@1.03`."""
        tract = "" if self.tract == 1.0 else f"*{self.tract:.2f}"
        half_tone = f"{self.half_tone:+g}" if self.half_tone else ""
        return self.name + tract + half_tone + ("" if self.speed == 1.0 else f"@{self.speed:.3f}")


def voice_called(label: str) -> Voice:
    """The voice of a label; one that begins with `mei` is Open JTalk's, all others are espeak-ng's.

    Raises:
        ValueError: it is not a label.
    """
    found = _LABEL.fullmatch(label)
    if not found:
        raise ValueError(f"voice: {label!r} is none; write them as en-us+f2, en-gb*0.95 or mei*0.86-7")
    name, tract, half_tone, speed = found.group("name", "tract", "half_tone", "speed")
    engine = "open_jtalk" if name == "mei" else "espeak"
    return Voice(engine, name, float(tract or 1), float(half_tone or 0), float(speed or 1))


@dataclass(frozen=True)
class Speech:
    """Sound and the times of its words.

    Attributes:
        samples: float32 `[N]`, mono.
        times: (start, end) of each word in seconds: where its sound begins and ends.
        sample_rate: Hz.
    """

    samples: np.ndarray
    times: tuple[tuple[float, float], ...]
    sample_rate: int


def join(parts: Sequence[Speech], *, gaps: Sequence[float]) -> Speech:
    """Put pieces of speech one after the other, `gaps[i]` seconds between the sound of piece i and of piece i + 1."""
    starts, clock = [], 0.0
    for part, gap in zip(parts, [*gaps, 0.0], strict=True):
        starts.append(clock)
        clock += part.times[-1][1] - part.times[0][0] + gap
    return lay(parts, starts=[start + parts[0].times[0][0] for start in starts])


def lay(parts: Sequence[Speech], *, starts: Sequence[float]) -> Speech:
    """Place pieces of speech so that the first word of piece i sounds at `starts[i]` seconds; overlaps add."""
    rate = parts[0].sample_rate
    offsets = [round((start - part.times[0][0]) * rate) for part, start in zip(parts, starts, strict=True)]
    first = min(0, *offsets)  # a margin may reach before the clock's zero; it is cut there
    total = max(offset + len(part.samples) for part, offset in zip(parts, offsets, strict=True))
    samples = np.zeros(total - first, dtype=np.float32)
    times = []
    for part, offset in zip(parts, offsets, strict=True):
        samples[offset - first : offset - first + len(part.samples)] += part.samples
        times += [(start + offset / rate, end + offset / rate) for start, end in part.times]
    return Speech(samples[-first:], tuple(times), rate)


def sounding(samples: np.ndarray, *, sample_rate: int) -> tuple[int, int]:
    """First and one-past-last sample of what is louder than 40 dB below the loudest 5 ms of `samples` `[N]`."""
    hop = sample_rate // _FRAMES_PER_SECOND
    num_frames = max(1, math.ceil(len(samples) / hop))
    frames = np.pad(samples, (0, num_frames * hop - len(samples))).reshape(num_frames, hop)
    power = np.square(frames, dtype=np.float64).mean(1)
    (loud,) = np.nonzero(power > max(power.max() * 10 ** (_SILENCE_DB / 10), 1e-12))
    return (int(loud[0]) * hop, min(int(loud[-1] + 1) * hop, len(samples))) if len(loud) else (0, len(samples))


def cut(samples: np.ndarray, starts: Sequence[int], *, sample_rate: int) -> Speech:
    """Speech from the first sound to the last.

    Args:
        samples: `[N]` with silence around.
        starts: samples at which words begin; each word ends where its own sound does.
        sample_rate: Hz.
    """
    spans = []
    for start, stop in zip(starts, [*starts[1:], len(samples)], strict=True):
        first, last = sounding(samples[start:stop], sample_rate=sample_rate)
        spans.append((start + first, start + last))
    return cut_at(samples, spans, sample_rate=sample_rate)


def cut_at(samples: np.ndarray, spans: Sequence[tuple[int, int]], *, sample_rate: int) -> Speech:
    """Speech from the first of `spans` to the last, which are (start, end) of words in samples `[N]`."""
    margin = sample_rate // _MARGINS_PER_SECOND
    begin, end = max(0, spans[0][0] - margin), min(len(samples), spans[-1][1] + margin)
    piece = samples[begin:end].astype(np.float32)
    if len(piece) > 2 * margin:
        fade = np.linspace(0.0, 1.0, margin, dtype=np.float32)
        piece[:margin] *= fade
        piece[-margin:] *= fade[::-1]
    times = tuple(((start - begin) / sample_rate, (stop - begin) / sample_rate) for start, stop in spans)
    return Speech(piece, times, sample_rate)
