"""How near a codec's sound is to what went in, and how much of its codebooks it uses.

Waveforms are compared at the rate of the recording, so that what a codec of a lower rate cannot carry counts as lost.
Shapes: N samples, Q codebooks, K entries of a codebook, T frames, M mel bands, F frequency bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megaspeech.codecs.spectrogram import mel_weights

NUM_MELS = 80
WINDOW_SECONDS = 0.032
FLOOR = 1e-4  # magnitude of a sine of -80 dB below full scale
BAND_EDGES_HZ = (0, 500, 1000, 2000, 3000, 4000, 6000, 8000, 10000, 12000, 16000, 20000, 24000)
WIDEBAND_HZ = 16000  # the rate that wideband PESQ is defined for

WHAT = {
    "mel": f"mean difference of the natural logarithms of {NUM_MELS} mel magnitudes up to Nyquist, windows of "
    f"{1000 * WINDOW_SECONDS:.0f} ms, floor -80 dB; 0 is best",
    "SI-SDR": "scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019): of waveforms, so it is low for "
    "codecs that make phases of their own (spectral, wavtokenizer)",
    "STOI": "short-time objective intelligibility (Taal et al. 2011; pystoi), 0 to 1",
    "PESQ": "wideband PESQ (ITU-T P.862.2; the pesq package), 1.04 to 4.64",
    "by band": "log-spectral distance in dB (root mean square over windows and bins) by band of frequency",
}


@dataclass(frozen=True)
class Quality:
    """Of one recording, or means over some. `None`: the package is not installed, or it found nothing to judge.

    `band_db` is by the upper edge of a band, in Hz.
    """

    mel: float
    si_sdr_db: float
    stoi: float | None
    pesq: float | None
    band_db: dict[int, float]


def judge(reference_N: np.ndarray, heard_N: np.ndarray, *, sample_rate: int) -> Quality:
    """What a codec made of a recording, both float32 `[N]` at the recording's rate."""
    windows = [_magnitudes(torch.from_numpy(wave).double(), sample_rate=sample_rate) for wave in (reference_N, heard_N)]
    return Quality(
        mel=_mel_distance(*windows, sample_rate=sample_rate),
        si_sdr_db=si_sdr(reference_N, heard_N),
        stoi=_stoi(reference_N, heard_N, sample_rate=sample_rate),
        pesq=_pesq(reference_N, heard_N, sample_rate=sample_rate),
        band_db=_by_band(*windows, sample_rate=sample_rate),
    )


def mean(found: list[Quality]) -> Quality:
    """The mean over recordings, of each figure over those that have it."""
    edges = sorted({edge for one in found for edge in one.band_db})
    return Quality(
        mel=_mean([one.mel for one in found]),
        si_sdr_db=_mean([one.si_sdr_db for one in found]),
        stoi=_mean([one.stoi for one in found]),
        pesq=_mean([one.pesq for one in found]),
        band_db={edge: _mean([one.band_db.get(edge) for one in found]) for edge in edges},
    )


def _mean(figures: list[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) / len(known) if known else None


def si_sdr(reference_N: np.ndarray, heard_N: np.ndarray) -> float:
    """10 log10 of the power along the reference over that of the rest, means removed; Le Roux et al. 2019, eq. 3."""
    reference, heard = (wave.astype(np.float64) - wave.mean() for wave in (reference_N, heard_N))
    along = reference * (heard @ reference) / max(reference @ reference, np.finfo(np.float64).tiny)
    rest = heard - along
    return 10 * math.log10((along @ along + 1e-20) / (rest @ rest + 1e-20))


def _magnitudes(wave_N: Tensor, *, sample_rate: int) -> Tensor:
    """Magnitudes `[T, F]`; a sine of full scale is 1."""
    size = round(WINDOW_SECONDS * sample_rate / 2) * 2
    taper = torch.hann_window(size, dtype=wave_N.dtype)
    padded = torch.nn.functional.pad(wave_N, (size // 2, size // 2))
    spectra = torch.stft(padded, size, hop_length=size // 4, window=taper, center=False, return_complex=True)
    return spectra.abs().T * (2 / taper.sum())


def _mel_distance(reference_TF: Tensor, heard_TF: Tensor, *, sample_rate: int) -> float:
    size = 2 * (reference_TF.shape[1] - 1)
    mel_FM = mel_weights(num_mels=NUM_MELS, window=size, sample_rate=sample_rate).T
    logs = [(spectra @ mel_FM).clamp(min=FLOOR).log() for spectra in (reference_TF, heard_TF)]
    return (logs[0] - logs[1]).abs().mean().item()


def _by_band(reference_TF: Tensor, heard_TF: Tensor, *, sample_rate: int) -> dict[int, float]:
    """Log-spectral distance (Gray and Markel 1976) by the upper edge of a band; the last band ends at Nyquist."""
    decibels = [20 * spectra.clamp(min=FLOOR).log10() for spectra in (reference_TF, heard_TF)]
    squares_TF = (decibels[0] - decibels[1]).square()
    hertz_F = torch.linspace(0, sample_rate / 2, squares_TF.shape[1])
    found = {}
    for low, high in zip(BAND_EDGES_HZ, BAND_EDGES_HZ[1:], strict=False):
        inside_F = (hertz_F >= low) & (hertz_F < high)
        if low < sample_rate / 2 and inside_F.any():
            found[high] = squares_TF[:, inside_F].mean().sqrt().item()
    return found


def _stoi(reference_N: np.ndarray, heard_N: np.ndarray, *, sample_rate: int) -> float | None:
    try:
        from pystoi import stoi
    except ImportError:
        return None
    if not reference_N.any():
        return None
    return float(stoi(reference_N, heard_N, sample_rate))


def _pesq(reference_N: np.ndarray, heard_N: np.ndarray, *, sample_rate: int) -> float | None:
    try:
        from pesq import PesqError, pesq
    except ImportError:
        return None
    if not reference_N.any() or not heard_N.any():
        return None
    waves = [resample(wave, rate=sample_rate, to=WIDEBAND_HZ) for wave in (reference_N, heard_N)]
    try:
        return float(pesq(WIDEBAND_HZ, *waves, "wb"))
    except (PesqError, ValueError):  # no speech in it, or too short
        return None


def resample(wave_N: np.ndarray, *, rate: int, to: int) -> np.ndarray:
    """A waveform at another rate, by soxr.

    Raises:
        ImportError: soxr is not installed; says how to.
    """
    if rate == to:
        return wave_N
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"comparing codecs needs soxr ({error}): pip install megaspeech[codecs]") from None
    return soxr.resample(wave_N, rate, to).astype(np.float32)


@dataclass(frozen=True)
class Use:
    """Of each codebook over all that was encoded: share of the entries that came up, entropy of a code in bits."""

    share: list[float]
    entropy_bits: list[float]


def codebook_use(counts_QK: Tensor) -> Use:
    """From how often each entry came up; entropy (Shannon 1948) of the shares `[Q, K]`."""
    shares_QK = counts_QK / counts_QK.sum(1, keepdim=True).clamp(min=1)
    entropy_Q = torch.special.entr(shares_QK).sum(1) / math.log(2)
    return Use(share=(counts_QK > 0).double().mean(1).tolist(), entropy_bits=entropy_Q.tolist())
