"""Open JTalk, by pyopenjtalk-plus: Japanese as people write it, or words one by one.

The times of words in running text are the engine's own: the durations of its phonemes, which its library tells when it
is asked for the states of a sentence without their sound. Shapes: N samples of a waveform.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import math
import unicodedata
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from megaspeech.preparation.synthesis.speech import Speech, Voice, cut, cut_at, join

_SILENT = {"sil", "pau", "sp", "unk"}  # phonemes
_LOUDEST = 4.0  # of full scale; its filter can run away on odd text
_POINTS = ".,．，"  # within a number
_ENGINE_BYTES = 1 << 16  # more than an HTS_Engine holds


def speak(words: Sequence[str], *, voice: Voice, pace: float, gaps: Sequence[float], sample_rate: int) -> Speech:
    """As `synthesis.words.speak`: each word alone, cut to its sound, and joined."""
    parts = [_word(word, voice=voice, pace=pace, sample_rate=sample_rate) for word in words]
    return join(parts, gaps=gaps)


def read_aloud(text: str, *, voice: Voice, pace: float, sample_rate: int) -> tuple[Speech, tuple[str, ...]]:
    """As `synthesis.words.read_aloud`; the words are accent phrases, with the punctuation that follows them."""
    morphemes = _jtalk().g2p_mapping(text)
    for one in morphemes:
        # A dash that it does not know is no loss; a letter or a picture is.
        if "unk" in one["phonemes"] and not all(unicodedata.category(sign)[0] in "PZ" for sign in one["surface"]):
            raise ValueError(f"Open JTalk does not read {one['surface']!r}")
    words, lengths = _phrases(text, morphemes)
    if not sum(lengths):
        raise ValueError("nothing in it sounds")
    labels = _jtalk().extract_fullcontext(text)
    sound, rate = _sound(tuple(labels), voice=voice, pace=pace)
    phonemes = [label.split("-", 1)[1].split("+", 1)[0] for label in labels]
    durations = _durations(labels, speed=pace / voice.tract)
    edges = np.concatenate([[0], np.cumsum(durations)])
    spoken = [index for index, phoneme in enumerate(phonemes) if phoneme not in _SILENT]
    if len(spoken) != sum(lengths):  # what is read and what is mapped differ: the text as one phrase
        words, lengths = (" ".join(text.split()),), [len(spoken)]
    ends = np.cumsum(lengths)
    factor = sample_rate / (rate * voice.tract * voice.speed)
    spans = [
        (round(edges[spoken[end - length]] * factor), round(edges[spoken[end - 1] + 1] * factor))
        for length, end in zip(lengths, ends, strict=True)
    ]
    samples = _resampled(sound, voice=voice, rate=rate, sample_rate=sample_rate)
    return cut_at(samples, spans, sample_rate=sample_rate), tuple(words)


def _phrases(text: str, morphemes: Sequence[dict]) -> tuple[tuple[str, ...], list[int]]:
    """Accent phrases as they are written, without the spaces between them, and how many phonemes each has.

    Open JTalk chains the words of a phrase. A number is one phrase, whose digits are not its spoken words one by one.
    Punctuation belongs to the phrase before it, opening brackets to the one after.
    """
    written, lengths, opening, was_number = [""], [0], "", False
    for one in morphemes:
        piece = text[slice(*one["char_span"])]
        length = sum(phoneme not in _SILENT for phoneme in one["phonemes"])
        is_number = one["pos_group1"] == "数" or (was_number and piece in _POINTS)
        if not length and piece and unicodedata.category(piece[0]) in ("Ps", "Pi"):
            opening += piece
            continue
        goes_on = one["chain_flag"] == 1 or (was_number and is_number)
        if length and piece.strip() and not goes_on and lengths[-1]:
            written.append("")
            lengths.append(0)
        written[-1] += opening + piece
        lengths[-1] += length
        opening, was_number = "", is_number
    written[-1] += opening
    if "".join("".join(written).split()) != "".join(text.split()):  # a spelling that it has changed
        return (" ".join(text.split()),), [sum(lengths)]
    return tuple(" ".join(phrase.split()) for phrase in written), lengths


@functools.cache
def _jtalk() -> ModuleType:
    with contextlib.redirect_stdout(io.StringIO()):  # it says which optional models it lacks
        try:
            import pyopenjtalk  # here, because importing it reads a dictionary
        except ImportError as error:
            raise ImportError(
                f"Japanese speech needs pyopenjtalk-plus ({error}): pip install megaspeech[synthesis]"
            ) from None
    return pyopenjtalk


@functools.cache
def _engine() -> tuple[ctypes.CDLL, int]:
    """The HTS engine's library, which pyopenjtalk carries, and an engine of our own in it that is asked for times."""
    from pyopenjtalk import DEFAULT_HTS_VOICE, htsengine

    library = ctypes.CDLL(htsengine.__file__)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double
    for name, result, arguments in (
        ("initialize", None, [address]),
        ("load", ctypes.c_bool, [address, address, size]),
        ("set_speed", None, [address, number]),
        ("generate_state_sequence_from_strings", ctypes.c_bool, [address, address, size]),
        ("get_state_duration", size, [address, size]),
        ("get_total_state", size, [address]),
        ("get_nstate", size, [address]),
        ("get_fperiod", size, [address]),
        ("refresh", None, [address]),
    ):
        function = getattr(library, f"HTS_Engine_{name}")
        function.restype, function.argtypes = result, arguments
    _engine.memory = ctypes.create_string_buffer(_ENGINE_BYTES)  # kept as long as the engine
    engine = ctypes.addressof(_engine.memory)
    library.HTS_Engine_initialize(engine)
    voices = (ctypes.c_char_p * 1)(DEFAULT_HTS_VOICE)
    if not library.HTS_Engine_load(engine, voices, 1):
        raise ValueError(f"Open JTalk's voice {DEFAULT_HTS_VOICE!r} could not be read; reinstall pyopenjtalk-plus")
    return library, engine


