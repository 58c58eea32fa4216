"""Recordings to codes: decoded in windows ahead of the encoder, which takes them in batches of like length.

Codes do not depend on who shares a batch. A causal codec's codes of a frame depend on nothing after it, so that
recordings may be padded to one length; with another codec only recordings of one and the same number of frames are
taken together. Shapes: B recordings of a batch, N samples, Q codebooks, T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megaspeech.codecs.protocol import Codec
from megaspeech.config.preparation import PreparationSection
from megaspeech.preparation.decode import Decoder, Rejection
from megaspeech.preparation.effects import alter
from megaspeech.preparation.reading_ahead import ahead
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.timeline import Timeline

BATCHES_A_WINDOW = 8
"""A window is `read_ahead` recordings, or so many batches' worth of sound, which bounds memory: three windows are held
at once, the one being encoded, the next, and the one being decoded."""


@dataclass
class Window:
    """Recordings that were decoded together, and those that could not be, with the reason."""

    recordings: list[Recording] = field(default_factory=list)
    waveforms: list[np.ndarray] = field(default_factory=list)
    rejected: dict[Recording, str] = field(default_factory=dict)
    num_samples: int = 0

    def add(self, recording: Recording, result: np.ndarray | Rejection) -> None:
        """What decoding a recording came to."""
        if isinstance(result, Rejection):
            self.rejected[recording] = result.reason
            return
        self.recordings.append(recording)
        self.waveforms.append(result)
        self.num_samples += len(result)

    def __len__(self) -> int:
        return len(self.recordings) + len(self.rejected)


def decoded_windows(
    recordings: Sequence[Recording],
    *,
    decoder: Decoder,
    settings: PreparationSection,
    timeline: Timeline,
    background: Mapping[Recording, np.ndarray] | None = None,
) -> Iterator[Window]:
    """Windows of decoded recordings, in order. Where one ends follows from the recordings and settings alone.

    Args:
        recordings: those that have a plan are altered by it.
        decoder: decodes them.
        settings: how much a window holds.
        timeline: records the decoding.
        background: waveforms that plans ask for.
    """

    def finished(recording: Recording, result: np.ndarray | Rejection) -> np.ndarray | Rejection:
        if recording.plan is None or isinstance(result, Rejection):
            return result
        return alter(result, recording.plan, sample_rate=decoder.sample_rate, background=background or {})

    decoder.forget()
    most_samples = BATCHES_A_WINDOW * settings.batch_seconds * decoder.sample_rate
    window = Window()
    size = min(decoder.batch_size, settings.read_ahead)
    for first in range(0, len(recordings), size):
        batch = recordings[first : first + size]
        with timeline.span("decode", f"{len(batch)} recordings"):
            results = [result for _, result in decoder.decode(batch)]
            for recording, result in zip(batch, decoder.threads.map(finished, batch, results), strict=True):
                window.add(recording, result)
        if len(window) >= settings.read_ahead or window.num_samples >= most_samples:
            yield window
            window = Window()
    if len(window):
        yield window


def encoding_device(setting: str) -> torch.device:
    """`preparation.device`: "auto" is the accelerator where there is one."""
    if setting != "auto":
        return torch.device(setting)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def length_batches(num_frames: Sequence[int], *, most_frames: int, is_causal: bool) -> list[list[int]]:
    """Indices in batches, sorted by length.

    Args:
        num_frames: of each recording.
        most_frames: of a batch, padding included, unless one recording alone is longer.
        is_causal: whether recordings of unlike length may share a batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(num_frames)), key=num_frames.__getitem__):
        longest = num_frames[index]
        batch = batches[-1] if batches else []
        fits = batch and (len(batch) + 1) * longest <= most_frames
        if fits and (is_causal or num_frames[batch[0]] == longest):
            batch.append(index)
        else:
            batches.append([index])
    return batches


def encode_window(
    window: Window, *, codec: Codec, batch_seconds: float, timeline: Timeline
) -> dict[Recording, np.ndarray]:
    """Codes `[Q, T]` of a window's recordings, T = ceil(N / frame_size)."""
    num_frames = [-(-len(waveform) // codec.frame_size) for waveform in window.waveforms]
    most_frames = int(batch_seconds * codec.frame_rate)
    codes: dict[Recording, np.ndarray] = {}
    for batch in length_batches(num_frames, most_frames=most_frames, is_causal=codec.is_causal):
        waveforms_BN = torch.zeros(len(batch), num_frames[batch[-1]] * codec.frame_size)
        for row, index in enumerate(batch):
            waveforms_BN[row, : len(window.waveforms[index])] = torch.from_numpy(window.waveforms[index])
        with timeline.span("encode", f"{len(batch)} recordings, {waveforms_BN.numel() / codec.sample_rate:.0f} s"):
            codes_BQT = codec.encode(waveforms_BN).cpu().numpy()
        for row, index in enumerate(batch):
            codes[window.recordings[index]] = codes_BQT[row, :, : num_frames[index]].copy()
    return codes


def encode_recordings(
    recordings: Sequence[Recording],
    *,
    codec: Codec,
    settings: PreparationSection | None = None,
    progress: Callable[[Iterable, int], Iterable] | None = None,
) -> tuple[dict[Recording, np.ndarray], dict[Recording, str]]:
    """(codes `[Q, T]` int64, reasons of rejection) by recording, without any limits on what a recording may be.

    `progress` wraps the iteration over windows of `settings.read_ahead` recordings, of which there are so many.
    """
    settings, timeline = settings or PreparationSection(), Timeline()
    decoder = Decoder(sample_rate=codec.sample_rate, num_threads=settings.num_threads)
    windows = ahead(
        decoded_windows(recordings, decoder=decoder, settings=settings, timeline=timeline), timeline=timeline
    )
    codes: dict[Recording, np.ndarray] = {}
    rejected: dict[Recording, str] = {}
    for window in progress(windows, -(-len(recordings) // settings.read_ahead)) if progress else windows:
        codes.update(encode_window(window, codec=codec, batch_seconds=settings.batch_seconds, timeline=timeline))
        rejected.update(window.rejected)
    return codes, rejected
