"""Stretches of files, and formats that DALI does not read: soundfile (libsndfile) first, then PyAV (FFmpeg).

Stretches of WAV, FLAC, Ogg and the like are read by seeking. MP3 is read forward only, because libsndfile's seek in it
is not exact to the sample: a reader stays open, so that a long file with many stretches in order is decoded once.
Shapes: N samples, C channels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from megaspeech.preparation.audio_checks import SHORTFALL, Limits, damaged, header_fault, length_fault
from megaspeech.preparation.recording import Recording

BY_DALI = ("WAV", "WAVEX", "FLAC", "OGG")
"""Formats, as libsndfile calls them, that DALI decodes."""
FORWARD_ONLY = ("MP3",)
PREROLL = 0.5  # seconds before a stretch that FFmpeg's decoders start at: AAC needs the frames before
PADDING = 0.1  # seconds: a codec's frame or two, that FFmpeg may count without returning them
_SKIPPED_AT_ONCE = 1 << 20  # samples


class AudioFaultError(ValueError):
    """Why a file or a stretch of it cannot be used, in the words of `audio_checks`."""


@contextmanager
def _reading() -> Iterator[None]:
    """What the file system refuses, as an AudioFaultError."""
    try:
        yield
    except FileNotFoundError:
        raise AudioFaultError("missing: there is no such file") from None
    except OSError as error:
        raise AudioFaultError(f"unreadable: {error.strerror}") from None
    except AudioFaultError:
        raise
    except ValueError as error:  # of a NUL, or half a surrogate pair
        raise AudioFaultError(f"missing: no file can have such a name ({error})") from None


def read_bytes(recording: Recording) -> bytes:
    """The bytes of the recording's file, or of its span within an archive. Raises AudioFaultError."""
    first, size = recording.span or (0, -1)
    with _reading(), recording.path.open("rb") as file:
        file.seek(first)
        content = file.read(size)
    if not content:
        raise AudioFaultError("empty: the file has no bytes")
    if len(content) < size:
        raise AudioFaultError(f"truncated: the archive holds {len(content)} bytes of its {size}")
    return content


def open_audio(source: bytes | io.BytesIO) -> Any:
    """A soundfile.SoundFile of a path, as the file system spells it, or of bytes; None where libsndfile does not know
    the format.

    Raises:
        AudioFaultError: its header has a rate that nobody uses, or no samples.
        ImportError: soundfile is not installed.
    """
    soundfile = import_soundfile()
    try:
        file = soundfile.SoundFile(source)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: of ".raw", which it takes for samples without header
        if fault := _rate_of_zero(source):
            raise AudioFaultError(fault) from None
        return None
    if fault := header_fault(rate=file.samplerate, num_samples=file.frames):
        file.close()
        raise AudioFaultError(fault)
    return file


def _rate_of_zero(source: bytes | io.BytesIO) -> str | None:
    """The one header fault of a WAV that libsndfile reports as an error of its own."""
    if isinstance(source, io.BytesIO):
        head = source.getvalue()[:28]
    else:
        with open(source, "rb") as file:
            head = file.read(28)
    if head[:4] == b"RIFF" and head[12:16] == b"fmt " and head[24:28] == bytes(4):
        return header_fault(rate=0, num_samples=1)
    return None


