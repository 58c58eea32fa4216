"""espeak-ng, called by ctypes: words one by one or text as it stands, with the times at which it says words begin.

The `espeakng-loader` wheel carries its library and data. It keeps the phase of its oscillators from call to call: the
same calls in the same order in a fresh process give the same samples, but one call made twice may differ by a few.
Shapes: N samples of a waveform.
"""

from __future__ import annotations

import ctypes
import functools
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaspeech.preparation.synthesis.speech import Speech, Voice, cut, cut_at, sounding
from megaspeech.preparation.synthesis.variants import DRAWN, drawn_variant, with_drawn_variants

NORMAL_WORDS_PER_MINUTE = 160  # at pace 1


class _VoiceStruct(ctypes.Structure):
    """`espeak_VOICE` of speak_lib.h, as far as it is set here."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("numbers", ctypes.c_ubyte * 4),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    ]


class _Event(ctypes.Structure):
    """`espeak_EVENT` of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_SYNCHRONOUS, _DONT_EXIT = 2, 1 << 15  # espeak_Initialize: audio by callback within the call; errors are returned
_UTF8, _SSML = 1, 0x10  # espeak_Synth
_RATE, _VOLUME, _PITCH = 1, 2, 3  # espeak_SetParameter
_LIST_END, _WORD = 0, 1  # espeak_EVENT_TYPE
_HALF_VOLUME = 50  # of 100: at full volume some variants clip


