"""Voices that pip installs: spoken words with the true time of each word.

Two synthesizers stand behind `speak`: espeak-ng (its library and data come in the `espeakng-loader` wheel, called by
ctypes) and Open JTalk (`pyopenjtalk-plus`). Both work offline. espeak-ng speaks a string in one breath and reports
the sample at which each word begins. Open JTalk reports no times, so its words are synthesised one by one, cut to
where they sound, and joined.

espeak-ng keeps the phase of its oscillators from call to call: the same calls in the same order in a fresh process give
the same samples, but one call made twice may differ by a few samples. Shapes: N samples of a waveform.
"""

import contextlib
import ctypes
import functools
import io
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import espeakng_loader
import numpy as np
import soxr
from variants import DRAWN, drawn_variant, with_drawn_variants

SAMPLE_RATE = 16000  # Hz, of everything returned here
NORMAL_WORDS_PER_MINUTE = 160  # espeak-ng's rate at pace 1

_SILENCE_DB = -40.0  # a frame this far below the loudest of its word is silence
_HOP = SAMPLE_RATE // 200  # 5 ms, the resolution of word times
_MARGIN = SAMPLE_RATE // 100  # 10 ms kept, faded, around what sounds, so that a cut does not click


@dataclass(frozen=True)
class Voice:
    """Who speaks.

    Attributes:
        engine: "espeak" or "open_jtalk".
        name: espeak-ng's voice, with a variant after "+" (`en-us+f2`); the name of Open JTalk's voice is not read.
        tract: factor on all resonances, by resampling: 0.85 is a long vocal tract (a big body), 1.15 a short one.
        half_tone: pitch of Open JTalk's voice against its own, in semitones, whatever the tract.
        speed: of Open JTalk's voice, as if a recording of it ran faster: resonances, pitch and pace together.
    """

    engine: str
    name: str
    tract: float = 1.0
    half_tone: float = 0.0
    speed: float = 1.0

    @property
    def label(self) -> str:
        """The voice in a manifest, such as `en-us+f2`, `ja+m3*0.95`, `mei*0.86-7` or `mei*0.86-7@1.03`."""
        tract = "" if self.tract == 1.0 else f"*{self.tract:.2f}"
        half_tone = f"{self.half_tone:+g}" if self.half_tone else ""
        return self.name + tract + half_tone + ("" if self.speed == 1.0 else f"@{self.speed:.3f}")


@dataclass(frozen=True)
class Speech:
    """Sound and the times of its words.

    Attributes:
        samples: float32 `[N]` at `SAMPLE_RATE`, mono.
        times: (start, end) of each word in seconds: where its sound begins and ends.
    """

    samples: np.ndarray
    times: tuple[tuple[float, float], ...]


def speak(
    words: Sequence[str], *, voice: Voice, pace: float = 1.0, pitch: int = 50, gaps: Sequence[float] | None = None
) -> Speech:
    """Speak words.

    Args:
        words: what to say, each a word that the engine reads (Japanese in kana).
        voice: who says it.
        pace: 1 is normal, 1.25 faster by a quarter.
        pitch: espeak-ng's pitch, 0 to 99; Open JTalk takes its pitch from the voice.
        gaps: seconds of silence between neighbouring words, one less than words; none by default. A gap of zero from
            espeak-ng is continuous speech.

    Returns:
        The words, cut at the first and last sound with 10 ms around them.

    Raises:
        ValueError: no words, a wrong number of gaps, an unknown engine or voice.
    """
    gaps = [0.0] * (len(words) - 1) if gaps is None else list(gaps)
    if not words or len(gaps) != len(words) - 1:
        raise ValueError(
            f"gaps: {len(gaps)} for {len(words)} words; give at least one word, and one gap less than words"
        )
    if voice.engine == "espeak":
        return _espeak().speak(words, voice=voice, pace=pace, pitch=pitch, gaps=gaps)
    if voice.engine == "open_jtalk":
        return join([_open_jtalk_word(word, voice=voice, pace=pace) for word in words], gaps=gaps)
    raise ValueError(f"voice.engine: {voice.engine!r} is unknown; use 'espeak' or 'open_jtalk'")


def join(parts: Sequence[Speech], *, gaps: Sequence[float]) -> Speech:
    """Put pieces of speech one after the other, `gaps[i]` seconds between the sound of piece i and of piece i + 1."""
    starts, clock = [], 0.0
    for part, gap in zip(parts, [*gaps, 0.0], strict=True):
        starts.append(clock)
        clock += part.times[-1][1] - part.times[0][0] + gap
    return lay(parts, starts=[start + parts[0].times[0][0] for start in starts])


