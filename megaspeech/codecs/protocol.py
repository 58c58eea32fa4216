"""What every codec offers: waveform to codes and back, whole or frame by frame.

Shapes: B batch, Q codebooks, T frames, N samples of a waveform, D width of a latent.
"""

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class StreamingEncoder(Protocol):
    """A causal encoder that is fed one frame of sound at a time."""

    def step(self, samples_BN: Tensor) -> Tensor:
        """Take the next ``[B, frame_size]`` samples, return their codes ``[B, Q]`` (int64)."""
        ...


class StreamingDecoder(Protocol):
    """A causal decoder that is fed the codes of one frame at a time.

    ``delay`` is how many samples its output trails ``Codec.decode`` on the same codes: a synthesis window that is still
    open cannot be played yet.
    """

    delay: int

    def step(self, codes_BQ: Tensor) -> Tensor:
        """Take the next frame's codes ``[B, Q]``, return the next ``[B, frame_size]`` samples (float32)."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Waveform to integer codes and back.

    Waveforms and codes may come from any device; what is returned lies on the codec's own.

    Attributes:
        name: the kind of codec; ``registry.load_codec`` picks by it.
        sample_rate: samples a second of the waveforms, in Hz.
        frame_size: samples a frame.
        frame_rate: frames a second, ``sample_rate / frame_size``.
        num_codebooks: Q, codes a frame.
        cardinality: entries of a codebook; codes are in ``[0, cardinality)``.
        fingerprint: short hash of the weights and what else the codes depend on, but for ``num_codebooks``: codes of
            codecs with different fingerprints do not mix.
        silence_codes: ``[Q]`` int64 on the CPU, the codes of a frame of digital silence.
        is_causal: whether padding the end of a waveform with zeros leaves the codes of all frames before it as they
            are. Then waveforms of unequal lengths may be padded to one batch; else only those of equal lengths.
        can_stream: whether there are a streaming encoder and a streaming decoder.
        device: where it computes.
    """

    name: str
    sample_rate: int
    frame_size: int
    frame_rate: float
    num_codebooks: int
    cardinality: int
    fingerprint: str
    silence_codes: Tensor
    is_causal: bool
    can_stream: bool
    device: torch.device

    @property
    def bitrate(self) -> float:
        """Bits a second that the codes take, each as likely as any other: frame rate x codebooks x log2(entries)."""
        return self.frame_rate * self.num_codebooks * math.log2(self.cardinality)

    def to(self, device: str | torch.device, *, dtype: torch.dtype = torch.float32) -> "Codec":
        """Compute on ``device`` from now on, networks in ``dtype``; returns the codec itself.

        What finds the nearest codebook entries stays in FP32. A codec that has no network stays on the CPU.
        """
        ...

    def encode(self, waveforms_BN: Tensor) -> Tensor:
        """Waveforms ``[B, N]`` float32 in [-1, 1] to codes ``[B, Q, T]`` int64, ``T = ceil(N / frame_size)``.

        The end is padded with zeros to a whole frame.
        """
        ...

    def decode(self, codes_BQT: Tensor) -> Tensor:
        """Codes ``[B, Q, T]`` to waveforms ``[B, T * frame_size]`` float32, in time with what was encoded."""
        ...

    def streaming_encoder(self, *, batch_size: int = 1) -> StreamingEncoder:
        """An encoder whose codes equal ``encode`` frame by frame.

        Raises:
            ValueError: the codec cannot stream.
        """
        ...

    def streaming_decoder(self, *, batch_size: int = 1) -> StreamingDecoder:
        """A decoder without look-ahead: codes of a frame in, a frame of samples out.

        Raises:
            ValueError: the codec cannot stream.
        """
        ...

    def codebook_vectors(self) -> Tensor | None:
        """``[Q, cardinality, D]``: their sum over the codebooks is what the codes mean; None if there are none."""
        ...
