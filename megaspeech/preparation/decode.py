"""Recordings as waveforms: whole WAV, FLAC and Ogg files by NVIDIA DALI on the CPU, all else by soundfile or PyAV.

DALI needs no GPU or driver for this. In its pipelines one bad file fails the whole batch, so the bytes of every file
are looked at before they enter; a batch that fails nevertheless is decoded again file by file. It would resample too,
but to go up in rate takes several times as long as soxr (docs/measurements/decoding.md). What a recording asks for (a
stretch, a channel) and what it must keep to (`audio_checks.Limits`) is seen to here. Shapes: N samples, C channels.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaspeech.preparation.audio_checks import (
    SHORTFALL,
    Limits,
    container_fault,
    damaged,
    length_fault,
    waveform_fault,
)
from megaspeech.preparation.loudness import Loudness
from megaspeech.preparation.other_formats import (
    BY_DALI,
    AudioFaultError,
    StretchReader,
    import_soundfile,
    open_audio,
    read_bytes,
)
from megaspeech.preparation.recording import Recording

BATCH_SIZE = 32  # recordings that are decoded together


@dataclass(frozen=True)
class Rejection:
    """A recording that cannot be used, and why, in words for a person; the first are what `audio_checks` lists."""

    path: Path
    reason: str


def decode_files(
    paths: Sequence[Path], *, sample_rate: int, batch_size: int = BATCH_SIZE, num_threads: int = 1
) -> Iterator[tuple[int, np.ndarray | Rejection]]:
    """Decode whole audio files in order, as `Decoder.decode` does recordings."""
    decoder = Decoder(sample_rate=sample_rate, batch_size=batch_size, num_threads=num_threads)
    return decoder.decode([Recording(Path(path)) for path in paths])


class Decoder:
    """Decodes recordings, mixed down and resampled, with `num_threads` threads.

    Args:
        sample_rate: Hz, of what is returned.
        batch_size: recordings that are decoded together.
        num_threads: that share a batch.
        limits: what a waveform must keep to.
        loudness: LUFS that every recording is brought to; None leaves it.
        say: told once of every format that DALI does not read.

    Raises:
        ImportError: DALI, soundfile, or what `loudness` needs is not installed.
        ValueError: `sample_rate`, `batch_size` or `num_threads` is not positive.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        batch_size: int = BATCH_SIZE,
        num_threads: int = 1,
        limits: Limits | None = None,
        loudness: float | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        for key, value in (("sample_rate", sample_rate), ("batch_size", batch_size), ("num_threads", num_threads)):
            if value <= 0:
                raise ValueError(f"{key}: {value} is not positive; give a positive whole number")
        self.sample_rate, self.batch_size = sample_rate, batch_size
        self._limits = limits or Limits()
        self._loudness = None if loudness is None else Loudness(loudness, rate=sample_rate)
        self._say, self._said = say or (lambda _: None), set()
        self._pipelines = {
            downmix: _Pipeline(batch_size=batch_size, num_threads=num_threads, downmix=downmix)
            for downmix in (True, False)
        }
        self._reader = StretchReader(limits=self._limits)
        self.threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        import_soundfile()

    def decode(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, np.ndarray | Rejection]]:
        """Decode recordings in order; those of one file that stand together share what there is to share.

        Yields:
            (index in `recordings`, waveform float32 `[N]`, mono, full scale 1.0), or a `Rejection` in its place for any
            of the reasons of `audio_checks`. One bad file does not touch the others.
        """
        for first in range(0, len(recordings), self.batch_size):
            batch = recordings[first : first + self.batch_size]
            self._reader.keep_only({(recording.path, recording.span) for recording in batch})
            for offset, result in enumerate(self._decode_batch(batch)):
                yield first + offset, result

    def forget(self) -> None:
        """Close all files, so that what comes next does not depend, even in the last bit, on what was before."""
        self._reader.keep_only(())

    def _decode_batch(self, batch: Sequence[Recording]) -> list[np.ndarray | Rejection]:
        files: dict[tuple, list[int]] = {}
        for index, recording in enumerate(batch):
            files.setdefault((recording.path, recording.span), []).append(index)
        groups = [[batch[index] for index in indices] for indices in files.values()]
        read = list(self.threads.map(self._read, groups))
        for downmix, pipeline in self._pipelines.items():
            whole = [one for one in read if isinstance(one, _Whole) and one.downmix is downmix]
            for one, decoded in zip(whole, pipeline(whole), strict=True):
                one.decoded = decoded
        results: dict[int, np.ndarray | Rejection] = {}
        for indices, finished in zip(files.values(), self.threads.map(self._finish, groups, read), strict=True):
            results.update(zip(indices, finished, strict=True))
        return [results[index] for index in range(len(batch))]

    def _read(self, group: Sequence[Recording]) -> "_Whole | list[_Samples | str]":
        """One file: its bytes for DALI, or what soundfile or PyAV made of each recording."""
        if all(recording.start == 0 and recording.end is None for recording in group):
            try:
                whole = self._read_whole(group[0], channels={recording.channel for recording in group})
            except AudioFaultError as fault:
                return [str(fault)] * len(group)
            if whole is not None:
                return whole
        samples: dict[Recording, _Samples | str] = {}
        for recording in sorted(group, key=lambda one: one.start):  # forward, for those that can be read so only
            samples[recording] = self._read_stretch(recording)
        return [samples[recording] for recording in group]

    def _read_whole(self, recording: Recording, *, channels: set[int | None]) -> "_Whole | None":
        """The bytes of a file that looks whole; None where DALI does not read its format. Raises AudioFaultError."""
        content = read_bytes(recording)
        if fault := container_fault(content):
            raise AudioFaultError(fault)
        file = open_audio(io.BytesIO(content))
        if file is None or file.format not in BY_DALI:
            return None
        if fault := length_fault(file.frames / file.samplerate, limits=self._limits):
            raise AudioFaultError(fault)
        downmix = file.channels == 1 or channels == {None}
        return _Whole(np.frombuffer(content, dtype=np.uint8), file.frames / file.samplerate, file.channels, downmix)

    def _read_stretch(self, recording: Recording) -> "_Samples | str":
        try:
            samples_NC, rate, told = self._reader.read(recording)
        except AudioFaultError as fault:
            return str(fault)
        if told and told not in self._said:
            self._said.add(told)
            format_name, _, package = told.partition(": ")
            self._say(f"{format_name}: DALI does not read it; decoded by {package}")
        return _Samples(samples_NC, rate)

    def _finish(
        self, group: Sequence[Recording], read: "_Whole | list[_Samples | str]"
    ) -> list[np.ndarray | Rejection]:
        parts = [read] * len(group) if isinstance(read, _Whole) else read
        return [self._finish_one(recording, part) for recording, part in zip(group, parts, strict=True)]

    def _finish_one(self, recording: Recording, read: "_Whole | _Samples | str") -> np.ndarray | Rejection:
        """One recording's waveform: its channel, at the rate asked for, checked, at the loudness asked for."""
        if not isinstance(read, str):
            read = read.mono(recording.channel, rate=self.sample_rate)
        if not isinstance(read, str):
            fault = waveform_fault(read, recording=recording, rate=self.sample_rate, limits=self._limits)
            if fault is None:
                return read if self._loudness is None else self._loudness.apply(read)
            read = fault
        return Rejection(recording.path, read)


