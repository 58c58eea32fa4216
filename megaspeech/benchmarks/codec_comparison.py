"""Codecs on the same recordings: bits, nearness, use of the codebooks, speed.

Shapes: B batch, Q codebooks, K entries of a codebook, T frames, N samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megaspeech.benchmarks.codec_quality import Quality, Use, codebook_use, judge, mean, resample
from megaspeech.codecs import Codec, SpectralCodec, SpectralConfig

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}
PCM_BITS = 16


@dataclass(frozen=True)
class Sound:
    """A recording, mixed down: float32 `[N]` at its own rate."""

    path: Path
    samples_N: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples_N) / self.rate

    def at(self, rate: int) -> Tensor:
        """`[1, N]` at another rate."""
        return torch.from_numpy(resample(self.samples_N, rate=self.rate, to=rate))[None]


@dataclass(frozen=True)
class Row:
    """One codec. Rates in Hz and bits a second; speeds in seconds of sound a second, one recording at a time.

    `compression` is against 16 bits a sample at the codec's own rate.
    """

    label: str
    name: str
    fingerprint: str
    sample_rate: int
    frame_rate: float
    num_codebooks: int
    cardinality: int
    is_causal: bool
    can_stream: bool
    bitrate: float
    tokens_per_second: float
    compression: float
    num_frames: int
    quality: Quality
    use: Use
    encode_x_real_time: float
    decode_x_real_time: float


def read_sounds(folder: Path, *, most: int, seconds: float) -> Iterator[Sound | tuple[Path, str]]:
    """Recordings below a folder, evenly drawn from them in order of name; (path, reason) of those that are left out.

    Args:
        folder: searched with all below it.
        most: recordings.
        seconds: of each, from its start.

    Raises:
        ValueError: there are none.
        ImportError: soundfile is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(f"reading audio needs soundfile ({error}): pip install megaspeech[data]") from None
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: holds no audio ({', '.join(sorted(AUDIO_SUFFIXES))}); name another folder")
    for index in sorted({round(place) for place in np.linspace(0, len(paths) - 1, min(most, len(paths)))}):
        try:
            rate = soundfile.info(paths[index]).samplerate
            samples_NC, _ = soundfile.read(paths[index], frames=int(seconds * rate), dtype="float32", always_2d=True)
        except (OSError, soundfile.LibsndfileError) as error:
            yield paths[index], str(error)
            continue
        samples_N = samples_NC.mean(1)
        if not len(samples_N) or not np.isfinite(samples_N).all():
            yield paths[index], "no samples, or NaN among them"
            continue
        yield Sound(paths[index], samples_N, rate)


def label_of(codec: Codec) -> str:
    """Such as "mimi, 12.5 x 8 of 2048": frames a second, codebooks, entries."""
    return f"{codec.name}, {codec.frame_rate:.4g} x {codec.num_codebooks} of {codec.cardinality}"


def fit_sizes(sounds: Sequence[Sound], sizes: Sequence[tuple[int, int]]) -> list[SpectralCodec]:
    """`spectral` codecs of (codebooks, entries), fitted on these recordings."""
    rate = SpectralConfig().sample_rate
    waveforms = [sound.at(rate)[0] for sound in sounds]
    return [
        SpectralCodec.fit(waveforms, config=SpectralConfig(num_codebooks=books, cardinality=entries))
        for books, entries in sizes
    ]


def compare(
    codecs: Sequence[Codec], sounds: Sequence[Sound], *, hear: Callable[[], None] = lambda: None
) -> tuple[list[Row], list[Tensor]]:
    """A row a codec, and what each made of the first recording `[N]`, at that one's rate.

    Args:
        codecs: on the devices where they shall run.
        sounds: at least one; those longer than memory allows were cut before.
        hear: called when a codec has done a recording.
    """
    rows, heard = [], []
    for codec in codecs:
        row, first = _compare(codec, sounds, hear=hear)
        rows.append(row)
        heard.append(first)
    return rows, heard


def _compare(codec: Codec, sounds: Sequence[Sound], *, hear: Callable[[], None]) -> tuple[Row, Tensor]:
    found, firsts = [], []
    counts_QK = torch.zeros(codec.num_codebooks, codec.cardinality, dtype=torch.double)
    encoding = decoding = 0.0
    codec.decode(codec.encode(sounds[0].at(codec.sample_rate)))  # the first run of a network prepares it
    for sound in sounds:
        wave = sound.at(codec.sample_rate)
        began = time.perf_counter()
        codes_BQT = _done(codec.encode(wave))
        encoded = time.perf_counter()
        back = _done(codec.decode(codes_BQT))
        encoding, decoding = encoding + encoded - began, decoding + time.perf_counter() - encoded
        for counts_K, codes_T in zip(counts_QK, codes_BQT[0].cpu(), strict=True):
            counts_K += torch.bincount(codes_T, minlength=codec.cardinality)
        heard = _fit(resample(back[0].cpu().numpy(), rate=codec.sample_rate, to=sound.rate), len(sound.samples_N))
        found.append(judge(sound.samples_N, heard, sample_rate=sound.rate))
        firsts.append(heard)
        hear()
    seconds = sum(sound.seconds for sound in sounds)
    row = Row(
        label=label_of(codec),
        **{key: getattr(codec, key) for key in ("name", "fingerprint", "sample_rate", "frame_rate", "num_codebooks")},
        **{key: getattr(codec, key) for key in ("cardinality", "is_causal", "can_stream", "bitrate")},
        tokens_per_second=codec.frame_rate * codec.num_codebooks,
        compression=codec.sample_rate * PCM_BITS / codec.bitrate,
        num_frames=int(counts_QK[0].sum()),
        quality=mean(found),
        use=codebook_use(counts_QK),
        encode_x_real_time=seconds / encoding,
        decode_x_real_time=seconds / decoding,
    )
    return row, torch.from_numpy(firsts[0])


def _done(result: Tensor) -> Tensor:
    """The same, when it is there: accelerators compute behind the caller's back."""
    if result.device.type != "cpu":
        torch.accelerator.synchronize(result.device)
    return result


def _fit(wave_N: np.ndarray, length: int) -> np.ndarray:
    """Cut or padded to a length."""
    return np.pad(wave_N[:length], (0, max(0, length - len(wave_N))))
