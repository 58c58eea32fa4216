"""Signal processing of the spectral codec: causal windows, mel bands, phase retrieval whole and frame by frame.

Every frame of ``frame_size`` samples is described by ``hops`` windows that *end* one hop apart, the last one where the
frame ends: frame t is a function of the ``context`` samples up to its end, so nothing is looked ahead.

Shapes: B batch, T frames, N samples, C samples of a context, J windows of a frame, K windows of an utterance,
L samples of a window, F frequency bins, M mel bands.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-8


@dataclass(frozen=True)
class Framing:
    """Sizes in samples: ``window`` and ``hop`` of the transform, ``hops`` windows a frame."""

    window: int
    hop: int
    hops: int

    @property
    def frame_size(self) -> int:
        """Samples a frame."""
        return self.hop * self.hops

    @property
    def overlap(self) -> int:
        """Samples by which a frame's first window reaches back into the frames before."""
        return self.window - self.hop

    @property
    def context(self) -> int:
        """Samples that one frame's description depends on."""
        return self.overlap + self.frame_size

    def taper(self, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The periodic Hann window ``[L]``, used for analysis and synthesis."""
        return torch.hann_window(self.window, periodic=True, dtype=dtype)

    def contexts(self, waveforms_BN: Tensor) -> Tensor:
        """A view ``[B, T, C]`` of each frame with what precedes it; silence before the start and after the end."""
        missing = -waveforms_BN.shape[-1] % self.frame_size
        padded = torch.nn.functional.pad(waveforms_BN, (self.overlap, missing))
        return padded.unfold(-1, self.context, self.frame_size)


def mel_weights(*, num_mels: int, window: int, sample_rate: int) -> Tensor:
    """Triangular filters ``[M, F]`` (float64), each summing to one, evenly spaced on the mel scale up to Nyquist.

    The scale is O'Shaughnessy's ``2595 log10(1 + f / 700)``.
    """
    top = 2595 * torch.log10(torch.tensor(1 + sample_rate / 2 / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, 1, num_mels + 2, dtype=torch.float64) * top / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return triangles / triangles.sum(1, keepdim=True).clamp(min=TINY)


def magnitudes(contexts_RC: Tensor, *, framing: Framing) -> Tensor:
    """Magnitude spectra ``[R, J, F]`` of the windows of each context; a sine of amplitude 1 peaks at 1."""
    taper = framing.taper(dtype=contexts_RC.dtype)
    windows = contexts_RC.unfold(-1, framing.window, framing.hop) * taper
    return torch.fft.rfft(windows).abs() * (2 / taper.sum())


def invert_mel(mel_M: Tensor, *, mel_FM: Tensor, inverse_MF: Tensor, iterations: int = 4) -> Tensor:
    """Magnitudes ``[..., F]`` that are not negative and whose mel bands are about ``mel`` ``[..., M]``.

    Starts from the clamped pseudo-inverse and goes on with the multiplicative updates of Lee and Seung (2001), which
    keep the sign and lower the squared error.
    """
    spectra_F = (mel_M @ inverse_MF).clamp(min=0)
    wanted_F = mel_M @ mel_FM.T
    for _ in range(iterations):
        spectra_F = spectra_F * wanted_F / (spectra_F @ mel_FM @ mel_FM.T).clamp(min=TINY)
    return spectra_F


def griffin_lim(magnitude_BKF: Tensor, *, framing: Framing, iterations: int, momentum: float) -> Tensor:
    """Waveforms ``[B, N]`` whose windows have about these magnitudes, ``N = K * hop``.

    Fast Griffin-Lim (Perraudin, Balazs and Sondergaard 2013) from fixed pseudo-random phases. Window k is centred on
    sample ``(k + 1) * hop - window / 2`` of the result, as in ``Framing.contexts``.
    """
    batch, steps, bins = magnitude_BKF.shape
    taper = framing.taper()
    shift = (
        framing.window // 2 - framing.hop
    )  # torch's first window is centred on its first sample, ours `shift` before
    extra = framing.overlap // framing.hop  # windows that overlap the end: silent, so that the end fades out
    target = magnitude_BKF.transpose(1, 2) * (taper.sum() / 2)
    target = torch.nn.functional.pad(target, (0, extra))
    length = shift + steps * framing.hop
    sizes = {"n_fft": framing.window, "hop_length": framing.hop, "window": taper, "center": True}
    noise = torch.rand(steps + extra, bins, generator=torch.Generator().manual_seed(0)).T
    estimate = target * torch.polar(torch.ones_like(noise), 2 * torch.pi * noise)
    previous = torch.zeros_like(estimate)
    for _ in range(iterations):
        wave = torch.istft(estimate, length=(steps + extra - 1) * framing.hop, **sizes)
        rebuilt = torch.stft(wave, pad_mode="constant", return_complex=True, **sizes)
        moved = rebuilt + momentum * (rebuilt - previous)
        previous = rebuilt
        estimate = target * moved / moved.abs().clamp(min=TINY)
    return torch.istft(estimate, length=length, **sizes)[:, shift:]


class StreamingPhases:
    """Magnitudes to sound frame by frame, without look-ahead.

    Real-time iterative spectrogram inversion (Beauregard, Zhu and Wyse 2005): a new window takes the phases of what is
    already sounding under it, then a few Griffin-Lim iterations settle the windows of one frame among themselves;
    what was emitted stays. Output trails the input by ``delay`` samples, for which windows are still open.
    """

    def __init__(self, *, framing: Framing, batch_size: int, iterations: int, delay: int) -> None:
        self.framing, self.iterations, self.delay = framing, iterations, delay
        self._taper = framing.taper()
        self._scale = self._taper.sum() / 2
        self._sum_BN = torch.zeros(batch_size, framing.overlap)  # overlap-added windows of the past that are still open
        self._emitted_BN = torch.zeros(batch_size, framing.overlap - delay)
        squares = self._taper.square()
        old = [
            squares[framing.hop * j : framing.hop * j + framing.overlap]
            for j in range(1, -(-framing.window // framing.hop))
        ]
        self._old_weight_N = sum(torch.nn.functional.pad(part, (0, framing.overlap - len(part))) for part in old)
        self._new_weights_JN = torch.stack([self._place(squares, j) for j in range(framing.hops)])
        self._dither_N = 1e-6 * torch.randn(framing.context, generator=torch.Generator().manual_seed(0))

    def _place(self, window: Tensor, j: int) -> Tensor:
        """``window`` ``[..., L]`` at its place j in a context ``[..., C]`` of zeros."""
        left = self.framing.hop * j
        return torch.nn.functional.pad(window, (left, self.framing.context - self.framing.window - left))

    def _estimate(self, new_BN: Tensor, *, windows: int) -> Tensor:
        """The sound of this context ``[B, C]`` for the new windows' overlap-add; what was emitted is fixed."""
        fresh = self.framing.context - self.framing.overlap
        total = torch.nn.functional.pad(self._sum_BN, (0, fresh)) + new_BN
        weight = torch.nn.functional.pad(self._old_weight_N, (0, fresh)) + self._new_weights_JN[:windows].sum(0)
        sound = total / weight.clamp(min=1e-3) + self._dither_N
        return torch.cat([self._emitted_BN, sound[:, self._emitted_BN.shape[1] :]], dim=1)

    def _windows(self, magnitude_BJF: Tensor, sound_BJL: Tensor) -> Tensor:
        """Synthesis windows ``[B, J, L]`` with these magnitudes and the phases of ``sound_BJL``."""
        spectrum = torch.fft.rfft(sound_BJL * self._taper)
        spectrum = magnitude_BJF * spectrum / spectrum.abs().clamp(min=TINY)
        return torch.fft.irfft(spectrum, n=self.framing.window) * self._taper

    def step(self, magnitude_BJF: Tensor) -> Tensor:
        """Magnitudes of one frame's windows ``[B, J, F]`` to the next ``[B, frame_size]`` samples."""
        framing, target = self.framing, magnitude_BJF * self._scale
        new = torch.zeros(len(target), framing.context)
        for j in range(framing.hops):
            sound = self._estimate(new, windows=j)[:, framing.hop * j : framing.hop * j + framing.window]
            new = new + self._place(self._windows(target[:, j], sound), j)
        for _ in range(self.iterations):
            sound = self._estimate(new, windows=framing.hops).unfold(-1, framing.window, framing.hop)
            parts = self._windows(target, sound)
            new = torch.stack([self._place(parts[:, j], j) for j in range(framing.hops)]).sum(0)
        sound = self._estimate(new, windows=framing.hops)
        start = framing.overlap - self.delay
        self._sum_BN = (torch.nn.functional.pad(self._sum_BN, (0, framing.frame_size)) + new)[:, framing.frame_size :]
        self._emitted_BN = sound[:, framing.frame_size : framing.frame_size + start]
        return sound[:, start : start + framing.frame_size]