def lay(parts: Sequence[Speech], *, starts: Sequence[float]) -> Speech:
    """Place pieces of speech so that the first word of piece i sounds at `starts[i]` seconds; overlaps add."""
    offsets = [round((start - part.times[0][0]) * SAMPLE_RATE) for part, start in zip(parts, starts, strict=True)]
    first = min(0, *offsets)  # a margin may reach before the clock's zero; it is cut there
    total = max(offset + len(part.samples) for part, offset in zip(parts, offsets, strict=True))
    samples = np.zeros(total - first, dtype=np.float32)
    times = []
    for part, offset in zip(parts, offsets, strict=True):
        samples[offset - first : offset - first + len(part.samples)] += part.samples
        times += [(start + offset / SAMPLE_RATE, end + offset / SAMPLE_RATE) for start, end in part.times]
    return Speech(samples[-first:], tuple(times))


def sounding(samples: np.ndarray) -> tuple[int, int]:
    """First and one-past-last sample of what is louder than 40 dB below the loudest 5 ms of `samples` `[N]`."""
    num_frames = max(1, math.ceil(len(samples) / _HOP))
    frames = np.pad(samples, (0, num_frames * _HOP - len(samples))).reshape(num_frames, _HOP)
    power = np.square(frames, dtype=np.float64).mean(1)
    (loud,) = np.nonzero(power > max(power.max() * 10 ** (_SILENCE_DB / 10), 1e-12))
    return (int(loud[0]) * _HOP, min(int(loud[-1] + 1) * _HOP, len(samples))) if len(loud) else (0, len(samples))


def _cut(samples: np.ndarray, starts: Sequence[int]) -> Speech:
    """Word times from the samples at which words begin; each word ends where its own sound does."""
    spans = []
    for start, stop in zip(starts, [*starts[1:], len(samples)], strict=True):
        first, last = sounding(samples[start:stop])
        spans.append((start + first, start + last))
    begin, end = max(0, spans[0][0] - _MARGIN), min(len(samples), spans[-1][1] + _MARGIN)
    piece = samples[begin:end].astype(np.float32)
    if len(piece) > 2 * _MARGIN:
        fade = np.linspace(0.0, 1.0, _MARGIN, dtype=np.float32)
        piece[:_MARGIN] *= fade
        piece[-_MARGIN:] *= fade[::-1]
    return Speech(piece, tuple(((a - begin) / SAMPLE_RATE, (b - begin) / SAMPLE_RATE) for a, b in spans))


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


class _Espeak:
    """The library, of which a process has one."""

    def __init__(self) -> None:
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
        self._starts: list[int] = []
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
                self._starts.append(events[index].sample)
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

    def speak(self, words: Sequence[str], *, voice: Voice, pace: float, pitch: int, gaps: Sequence[float]) -> Speech:
        """As the function `speak`."""
        self._set_voice(voice.name)
        self._library.espeak_SetParameter(_RATE, round(NORMAL_WORDS_PER_MINUTE * pace / voice.tract), 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        breaks = [f'<break time="{round(gap * 1000)}ms"/>' if gap >= 0.01 else "" for gap in gaps]
        text = (
            " ".join(part for pair in zip(words, [*breaks, ""], strict=True) for part in pair if part).encode() + b"\0"
        )
        self._blocks, self._starts = [], []
        if self._library.espeak_Synth(text, len(text), 0, 1, 0, _UTF8 | _SSML, None, None) != 0:
            raise RuntimeError("espeak_Synth failed")
        self._library.espeak_Synchronize()
        if len(self._starts) != len(words):
            raise ValueError(
                f"words: espeak-ng reads {len(self._starts)} words in {words}; give words it reads one by one"
            )
        samples = np.concatenate(self._blocks).astype(np.float32) / 32768
        rate = self._rate * voice.tract  # read as if recorded at another rate: resonances and pitch move together
        return _cut(
            soxr.resample(samples, rate, SAMPLE_RATE), [round(start * SAMPLE_RATE / rate) for start in self._starts]
        )


@functools.cache
def _espeak() -> _Espeak:
    return _Espeak()


@functools.cache
def _open_jtalk() -> ModuleType:
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it lacks a model for kanji, which are not read here
        import pyopenjtalk  # here, because importing it reads a dictionary
    return pyopenjtalk


@functools.cache
def _open_jtalk_labels(word: str) -> tuple[str, ...]:
    return tuple(_open_jtalk().extract_fullcontext(word))


@functools.lru_cache(maxsize=4096)
def _open_jtalk_sound(word: str, *, own_pitch: float, pace: float) -> tuple[np.ndarray, int]:
    """Samples `[N]` and their rate; a voice speaks few words at few paces, so they are kept."""
    samples, rate = _open_jtalk().synthesize(list(_open_jtalk_labels(word)), pace, own_pitch)
    return (samples / 32768).astype(np.float32), rate


def _open_jtalk_word(word: str, *, voice: Voice, pace: float) -> Speech:
    """One word alone, cut to its sound."""
    own_pitch = voice.half_tone - 12 * math.log2(voice.tract)  # resampling will raise it back
    samples, rate = _open_jtalk_sound(word, own_pitch=own_pitch, pace=pace / voice.tract)
    return _cut(soxr.resample(samples, rate * voice.tract * voice.speed, SAMPLE_RATE), [0])