class Espeak:
    """The library, of which a process has one: `espeak()`."""

    def __init__(self) -> None:
        espeakng_loader = _import_loader()
        # Its data by links in a folder of ours: a short path (it keeps 160 characters) where variants can be added.
        self._folder = tempfile.TemporaryDirectory(prefix="espeak-")
        data = with_drawn_variants(Path(espeakng_loader.get_data_path()), Path(self._folder.name))
        self._library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), _DONT_EXIT)
        if self._rate <= 0:
            source = espeakng_loader.get_data_path()
            raise ValueError(f"espeak-ng data at {source}: could not be read; reinstall espeakng-loader")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of breath; otherwise the clock seeds it
        self._variants = data / "voices" / "!v"
        self._blocks: list[np.ndarray] = []
        self._words: list[tuple[int, int]] = []
        self._callback = _CALLBACK(self._receive)  # kept, or it is collected while the library still calls it
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p),
        ]
        self._library.espeak_GetCurrentVoice.restype = ctypes.POINTER(_VoiceStruct)
        self._library.espeak_SetParameter(_VOLUME, _HALF_VOLUME, 0)
        self._voice = ""

    def _receive(self, block, num_samples: int, events) -> int:
        if block and num_samples > 0:
            self._blocks.append(np.ctypeslib.as_array(block, (num_samples,)).copy())
        index = 0
        while events[index].type != _LIST_END:
            if events[index].type == _WORD:
                self._words.append((events[index].text_position - 1, events[index].sample))
            index += 1
        return 0

    def _set_voice(self, name: str) -> None:
        if name == self._voice:
            return
        base, _, variant = name.partition("+")
        if variant.startswith(DRAWN):
            (self._variants / variant).write_text(drawn_variant(int(variant.removeprefix(DRAWN))))
        # espeak-ng says nothing about a variant it does not have, and speaks without it.
        found = not variant or (self._variants / variant).is_file()
        found = (
            found and self._library.espeak_SetVoiceByProperties(ctypes.byref(_VoiceStruct(None, base.encode()))) == 0
        )
        if found and variant:  # a variant is added to the voice's file name, not to its language code
            identifier = self._library.espeak_GetCurrentVoice().contents.identifier.decode()
            found = self._library.espeak_SetVoiceByName(f"{identifier}+{variant}".encode()) == 0
        if not found:
            raise ValueError(f"voice: espeak-ng has none called {name!r}; `espeak-ng --voices` lists what it has")
        self._voice = name

    def speak(
        self, words: Sequence[str], *, voice: Voice, pace: float, pitch: int, gaps: Sequence[float], sample_rate: int
    ) -> Speech:
        """As `synthesis.words.speak`."""
        breaks = [f'<break time="{round(gap * 1000)}ms"/>' if gap >= 0.01 else "" for gap in gaps]
        text = " ".join(part for pair in zip(words, [*breaks, ""], strict=True) for part in pair if part)
        samples, begun = self._say(
            text, voice=voice, pace=pace, pitch=pitch, flags=_UTF8 | _SSML, sample_rate=sample_rate
        )
        if len(begun) != len(words):
            raise ValueError(f"words: espeak-ng reads {len(begun)} words in {words}; give words it reads one by one")
        return cut(samples, [start for _, start in begun], sample_rate=sample_rate)

    def read_aloud(
        self, text: str, *, voice: Voice, pace: float, pitch: int, sample_rate: int
    ) -> tuple[Speech, tuple[str, ...]]:
        """As `synthesis.words.read_aloud`; the words are what spaces separate."""
        strange = next((one for one in text if one.isalpha() and "LATIN" not in unicodedata.name(one, "")), None)
        if strange:
            raise ValueError(f"espeak-ng does not read {strange!r} in this language")
        samples, begun = self._say(text, voice=voice, pace=pace, pitch=pitch, flags=_UTF8, sample_rate=sample_rate)
        if not begun or not samples.any():
            raise ValueError("nothing in it sounds")
        words = list(re.finditer(r"\S+", text))
        starts = _starts(words, begun=begun)
        spans = _spans(samples, starts, sample_rate=sample_rate)
        return cut_at(samples, spans, sample_rate=sample_rate), tuple(match.group() for match in words)

    def _say(
        self, text: str, *, voice: Voice, pace: float, pitch: int, flags: int, sample_rate: int
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Samples float32 `[N]`, and of what it takes for words (character in the text, sample it begins at)."""
        import soxr

        self._set_voice(voice.name)
        self._library.espeak_SetParameter(_RATE, round(NORMAL_WORDS_PER_MINUTE * pace / voice.tract), 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        encoded = text.encode() + b"\0"
        self._blocks, self._words = [], []
        if self._library.espeak_Synth(encoded, len(encoded), 0, 1, 0, flags, None, None) != 0:
            raise RuntimeError("espeak_Synth failed")
        self._library.espeak_Synchronize()
        samples = np.concatenate([np.zeros(0, np.int16), *self._blocks]).astype(np.float32) / 32768
        rate = self._rate * voice.tract  # read as if recorded at another rate: resonances and pitch move together
        begun = [(character, round(start * sample_rate / rate)) for character, start in self._words]
        return soxr.resample(samples, rate, sample_rate), begun


def _starts(words: Sequence[re.Match], *, begun: Sequence[tuple[int, int]]) -> list[int | None]:
    """The sample at which each word begins: that of the first thing espeak-ng makes of it ("3,000" is three words).

    None for one of which it makes nothing, such as a dash.
    """
    starts = [min((start for at, start in begun if one.start() <= at < one.end()), default=None) for one in words]
    for index in range(len(words) - 1):
        # It counts a word from the punctuation that stands alone before it, if from no letter of the word's own.
        if starts[index + 1] is None and not any(map(str.isalnum, words[index].group())):
            starts[index], starts[index + 1] = None, starts[index]
    return starts


def _spans(samples: np.ndarray, starts: Sequence[int | None], *, sample_rate: int) -> list[tuple[int, int]]:
    """(start, end) of each word in samples: it ends where its sound does. What does not sound takes no time, after the
    word before it."""
    known = [start for start in starts if start is not None]
    spans, end, count = [], known[0], 0
    for start in starts:
        begin = end
        if start is not None:
            count += 1
            stop = known[count] if count < len(known) else len(samples)
            first, last = sounding(samples[start:stop], sample_rate=sample_rate)
            begin, end = max(end, start + first), max(end, start + last)
        spans.append((begin, end))
    return spans


@functools.cache
def espeak() -> Espeak:
    """This process's espeak-ng.

    Raises:
        ImportError: espeakng-loader is not installed.
    """
    return Espeak()


def has_voice(name: str) -> bool:
    """Whether espeak-ng has a voice such as `en-us+f2`; a drawn variant it has always."""
    data = Path(_import_loader().get_data_path())
    base, _, variant = name.partition("+")
    files = [
        file.read_text(encoding="utf-8", errors="replace") for file in (data / "lang").rglob("*") if file.is_file()
    ]
    languages = {code.lower() for file in files for code in re.findall(r"^language\s+(\S+)", file, re.MULTILINE)}
    is_variant = not variant or variant.startswith(DRAWN) or (data / "voices" / "!v" / variant).is_file()
    return base in languages and is_variant


def _import_loader() -> Any:
    try:
        import espeakng_loader
        import soxr  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"speech by espeak-ng needs espeakng-loader and soxr ({error}): pip install megaspeech[synthesis]"
        ) from None
    return espeakng_loader