@dataclass
class _Whole:
    """A file for DALI: its bytes, what its header says, and then DALI's (waveform, rate) or words."""

    content: np.ndarray
    seconds: float
    num_channels: int
    downmix: bool
    decoded: tuple[np.ndarray, int] | str = ""

    def mono(self, channel: int | None, *, rate: int) -> np.ndarray | str:
        """`[N]`, or why there is none."""
        if isinstance(self.decoded, str):
            return self.decoded
        waveform, own_rate = self.decoded
        if len(waveform) / own_rate < self.seconds - SHORTFALL:
            return damaged(self.seconds)
        mono_N = _channel(waveform, channel, num_channels=self.num_channels)
        return mono_N if isinstance(mono_N, str) else _resample(mono_N, own_rate, rate)


@dataclass(frozen=True)
class _Samples:
    """`[N, C]` as soundfile or PyAV read them, at the file's own rate."""

    samples_NC: np.ndarray
    rate: int

    def mono(self, channel: int | None, *, rate: int) -> np.ndarray | str:
        """`[N]`, or why there is none."""
        mono_N = _channel(self.samples_NC, channel, num_channels=self.samples_NC.shape[1])
        return mono_N if isinstance(mono_N, str) else _resample(mono_N, self.rate, rate)


def _channel(samples: np.ndarray, channel: int | None, *, num_channels: int) -> np.ndarray | str:
    if channel is not None and channel >= num_channels:
        return f"no such channel: {channel} of a file with {num_channels}, counted from 0"
    if samples.ndim == 1:
        return samples
    return samples.mean(1, dtype=np.float32) if channel is None else np.ascontiguousarray(samples[:, channel])