class StretchReader:
    """Reads stretches `[N, C]` float32 with soundfile or PyAV, by several threads, but each file by one at a time."""

    def __init__(self, *, limits: Limits) -> None:
        self._limits = limits
        self._forward: dict[tuple, Any] = {}

    def read(self, recording: Recording) -> tuple[np.ndarray, int, str]:
        """(samples `[N, C]`, rate in Hz, what decoded it: "" or such as "MP3: soundfile"). Raises AudioFaultError."""
        key = (recording.path, recording.span)
        file = self._forward.pop(key, None)
        if file is None or file.tell() > round(recording.start * file.samplerate):
            file = self._open(recording)
        if file is None:
            return self._read_by_av(recording)
        told = "" if file.format in BY_DALI else f"{file.format}: soundfile"
        try:
            samples = self._stretch(file, recording)
        except BaseException:
            file.close()
            raise
        if file.format in FORWARD_ONLY and recording.end is not None:
            self._forward[key] = file
        else:
            file.close()
        return samples, file.samplerate, told

    def _open(self, recording: Recording) -> Any:
        if recording.span is not None:
            return open_audio(io.BytesIO(read_bytes(recording)))
        with _reading(), recording.path.open("rb") as file:
            if not file.read(1):
                raise AudioFaultError("empty: the file has no bytes")
        return open_audio(os.fsencode(recording.path))

    def _stretch(self, file: Any, recording: Recording) -> np.ndarray:
        soundfile = import_soundfile()
        first, last = _samples_of(recording, rate=file.samplerate, num_samples=file.frames)
        if fault := length_fault((last - first) / file.samplerate, limits=self._limits):
            raise AudioFaultError(fault)
        try:
            if file.format in FORWARD_ONLY:
                while (ahead := first - file.tell()) > 0:
                    if not len(file.read(min(ahead, _SKIPPED_AT_ONCE), dtype="float32")):
                        break
            elif first:
                file.seek(first)
            samples = file.read(last - first, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            raise AudioFaultError(damaged(file.frames / file.samplerate)) from None
        if len(samples) < last - first - SHORTFALL * file.samplerate:
            raise AudioFaultError(damaged(file.frames / file.samplerate))
        return samples

    def keep_only(self, keys: Collection[tuple]) -> None:
        """Close the files that are read forward only but those named, as (path, span).

        Which ones are open matters, in the last bit: libmpg123 rounds by how much is read at once.
        """
        for key in self._forward.keys() - set(keys):
            self._forward.pop(key).close()

    def _read_by_av(self, recording: Recording) -> tuple[np.ndarray, int, str]:
        try:
            import av
        except ImportError:
            raise AudioFaultError(
                "wrong type: soundfile does not read it, and PyAV is not installed (pip install av)"
            ) from None
        source = io.BytesIO(read_bytes(recording)) if recording.span else str(recording.path)
        try:
            with av.open(source) as container:
                if not container.streams.audio:
                    raise AudioFaultError("wrong type: there is no audio in it")
                samples, rate = _decode_by_av(container, recording, limits=self._limits)
                return samples, rate, f"{recording.path.suffix.lstrip('.').upper() or container.format.name}: PyAV"
        except av.error.InvalidDataError as error:
            raise AudioFaultError(f"wrong type: not audio that can be decoded ({error.strerror})") from None
        except av.error.FFmpegError as error:
            raise AudioFaultError(f"damaged or truncated: {error.strerror}") from None


def _decode_by_av(container: Any, recording: Recording, *, limits: Limits) -> tuple[np.ndarray, int]:
    """A stretch of FFmpeg's audio `[N, C]` and its rate; FFmpeg drops an encoder's padding by the file's edit list."""
    from av import AudioResampler

    stream = container.streams.audio[0]
    rate, declared = stream.rate, stream.duration
    if fault := header_fault(rate=rate, num_samples=1):
        raise AudioFaultError(fault)
    num_samples = round(declared * stream.time_base * rate) if declared else round(86400.0 * rate)
    first, last = _samples_of(recording, rate=rate, num_samples=num_samples)
    if declared and (fault := length_fault((last - first) / rate, limits=limits)):
        raise AudioFaultError(fault)
    if first:
        container.seek(max(0, round((first / rate - PREROLL) / stream.time_base)), stream=stream)
    to_float, place, parts, first_kind = AudioResampler(format="fltp"), None, [], ""
    for frame in container.decode(stream):
        kind = f"{frame.layout.nb_channels} channel{'s' * (frame.layout.nb_channels > 1)} at {frame.sample_rate} Hz"
        if place is None:
            place, first_kind = round(float((frame.pts or 0) * frame.time_base) * rate), kind
        if kind != first_kind:
            raise AudioFaultError(f"changes midway: from {first_kind} to {kind}; convert it to one of them")
        for part in to_float.resample(frame):
            samples_NC = part.to_ndarray().T
            parts.append(samples_NC[max(0, first - place) : max(0, last - place)])
            place += len(samples_NC)
        if place >= last:
            break
    samples_NC = np.concatenate(parts) if parts else np.zeros((0, 1), dtype=np.float32)
    if declared and len(samples_NC) < last - first - PADDING * rate:
        raise AudioFaultError(damaged(num_samples / rate))
    return np.ascontiguousarray(samples_NC, dtype=np.float32), rate


def _samples_of(recording: Recording, *, rate: int, num_samples: int) -> tuple[int, int]:
    """First sample of a stretch, and the one after its last, within the file."""
    first = round(min(num_samples, recording.start * rate))
    last = num_samples if recording.end is None else round(min(num_samples, recording.end * rate))
    if first >= num_samples:
        raise AudioFaultError(
            f"truncated: the file ends at {num_samples / rate:.2f} s, the stretch starts at {recording.start:.2f} s"
        )
    return first, max(first, last)


def import_soundfile() -> Any:
    """The package soundfile. Raises ImportError that names the extra."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(f"reading audio needs soundfile ({error}): pip install megaspeech[data]") from None
    return soundfile
