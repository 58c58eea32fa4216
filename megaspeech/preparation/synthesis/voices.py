"""Who speaks: as many drawn people as are asked for, or those who are named."""

from __future__ import annotations

import numpy as np

from megaspeech.preparation.synthesis.espeak import has_voice
from megaspeech.preparation.synthesis.speech import Voice, voice_called
from megaspeech.preparation.synthesis.variants import DRAWN

LANGUAGES = {"en": "espeak", "ja": "open_jtalk"}
"""Those that can be spoken, and by which engine: espeak-ng's own Japanese reads kana only."""
_ACCENTS = ("en-us", "en-us", "en-gb", "en-gb", "en-us-nyc", "en-gb-x-rp", "en-gb-scotland", "en-029")


def draw_voices(language: str, count: int, *, seed: int) -> list[Voice]:
    """People of all sizes: the first ones stay who they are when more are asked for."""
    draw = {"en": _english, "ja": _japanese}[language]
    return [draw(np.random.default_rng([seed, number])) for number in range(count)]


def _english(rng: np.random.Generator) -> Voice:
    return Voice("espeak", f"{rng.choice(_ACCENTS)}+{DRAWN}{rng.integers(1_000_000):06d}")


def _japanese(rng: np.random.Generator) -> Voice:
    """Open JTalk's one voice with another body: a longer tract goes with a lower voice, more or less."""
    tract = round(float(rng.uniform(0.8, 1.12)), 2)
    half_tone = np.clip(round(40 * (tract - 0.96) + rng.uniform(-5, 5)), -12, 7)
    return Voice("open_jtalk", "mei", tract, float(half_tone), round(float(rng.uniform(0.94, 1.06)), 3))


def voices_for(language: str, asked: str, *, seed: int) -> dict[str, list[Voice]]:
    """The voices of each language that has any.

    Args:
        language: the one that must have some.
        asked: how many of each language are drawn, or the labels of voices, separated by commas.
        seed: of what is drawn.

    Raises:
        ValueError: a number that is not positive, a label that names no voice, none for `language`.
    """
    if asked.lstrip("-").isdigit():
        if int(asked) < 1:
            raise ValueError(f"voices: {asked}; give 1 or more, or names such as en-us+f2,mei*0.86-7")
        return {one: draw_voices(one, int(asked), seed=seed) for one in LANGUAGES}
    named = [voice_called(label.strip()) for label in asked.split(",")]
    for voice in named:
        if voice.engine == "espeak" and not has_voice(voice.name):
            raise ValueError(f"voices: espeak-ng has no {voice.name!r}; `espeak-ng --voices` lists what it has")
    voices = {one: [voice for voice in named if voice.engine == engine] for one, engine in LANGUAGES.items()}
    if not voices[language]:
        engine, example = ("Open JTalk", "mei*0.86-7") if language == "ja" else ("espeak-ng", "en-us+f2")
        raise ValueError(f"voices: {asked!r} names none of {engine}, for {language!r}; name one such as {example}")
    return {one: found for one, found in voices.items() if found}
