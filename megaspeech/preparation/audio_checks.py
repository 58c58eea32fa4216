"""What is wrong with audio, if anything: every reason begins with a word or two and a colon, by which it is counted.

Before anything is decoded: `missing`, `unreadable` (permissions, a folder), `empty`, `wrong type`, `truncated`,
`absurd rate`, `too long`. After: `damaged or truncated`, `changes midway`, `no such channel`, `not finite`,
`too short`, `too long`, `wrong duration` (not what the manifest says), `silent`. Shapes: N samples.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from megaspeech.preparation.recording import Recording

LOWEST_RATE, HIGHEST_RATE = 4_000, 768_000  # Hz; speech below and converters above are not made
SHORTFALL = 0.01
"""Seconds that a decoder may return less than a header declares: resamplers round, MP3 and Opus have padding."""
STRETCH = 0.1  # seconds; a syllable is longer
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # what programs that write a WAV to a pipe leave in its header
_OGG_LAST_PAGE = 0x04


@dataclass(frozen=True)
class Limits:
    """What a waveform must keep to; the defaults let everything pass. See `[preparation]` for what each means."""

    min_seconds: float = 0.0
    max_seconds: float = float("inf")
    longest: str = "preparation.max_seconds"
    """The key that `max_seconds` comes from, for the message."""
    duration_tolerance: float = float("inf")
    silence_dbfs: float = float("-inf")


def kind_of(reason: str) -> str:
    """The words that a reason is counted by."""
    return reason.partition(":")[0]


def header_fault(*, rate: int, num_samples: int) -> str | None:
    """What makes a header's numbers unusable."""
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        return f"absurd rate: {rate} Hz in its header, not {LOWEST_RATE:,} to {HIGHEST_RATE:,}"
    if num_samples <= 0:
        return "empty: the file has no samples"
    return None


def length_fault(seconds: float, *, limits: Limits) -> str | None:
    """Whether a stretch is longer than can be used, which its header or manifest says before it is decoded."""
    if seconds > limits.max_seconds:
        return f"too long: {seconds:.2f} s, more than the {limits.max_seconds:g} s of {limits.longest}"
    return None


def container_fault(content: bytes) -> str | None:
    """What the container itself says is lacking at the end, if anything; FLAC is judged by what it decodes to."""
    if content[:4] == b"RIFF":
        (size,) = struct.unpack("<I", content[4:8].ljust(4, b"\0"))
        declared = size + 8
        # One byte less is usual: some writers count the padding of an odd chunk and leave it out.
        if size not in _UNKNOWN_SIZES and declared > len(content) + 1:
            return f"truncated: {len(content)} bytes of the {declared} that its header declares"
    if content[:4] == b"OggS":
        page = content[content.rfind(b"OggS") :]
        header = 27 + (page[26] if len(page) > 26 else 0)  # RFC 3533: the header ends with a table of segment lengths
        if len(page) < header + sum(page[27:header]) or not page[5] & _OGG_LAST_PAGE:
            return "truncated: the last page of the stream is lacking"
    return None


def damaged(seconds: float) -> str:
    """The reason of a file that stops decoding on the way; a torn FLAC cannot be told from a scrambled one."""
    return f"damaged or truncated: it does not decode to the {seconds:.2f} s that its header declares"


def waveform_fault(waveform_N: np.ndarray, *, recording: Recording, rate: int, limits: Limits) -> str | None:
    """What is wrong with a decoded waveform at `rate` Hz."""
    seconds = len(waveform_N) / rate
    if not np.isfinite(waveform_N).all():
        return "not finite: holds NaN or infinity"
    told = recording.seconds
    if told is not None and abs(seconds - told) > limits.duration_tolerance:
        return f"wrong duration: {seconds:.2f} s where the manifest says {told:.2f}"
    if seconds < limits.min_seconds or not len(waveform_N):
        return f"too short: {seconds:.3f} s, less than the {limits.min_seconds:g} s of preparation.min_seconds"
    if fault := length_fault(seconds, limits=limits):
        return fault
    if loudest_dbfs(waveform_N, rate=rate) < limits.silence_dbfs:
        return f"silent: nowhere louder than {limits.silence_dbfs:g} dB below full scale (preparation.silence_dbfs)"
    return None


def loudest_dbfs(waveform_N: np.ndarray, *, rate: int) -> float:
    """Root mean square of the loudest stretch of 0.1 s, in dB relative to full scale (a square wave of 1.0 is 0)."""
    size = min(len(waveform_N), round(STRETCH * rate))
    whole = waveform_N[: len(waveform_N) // size * size].reshape(-1, size)
    power = max(np.square(whole, dtype=np.float64).mean(1).max(), np.square(waveform_N[-size:]).mean())
    return float(10 * np.log10(power)) if power > 0 else float("-inf")
