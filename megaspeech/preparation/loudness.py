"""Recordings brought to one level: ITU-R BS.1770 loudness by pyloudnorm, as loud as goes without clipping."""

from __future__ import annotations

import warnings

import numpy as np

PEAK = 0.99
"""Of full scale; a gain that would lift the highest sample above it is lowered."""
BLOCK = 0.4  # seconds, of BS.1770's measure


class Loudness:
    """Brings waveforms at `rate` Hz to `level` LUFS.

    Raises:
        ImportError: pyloudnorm is not installed; says how to.
    """

    def __init__(self, level: float, *, rate: int) -> None:
        try:
            import pyloudnorm
        except ImportError as error:
            raise ImportError(
                f"preparation.loudness needs pyloudnorm ({error}): pip install megaspeech[data]"
            ) from None
        self.level, self._least = level, int(BLOCK * rate) + 1
        self._meter = pyloudnorm.Meter(rate, block_size=BLOCK)

    def measure(self, waveform_N: np.ndarray) -> float:
        """LUFS of a mono waveform `[N]`; minus infinity where all of it is below the measure's gate of -70."""
        if len(waveform_N) < self._least:  # shorter than one block: as loud as it is over and over again
            waveform_N = np.resize(waveform_N, self._least)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of silence, whose loudness is the logarithm of nothing
            return float(self._meter.integrated_loudness(waveform_N.astype(np.float64)))

    def apply(self, waveform_N: np.ndarray) -> np.ndarray:
        """The waveform with one gain `[N]` float32; what has no loudness stays as it is."""
        measured, peak = self.measure(waveform_N), float(np.abs(waveform_N).max(initial=0.0))
        if not np.isfinite(measured) or peak == 0:
            return waveform_N
        return waveform_N * np.float32(min(10 ** ((self.level - measured) / 20), PEAK / peak))
