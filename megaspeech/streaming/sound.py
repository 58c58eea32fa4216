"""Sound in and out of a live session, frame by frame: files of any rate and channels, the microphone, the speakers.

Shapes: N samples, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from megaspeech.preparation.audio_checks import Limits
from megaspeech.preparation.other_formats import AudioFaultError, StretchReader, import_soundfile
from megaspeech.preparation.recording import Recording

Play = Callable[[np.ndarray], None]
"""Takes the next samples of the model's voice."""


def read_frames(path: str | Path, *, sample_rate: int, frame_size: int) -> list[np.ndarray]:
    """A file of any rate and channels that soundfile or FFmpeg reads, mixed to one; frames `[N]`, the last shorter.

    Raises:
        ValueError: there is no such file, or it is not audio; names it.
        ImportError: soundfile or soxr is not installed.
    """
    try:
        samples_NC, rate, _ = StretchReader(limits=Limits()).read(Recording(Path(path)))
    except AudioFaultError as fault:
        raise ValueError(f"{path}: {fault}") from fault
    mono_N = samples_NC.mean(axis=1, dtype=np.float32)
    if rate != sample_rate:
        mono_N = _import_soxr().resample(mono_N, rate, sample_rate).astype(np.float32)
    return [mono_N[first : first + frame_size] for first in range(0, len(mono_N), frame_size)]


def in_real_time(frames: Iterable[np.ndarray], *, frame_rate: float) -> Iterator[np.ndarray]:
    """Frames no sooner than a listener would have heard them: frame i is complete after i + 1 frames."""
    began = time.monotonic()
    for index, frame_N in enumerate(frames):
        time.sleep(max(0.0, began + (index + 1) / frame_rate - time.monotonic()))
        yield frame_N


@contextmanager
def wav_writer(path: str | Path, *, sample_rate: int) -> Iterator[Play]:
    """Writes samples to a new 16-bit WAV as they come.

    Raises:
        ValueError: it cannot be written.
    """
    soundfile = import_soundfile()
    try:
        file = soundfile.SoundFile(path, "w", samplerate=sample_rate, channels=1, subtype="PCM_16", format="WAV")
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.error_string}); name a file in a folder that is there"
        ) from error
    with file:
        yield file.write


@contextmanager
def microphone_and_speakers(*, sample_rate: int, frame_size: int) -> Iterator[tuple[Iterator[np.ndarray], Play]]:
    """Frames of the microphone, for ever, and what plays samples.

    Raises:
        ValueError: there is no microphone, or there are no speakers.
        ImportError: sounddevice, or the PortAudio library that it needs, is not installed.
    """
    device = _import_sounddevice()
    shape = {"samplerate": sample_rate, "channels": 1, "dtype": "float32", "blocksize": frame_size}
    with ExitStack() as open_ones:
        try:
            microphone = open_ones.enter_context(device.InputStream(**shape))
            speakers = open_ones.enter_context(device.OutputStream(**shape))
        except device.PortAudioError as error:
            raise ValueError(f"--microphone: {error}; plug one in, or name a sound file instead") from error
        yield _recorded(microphone, frame_size), lambda samples_N: speakers.write(samples_N[:, None])


def _recorded(microphone: object, frame_size: int) -> Iterator[np.ndarray]:
    while True:
        samples_NC, _ = microphone.read(frame_size)
        yield samples_NC[:, 0].copy()


def _import_soxr() -> ModuleType:
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"another sample rate needs soxr ({error}): pip install megaspeech[data]") from None
    return soxr


def _import_sounddevice() -> ModuleType:
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the library is not there
        raise ImportError(
            f"--microphone needs sounddevice and PortAudio ({error}): pip install megaspeech[serve], and your system's "
            f"libportaudio2"
        ) from None
    return sounddevice
