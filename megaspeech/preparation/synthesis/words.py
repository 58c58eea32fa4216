"""Speech from words or from text, by whichever engine a voice belongs to. Shapes: N samples of a waveform."""

from __future__ import annotations

from collections.abc import Sequence

from megaspeech.preparation.synthesis import open_jtalk
from megaspeech.preparation.synthesis.espeak import espeak
from megaspeech.preparation.synthesis.speech import Speech, Voice


def speak(
    words: Sequence[str],
    *,
    voice: Voice,
    sample_rate: int,
    pace: float = 1.0,
    pitch: int = 50,
    gaps: Sequence[float] | None = None,
) -> Speech:
    """Speak words. espeak-ng does it in one breath; Open JTalk's are made one by one and joined.

    Args:
        words: what to say, each a word that the engine reads (espeak-ng's Japanese in kana).
        voice: who says it.
        sample_rate: Hz, of the result.
        pace: 1 is normal, 1.25 faster by a quarter.
        pitch: espeak-ng's pitch, 0 to 99; Open JTalk takes its pitch from the voice.
        gaps: seconds of silence between neighbouring words, one less than words; none by default. A gap of zero from
            espeak-ng is continuous speech.

    Returns:
        The words, cut at the first and last sound with 10 ms around them.

    Raises:
        ImportError: the engine is not installed.
        ValueError: no words, a wrong number of gaps, an unknown engine or voice.
    """
    gaps = [0.0] * (len(words) - 1) if gaps is None else list(gaps)
    if not words or len(gaps) != len(words) - 1:
        raise ValueError(
            f"gaps: {len(gaps)} for {len(words)} words; give at least one word, and one gap less than words"
        )
    if _engine(voice) == "espeak":
        return espeak().speak(words, voice=voice, pace=pace, pitch=pitch, gaps=gaps, sample_rate=sample_rate)
    return open_jtalk.speak(words, voice=voice, pace=pace, gaps=gaps, sample_rate=sample_rate)


def read_aloud(
    text: str, *, voice: Voice, sample_rate: int, pace: float = 1.0, pitch: int = 50
) -> tuple[Speech, tuple[str, ...]]:
    """Read text as people write it, with numbers, abbreviations and punctuation.

    Args:
        text: one utterance. Japanese is for Open JTalk's voices.
        voice, sample_rate, pace, pitch: as for `speak`.

    Returns:
        (speech, its words): the words are the text, and speech has a time for each. In Japanese they are phrases.

    Raises:
        ImportError: the engine is not installed.
        ValueError: a character that the engine does not read, nothing that sounds, an unknown engine or voice.
    """
    if _engine(voice) == "espeak":
        return espeak().read_aloud(text, voice=voice, pace=pace, pitch=pitch, sample_rate=sample_rate)
    return open_jtalk.read_aloud(text, voice=voice, pace=pace, sample_rate=sample_rate)


def _engine(voice: Voice) -> str:
    if voice.engine not in ("espeak", "open_jtalk"):
        raise ValueError(f"voice.engine: {voice.engine!r} is unknown; use 'espeak' or 'open_jtalk'")
    return voice.engine