def _durations(labels: Sequence[str], *, speed: float) -> np.ndarray:
    """Samples of each label's phoneme, at the engine's rate."""
    library, engine = _engine()
    lines = (ctypes.c_char_p * len(labels))(*(label.encode() for label in labels))
    library.HTS_Engine_set_speed(engine, speed)
    if not library.HTS_Engine_generate_state_sequence_from_strings(engine, lines, len(labels)):
        raise ValueError("Open JTalk finds no durations for it")
    states = [
        library.HTS_Engine_get_state_duration(engine, i) for i in range(library.HTS_Engine_get_total_state(engine))
    ]
    samples = np.array(states).reshape(len(labels), library.HTS_Engine_get_nstate(engine)).sum(1)
    library.HTS_Engine_refresh(engine)
    return samples * library.HTS_Engine_get_fperiod(engine)


def _sound(labels: tuple[str, ...], *, voice: Voice, pace: float) -> tuple[np.ndarray, int]:
    """Samples float32 `[N]` and their rate."""
    own_pitch = voice.half_tone - 12 * math.log2(voice.tract)  # resampling will raise it back
    samples, rate = _jtalk().synthesize(list(labels), pace / voice.tract, own_pitch)
    samples = samples / 32768
    if not np.abs(samples).max(initial=0.0) < _LOUDEST:  # which NaN is not, either
        raise ValueError("Open JTalk makes a sound without bounds of it")
    return samples.astype(np.float32), rate


def _resampled(samples: np.ndarray, *, voice: Voice, rate: int, sample_rate: int) -> np.ndarray:
    import soxr

    return soxr.resample(samples, rate * voice.tract * voice.speed, sample_rate)


@functools.cache
def _word_labels(word: str) -> tuple[str, ...]:
    return tuple(_jtalk().extract_fullcontext(word))


@functools.lru_cache(maxsize=4096)
def _word_sound(word: str, *, tract: float, half_tone: float, pace: float) -> tuple[np.ndarray, int]:
    """A voice speaks few words at few paces, so they are kept; its speed does not matter here."""
    return _sound(_word_labels(word), voice=Voice("open_jtalk", "", tract, half_tone), pace=pace)


def _word(word: str, *, voice: Voice, pace: float, sample_rate: int) -> Speech:
    """One word alone, cut to its sound."""
    samples, rate = _word_sound(word, tract=voice.tract, half_tone=voice.half_tone, pace=pace)
    return cut(_resampled(samples, voice=voice, rate=rate, sample_rate=sample_rate), [0], sample_rate=sample_rate)
