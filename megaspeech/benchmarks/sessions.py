"""How long a frame takes of sessions that are served together: codec in, a step of the model, codec out.

What a step must at least read: every weight but those of embedding tables once, and of each session its cache of keys
and values, which the runtime reads in full from the first frame on. Random weights and sounds do not change the time.

Shapes: B sessions, Q codebooks, N samples of a frame, T frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megaspeech.codecs.protocol import Codec
from megaspeech.kernels.benchmarks.measuring import quantiles_ms, rate
from megaspeech.kernels.benchmarks.rows import MEASURED
from megaspeech.streaming.runtime import import_moshi, make_generator
from megaspeech.streaming.session import Clock

if TYPE_CHECKING:
    from moshi.models import LMModel

WARM_UP = 8
"""Frames before the clock starts: the runtime gives nothing for the largest delay, and records its graphs."""
COPIED_BYTES = 2**28
"""More than caches hold."""


@dataclass(frozen=True)
class Coder:
    """A codec's two ends for sessions of one batch: sound `[B, frame_size]` to codes `[B, Q]`, and back."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    frame_size: int


Coding = Callable[[int], AbstractContextManager[Coder]]
"""Makes the ends for so many sessions."""


@dataclass(frozen=True, eq=False)
class Timed:
    """Seconds `[T]` of each frame: of the encoder, the step, and the decoder; the codec's are 0 without one."""

    encode: np.ndarray
    step: np.ndarray
    decode: np.ndarray

    @property
    def frame(self) -> np.ndarray:
        """Of all three."""
        return self.encode + self.step + self.decode


@dataclass(frozen=True)
class Row:
    """What was found of a number of sessions; `status` is "measured", or says why there are no figures.

    Attributes:
        codec: that encodes and decodes in the loop; empty where there is none.
        step_ms, frame_ms: median and 99th percentile of the model's step, and of the frame with the codec's work.
        in_time: share of the frames that took no longer than they last.
        floor_ms: what reading the step's bytes takes at the bandwidth of a copy.
        peak_bytes: of the device's memory.
    """

    batch_size: int
    codec: str
    status: str
    step_ms: tuple[float, float] | None = None
    frame_ms: tuple[float, float] | None = None
    in_time: float | None = None
    floor_ms: float | None = None
    peak_bytes: int | None = None


def of_codec(codec: Codec) -> Coding:
    """A codec of this library."""

    @contextmanager
    def coding(batch_size: int) -> Iterator[Coder]:
        encoder = codec.streaming_encoder(batch_size=batch_size)
        decoder = codec.streaming_decoder(batch_size=batch_size)
        yield Coder(encoder.step, decoder.step, codec.frame_size)

    return coding


def of_random_mimi(num_codebooks: int, *, device: torch.device) -> Coding:
    """A Mimi of full size with random weights in FP32, as Kyutai's server runs it."""
    mimi = import_moshi(device).loaders.get_mimi(None, device=device, num_codebooks=num_codebooks).eval()
    for name, buffer in mimi.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.normal_()  # as it is made, all entries are one
        elif name.endswith(("cluster_usage", "_initialized")):
            buffer.fill_(1)

    @contextmanager
    def coding(batch_size: int) -> Iterator[Coder]:
        with mimi.streaming(batch_size):
            yield Coder(
                lambda sound_BN: mimi.encode(sound_BN[:, None])[..., 0],
                lambda codes_BQ: mimi.decode(codes_BQ[..., None])[:, 0],
                mimi.frame_size,
            )

    return coding


@torch.no_grad()
def time_frames(
    lm: LMModel,
    *,
    batch_size: int,
    num_frames: int,
    coding: Coding | None = None,
    clock: Clock = time.perf_counter,
) -> Timed:
    """Serve `batch_size` sessions in one batch for `num_frames` frames after `WARM_UP`, as fast as it goes.

    Args:
        lm: see `runtime.load_runtime`.
        batch_size: B.
        num_frames: that are timed.
        coding: the codec in the loop; without one, codes are given and nothing is decoded.
        clock: gives seconds.
    """
    device, num_heard = lm.device, lm.n_q - lm.dep_q
    heard_BQ = torch.randint(lm.card, (batch_size, num_heard), device=device)
    seconds = np.zeros((3, WARM_UP + max(lm.delays) + num_frames))
    generator = make_generator(lm)

    def clocked(place: tuple[int, int], call: Callable[[], Tensor | None]) -> Tensor | None:
        started = clock()
        result = call()
        _wait(device)
        seconds[place] = clock() - started
        return result

    with coding(batch_size) if coding else nullcontext() as coder, generator.streaming(batch_size):
        sound_BN = 0.1 * torch.randn(batch_size, coder.frame_size, device=device) if coder else None
        for frame in range(seconds.shape[1]):
            if coder and num_heard:
                heard_BQ = clocked((0, frame), lambda: coder.encode(sound_BN))[:, :num_heard].to(device)
            given = heard_BQ[..., None]
            tokens = clocked((1, frame), lambda given=given: generator.step(given))
            if coder and tokens is not None and lm.dep_q:
                codes_BQ = tokens[:, 1 : 1 + lm.dep_q, 0]
                clocked((2, frame), lambda codes_BQ=codes_BQ: coder.decode(codes_BQ))
    return Timed(*seconds[:, -num_frames:])


def row_of(
    lm: LMModel,
    timed: Timed | str,
    *,
    batch_size: int,
    codec: str,
    frame_rate: float,
    bandwidth: float,
    peak_bytes: int | None = None,
) -> Row:
    """The row of what was timed, or of why nothing was.

    Args:
        lm: that was served.
        timed: what was found.
        batch_size, codec: of the row.
        frame_rate: frames a second.
        bandwidth: bytes a second, see `memory_bandwidth`.
        peak_bytes: of the device's memory.
    """
    if isinstance(timed, str):
        return Row(batch_size, codec, timed)
    return Row(
        batch_size,
        codec,
        MEASURED,
        step_ms=_median_and_p99(timed.step),
        frame_ms=_median_and_p99(timed.frame),
        in_time=float(np.mean(timed.frame <= 1 / frame_rate)),
        floor_ms=1000 * (weight_bytes(lm) + batch_size * cache_bytes(lm)) / bandwidth,
        peak_bytes=peak_bytes,
    )


def weight_bytes(lm: LMModel) -> int:
    """Bytes of the weights that every step reads: all but the embedding tables, of which it reads a few rows."""
    weights = lm.named_parameters()
    return sum(weight.nbytes for name, weight in weights if not name.partition(".")[0].endswith("emb"))


def cache_bytes(lm: LMModel) -> int:
    """Bytes of one session's keys and values in the temporal transformer."""
    attention = lm.transformer.layers[0].self_attn
    width = lm.dim // attention.kv_repeat
    return 2 * len(lm.transformer.layers) * lm.context * width * lm.dtype.itemsize


def memory_bandwidth(device: torch.device, *, milliseconds: int = 300) -> float:
    """Bytes a second, read and written, of a copy that no cache holds; the median."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    _, median_ms, _ = quantiles_ms(lambda: target.copy_(source), device=device.type, milliseconds=milliseconds)
    return 1e9 * rate(2 * COPIED_BYTES, median_ms, unit="GB/s")


def _median_and_p99(seconds: np.ndarray) -> tuple[float, float]:
    return 1000 * float(np.median(seconds)), 1000 * float(np.percentile(seconds, 99))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
