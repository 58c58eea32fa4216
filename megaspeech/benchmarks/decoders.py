"""Who decodes audio files to waveforms of one channel at a given rate: our pipeline, and what people use instead.

Each is called as its documentation shows it, with its own defaults for resampling. Packages are imported when a
provider is loaded. Shapes: N samples, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaspeech.preparation.decode import Decoder, Rejection
from megaspeech.preparation.recording import Recording

Decode = Callable[[Sequence[Path], int], Iterator[np.ndarray]]
"""Of files and a rate in Hz: their waveforms float32 `[N]`, in order."""


@dataclass(frozen=True)
class Provider:
    """A decoder.

    Attributes:
        name: short, for a table's head.
        what: it does, for the legend.
        load: imports it; raises whatever a package that is not installed, or not usable here, raises.
    """

    name: str
    what: str
    load: Callable[[], Decode]


@functools.cache
def our_decoder(sample_rate: int) -> Decoder:
    """Ours, of one thread; it keeps its DALI pipelines, as preparation does."""
    return Decoder(sample_rate=sample_rate)


def _load_ours() -> Decode:
    our_decoder(24_000)  # which says if DALI is missing

    def decode(paths: Sequence[Path], sample_rate: int) -> Iterator[np.ndarray]:
        for _, result in our_decoder(sample_rate).decode([Recording(path) for path in paths]):
            if isinstance(result, Rejection):
                raise ValueError(result.reason)
            yield result

    return decode


def _one_by_one(read: Callable[[Path, int], np.ndarray]) -> Decode:
    return lambda paths, sample_rate: (read(path, sample_rate) for path in paths)


def _load_soundfile() -> Decode:
    import soundfile
    import soxr

    def read(path: Path, sample_rate: int) -> np.ndarray:
        samples_NC, rate = soundfile.read(path, dtype="float32", always_2d=True)
        mono_N = samples_NC.mean(1)
        return mono_N if rate == sample_rate else soxr.resample(mono_N, rate, sample_rate)

    return _one_by_one(read)


def _load_librosa() -> Decode:
    import librosa

    return _one_by_one(lambda path, sample_rate: librosa.load(path, sr=sample_rate, mono=True)[0])


def _load_torchcodec() -> Decode:
    from torchcodec.decoders import AudioDecoder

    def read(path: Path, sample_rate: int) -> np.ndarray:
        decoder = AudioDecoder(path, sample_rate=sample_rate, num_channels=1)
        mono_N = decoder.get_all_samples().data[0].numpy()
        # FFmpeg mixes two channels down to their sum by the square root of 2, not to their mean.
        return mono_N if decoder.metadata.num_channels == 1 else mono_N * np.float32(0.5**0.5)

    return _one_by_one(read)


def _load_lhotse() -> Decode:
    import lhotse

    # A manifest holds what a header says: it is read once, in the round that is not counted.
    recording_of = functools.cache(lhotse.Recording.from_file)

    def read(path: Path, sample_rate: int) -> np.ndarray:
        return recording_of(path).resample(sample_rate).load_audio().mean(0)

    return _one_by_one(read)


PROVIDERS = (
    Provider(
        "ours",
        "`megaspeech.preparation.decode`: DALI, and for MP3 soundfile and soxr; it alone checks containers, lengths "
        "and samples",
        _load_ours,
    ),
    Provider("soundfile + soxr", "`soundfile.read`, mean, `soxr.resample`", _load_soundfile),
    Provider("librosa", "`librosa.load`", _load_librosa),
    Provider("torchcodec", "`AudioDecoder` of one channel, which is FFmpeg", _load_torchcodec),
    Provider(
        "Lhotse",
        "`Recording.resample().load_audio()`, mean; what NeMo's Lhotse loader calls",
        _load_lhotse,
    ),
)
"""Ours first."""