def _resample(waveform_N: np.ndarray, before: int, after: int) -> np.ndarray:
    if before == after:
        return waveform_N
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"another sample rate needs soxr ({error}): pip install megaspeech[data]") from None
    return soxr.resample(waveform_N, before, after).astype(np.float32, copy=False)


class _Pipeline:
    """DALI's pipeline: bytes of whole files in, waveforms and rates out; it is built when it is first needed."""

    def __init__(self, *, batch_size: int, num_threads: int, downmix: bool) -> None:
        self._batch_size, self._num_threads = batch_size, num_threads
        self._downmix, self._dali, self._pipeline = downmix, _import_dali(), None

    def _build(self) -> Any:
        from nvidia.dali import fn

        pipeline = self._dali.Pipeline(
            batch_size=self._batch_size, num_threads=self._num_threads, device_id=None, prefetch_queue_depth=1
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=self._dali.types.UINT8, ndim=1, no_copy=True)
            pipeline.set_outputs(*fn.decoders.audio(encoded, downmix=self._downmix, dtype=self._dali.types.FLOAT))
        pipeline.build()
        return pipeline

    def __call__(self, batch: "Sequence[_Whole]") -> list[tuple[np.ndarray, int] | str]:
        """(waveform, its rate) in order, `[N]` where mixed down, else `[N, C]`; or why there is none."""
        if not batch:
            return []
        self._pipeline = self._pipeline or self._build()
        try:
            return self._run(batch)
        except RuntimeError:
            self._pipeline = None  # a pipeline that has failed does not run again
            if len(batch) == 1:  # DALI's own words name a line of its source
                return [damaged(batch[0].seconds)]
            return [self([one])[0] for one in batch]

    def _run(self, batch: "Sequence[_Whole]") -> list[tuple[np.ndarray, int] | str]:
        self._pipeline.feed_input("encoded", [one.content for one in batch])
        waveforms, rates = self._pipeline.run()
        # Copied, because DALI uses its buffers again for the next batch.
        arrays = [np.array(waveforms.at(index), dtype=np.float32) for index in range(len(batch))]
        arrays = [array.reshape(-1) for array in arrays] if self._downmix else arrays
        return [(array, round(float(rates.at(index)))) for index, array in enumerate(arrays)]


def _import_dali() -> Any:
    try:
        import nvidia.dali
        import nvidia.dali.types  # the package does not import it by itself
    except ImportError as error:
        raise ImportError(f"decoding audio needs NVIDIA DALI ({error}): pip install megaspeech[data]") from None
    return nvidia.dali
