"""Voices for espeak-ng drawn from a number: as many people as there are numbers.

A variant is a small text file that shapes a voice: factors on the pitch, on each formant's frequency, height and width
(per cent), tilt of the spectrum, echo, breath. The hundred that espeak-ng comes with are few people for a recogniser.
Format: docs/voices.md of espeak-ng.
"""

from pathlib import Path

import numpy as np

DRAWN = "drawn-"  # then a number, which says all


def drawn_variant(number: int) -> str:
    """The text of variant `drawn-NUMBER`: the same for the same number.

    Women and men by halves, long and short vocal tracts, each formant somewhat off on its own, now and then one far
    astray, as in the stranger ones of espeak-ng's own.
    """
    rng = np.random.default_rng([number, 7])
    u = rng.uniform
    female = rng.random() < 0.55
    tract = u(1.0, 1.3) if female else u(0.85, 1.1)
    pitch = u(130, 300) if female else u(70, 140)
    lines = ["language variant", f"name {DRAWN}{number}", f"pitch {pitch:.0f} {pitch * u(1.15, 1.6):.0f}"]
    lines += _formants(rng, tract=tract)
    if rng.random() < 0.3:
        lines.append(f"klatt {rng.integers(1, 7)}")
    if rng.random() < 0.6:
        lines.append("tone " + _tilt(rng))
    lines.append(f"consonants {u(30, 125):.0f} {u(40, 125):.0f}")
    lines.append(f"voicing {u(30, 200):.0f}")
    lines.append(f"flutter {u(0, 10):.0f}")
    lines.append(f"roughness {u(0, 4):.0f}")
    if rng.random() < 0.4:
        lines.append(f"echo {u(10, 160):.0f} {u(5, 45):.0f}")
    if rng.random() < 0.25:
        lines.append("breath " + " ".join(f"{level:.0f}" for level in u(0, 5, 8)))
    if rng.random() < 0.3:
        lines.append(f"intonation {rng.integers(1, 5)}")
    for key, low, high in (("stressAmp", 12, 30), ("stressAdd", -30, 160), ("stressLength", 0, 280)):
        if rng.random() < 0.25:
            lines.append(f"{key} " + " ".join(f"{value:.0f}" for value in u(low, high, 8)))
    return "\n".join(lines) + "\n"


def _tilt(rng: np.random.Generator) -> str:
    """Level (0 to 255) at five frequencies, falling by up to 7 dB an octave and uneven by some dB."""
    hertz = np.array([100, 600, 1200, 2000, 3000])
    decibels = -rng.uniform(0, 7) * np.log2(hertz / 100) + rng.normal(0, 3, 5)
    levels = np.clip(255 * 10 ** (np.minimum(decibels, 0) / 20), 8, 255)
    return " ".join(f"{frequency} {level:.0f}" for frequency, level in zip(hertz, levels, strict=True))


def _formants(rng: np.random.Generator, *, tract: float) -> list[str]:
    """Frequency, height and width of formants 0 (the voice bar) to 8, per cent of espeak-ng's own."""
    lines, weak_top = [], rng.random() < 0.3
    for formant in range(9):
        if formant == 0:
            frequency, height = rng.uniform(0.9, 1.1), rng.uniform(60, 140)
        elif formant <= 3:  # these make the vowels
            frequency, height = tract * np.exp(rng.normal(0, 0.1)), rng.uniform(60 - 7 * formant, 130)
        else:
            frequency, height = tract * rng.uniform(0.85, 1.1), rng.uniform(0, 50) if weak_top else rng.uniform(40, 125)
            if rng.random() < 0.2:
                frequency, height = rng.uniform(0.05, 0.7), rng.uniform(20, 90)
        lines.append(f"formant {formant} {100 * frequency:.0f} {height:.0f} {rng.uniform(65, 165):.0f}")
    return lines


def with_drawn_variants(data: Path, folder: Path) -> Path:
    """espeak-ng's data directory by links in the empty `folder`, where variants can be added to `voices/!v`."""
    (folder / "voices" / "!v").mkdir(parents=True)
    for path in (*data.iterdir(), *(data / "voices").iterdir(), *(data / "voices" / "!v").iterdir()):
        link = folder / path.relative_to(data)
        if not link.exists():
            link.symlink_to(path)
    return folder
