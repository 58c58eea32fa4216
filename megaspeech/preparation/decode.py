"""Audio files as waveforms, by NVIDIA DALI on the CPU: WAV, FLAC and Ogg, mixed down and resampled.

DALI needs no GPU or driver for this. In its pipelines one bad file fails the whole batch, so the bytes of every file
are looked at before they enter; a batch that fails nevertheless is decoded again file by file. Shapes: N samples.
"""

import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # what programs that write a WAV to a pipe leave in its header
_OGG_LAST_PAGE = 0x04


@dataclass(frozen=True)
class Rejection:
    """A file that could not be decoded, and why, in words for a person."""

    path: Path
    reason: str


def decode_files(
    paths: Sequence[Path], *, sample_rate: int, batch_size: int = 32, num_threads: int = 1
) -> Iterator[tuple[int, np.ndarray | Rejection]]:
    """Decode audio files in order.

    Args:
        paths: WAV, FLAC or Ogg files of any rate and number of channels.
        sample_rate: Hz, of what is returned.
        batch_size: files that are decoded together.
        num_threads: DALI's threads, which share a batch.

    Yields:
        (index in `paths`, waveform float32 `[N]`, mono, full scale 1.0), or a `Rejection` in its place if the file is
        missing, empty, truncated, of another type, or holds NaN or infinity. One bad file does not touch the others.

    Raises:
        ImportError: DALI or soundfile is not installed.
        ValueError: `sample_rate`, `batch_size` or `num_threads` is not positive.
    """
    for key, value in (("sample_rate", sample_rate), ("batch_size", batch_size), ("num_threads", num_threads)):
        if value <= 0:
            raise ValueError(f"{key}: {value} is not positive; give a positive whole number")
    decoder = _Decoder(sample_rate=sample_rate, batch_size=batch_size, num_threads=num_threads)
    return _decode(list(map(Path, paths)), decoder=decoder)


def _decode(paths: list[Path], *, decoder: "_Decoder") -> Iterator[tuple[int, np.ndarray | Rejection]]:
    for first in range(0, len(paths), decoder.batch_size):
        batch = paths[first : first + decoder.batch_size]
        encoded = [_read(path) for path in batch]
        waveforms = iter(decoder([one for one in encoded if isinstance(one, _Encoded)]))
        for offset, (path, one) in enumerate(zip(batch, encoded, strict=True)):
            result = (
                Rejection(path, one)
                if isinstance(one, str)
                else _check(path, one, next(waveforms), rate=decoder.sample_rate)
            )
            yield first + offset, result


@dataclass(frozen=True)
class _Encoded:
    """The bytes of a file that looks whole, with the length and rate that it declares."""

    content: np.ndarray
    num_samples: int
    rate: int


def _read(path: Path) -> "_Encoded | str":
    """The file's bytes, or why they shall not reach DALI."""
    import soundfile

    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return "missing: there is no such file"
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if not content:
        return "empty: the file has no bytes"
    try:
        info = soundfile.info(io.BytesIO(content))
    except soundfile.LibsndfileError as error:
        return f"not audio that can be decoded (WAV, FLAC or Ogg): {error.error_string}"
    if info.format not in ("WAV", "WAVEX", "FLAC", "OGG"):
        return f"wrong type: {info.format} is not WAV, FLAC or Ogg"
    if complaint := _truncation(content):
        return f"truncated: {complaint}"
    if info.frames <= 0:
        return "empty: the file has no samples"
    return _Encoded(np.frombuffer(content, dtype=np.uint8), info.frames, info.samplerate)


def _truncation(content: bytes) -> str | None:
    """What the container itself says is lacking at the end, if anything; FLAC is judged by what it decodes to."""
    if content[:4] == b"RIFF":
        (size,) = struct.unpack("<I", content[4:8])
        declared = size + 8
        # One byte less is usual: some writers count the padding of an odd chunk and leave it out.
        if size not in _UNKNOWN_SIZES and declared > len(content) + 1:
            return f"{len(content)} bytes of the {declared} that its header declares"
    if content[:4] == b"OggS":
        page = content[content.rfind(b"OggS") :]
        header = 27 + (page[26] if len(page) > 26 else 0)  # RFC 3533: the header ends with a table of segment lengths
        if len(page) < header + sum(page[27:header]) or not page[5] & _OGG_LAST_PAGE:
            return "the last page of the stream is lacking"
    return None


def _check(path: Path, encoded: _Encoded, waveform: np.ndarray | str, *, rate: int) -> np.ndarray | Rejection:
    """A decoded waveform, or why it is not one."""
    if isinstance(waveform, str):
        return Rejection(path, f"damaged or truncated: {waveform}")
    seconds, declared = len(waveform) / rate, encoded.num_samples / encoded.rate
    if seconds < declared - 0.01:
        return Rejection(path, f"truncated: {seconds:.2f} s of the {declared:.2f} s that its header declares")
    if not np.isfinite(waveform).all():
        return Rejection(path, "holds NaN or infinity")
    return waveform


class _Decoder:
    """DALI's pipeline: encoded bytes in, waveforms out."""

    def __init__(self, *, sample_rate: int, batch_size: int, num_threads: int) -> None:
        self.sample_rate, self.batch_size, self._num_threads = sample_rate, batch_size, num_threads
        self._dali = _import_dali()
        self._pipeline = self._build(batch_size)

    def _build(self, batch_size: int) -> Any:
        from nvidia.dali import fn

        pipeline = self._dali.Pipeline(
            batch_size=batch_size, num_threads=self._num_threads, device_id=None, prefetch_queue_depth=1
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=self._dali.types.UINT8, ndim=1, no_copy=True)
            waveform, _ = fn.decoders.audio(
                encoded, downmix=True, sample_rate=float(self.sample_rate), dtype=self._dali.types.FLOAT
            )
            pipeline.set_outputs(waveform)
        pipeline.build()
        return pipeline

    def __call__(self, batch: Sequence[_Encoded]) -> "list[np.ndarray | str]":
        """Waveforms in order, or DALI's words where it has none."""
        if not batch:
            return []
        try:
            return self._run(batch)
        except RuntimeError as error:
            self._pipeline = self._build(self.batch_size)  # a pipeline that has failed does not run again
            if len(batch) == 1:
                return [_reason(error)]
            return [self([one])[0] for one in batch]

    def _run(self, batch: Sequence[_Encoded]) -> "list[np.ndarray | str]":
        self._pipeline.feed_input("encoded", [one.content for one in batch])
        (waveforms,) = self._pipeline.run()
        # Copied, because DALI uses its buffers again for the next batch.
        return [np.array(waveforms.at(index), dtype=np.float32).reshape(-1) for index in range(len(batch))]


def _reason(error: RuntimeError) -> str:
    """The line of DALI's message that says what is wrong; the others say where in its source."""
    text = str(error)
    lines = [line.strip() for line in text[text.find("encountered:") :].splitlines()]
    return next((line for line in lines[1:] if line), text)[:200]


def _import_dali() -> Any:
    try:
        import nvidia.dali
        import nvidia.dali.types  # the package does not import it by itself
        import soundfile  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"decoding audio needs NVIDIA DALI and soundfile ({error}): pip install megaspeech[data]"
        ) from None
    return nvidia.dali
