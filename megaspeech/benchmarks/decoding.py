"""Hours of audio that one second of CPU time takes from file to waveform, and to codes, by format and by decoder.

CPU time is that of all threads and of child processes, user and system: how many threads a decoder has does not matter,
and other work on the machine matters less than it does to the clock. Shapes: N samples, C channels.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import numpy as np

from megaspeech.benchmarks.decoders import PROVIDERS, Decode, Provider, our_decoder
from megaspeech.codecs.protocol import Codec
from megaspeech.codecs.spectral import SpectralCodec, SpectralConfig
from megaspeech.config.preparation import PreparationSection
from megaspeech.preparation.encoding import Window, decoded_windows, encode_window
from megaspeech.preparation.reading_ahead import ahead
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.synthesis.voices import draw_voices
from megaspeech.preparation.synthesis.words import read_aloud
from megaspeech.preparation.timeline import Timeline

SAMPLE_RATE = 24_000  # Hz, of waveforms; codes are made from those at the codec's own rate
LEAST_HOURS = 0.06  # with less, the codec cannot be fitted
MAY_DIFFER = 0.1  # by which a waveform may: seconds of length, and share of the level
WHOLE, IN_SMALL_WINDOWS = PreparationSection(), PreparationSection(read_ahead=32)
"""The second so that an hour of audio has several windows: one alone leaves nothing to be read ahead."""

FORMATS = {
    "WAV": ("wav", "WAV", "PCM_16"),
    "FLAC": ("flac", "FLAC", "PCM_16"),
    "Ogg Vorbis": ("ogg", "OGG", "VORBIS"),
    "Opus": ("opus", "OGG", "OPUS"),
    "MP3": ("mp3", "MP3", "MPEG_LAYER_III"),
}
"""Suffix, and libsndfile's names of container and coding, which are written at its default quality."""
SOURCES = {"48 kHz stereo": (48_000, 2), "16 kHz mono": (16_000, 1)}
TEXTS = (
    "The committee met at nine in the morning, and by half past ten it had agreed on three of the fourteen points.",
    "Take the second road on the left after the bridge, then follow the river until you see the old mill.",
    "Nobody had told the driver that the last train leaves earlier on a Sunday, so he waited for another hour.",
    "Cut the onions into thin rings, add a little salt, and let them stand in cold water while the oven gets hot.",
)
NUM_VOICES = 6  # of whom each stereo file has two


@dataclass
class Row:
    """One provider on one kind of file.

    Attributes:
        format, source, provider: what is measured.
        fault: why it is not; empty where it is.
        to_waveform, to_codes: hours a CPU-second, of each round.
    """

    format: str
    source: str
    provider: str
    fault: str = ""
    to_waveform: list[float] = field(default_factory=list)
    to_codes: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class EndToEnd:
    """Files of all kinds in turn to codes by the preparation's own path, which decodes ahead of the encoder.

    Attributes:
        hours: of audio.
        per_cpu_second, per_second: hours a second of CPU time, and of the clock.
        share_waited: of the encoder's time from its first batch on, that it waited for the decoder.
        num_windows: of files that were decoded together.
    """

    hours: float
    per_cpu_second: float
    per_second: float
    share_waited: float
    num_windows: int


@dataclass(frozen=True)
class DecodingFigures:
    """All of a run: `hours` of audio in `num_files` files, the same speech in every kind."""

    hours: float
    num_files: int
    num_rounds: int
    rows: list[Row]
    end_to_end: EndToEnd


@dataclass(frozen=True)
class _Case:
    """Files of one kind, and the seconds and root mean square that each is to decode to."""

    format: str
    source: str
    paths: list[Path]
    seconds: list[float]
    levels: list[float]

    @property
    def hours(self) -> float:
        return sum(self.seconds) / 3600


def measure_decoding(
    directory: Path,
    *,
    hours: float,
    num_rounds: int,
    say: Callable[[str], None],
    providers: Sequence[Provider] = PROVIDERS,
) -> DecodingFigures:
    """Make speech, write it in every format, and have every provider decode it in turn, so many times.

    Args:
        directory: gets the files.
        hours: of audio, in all kinds of files together.
        num_rounds: that are counted, after one in which what comes out is checked.
        say: told what is under way.
        providers: who decodes.

    Raises:
        ImportError: DALI or what speech is made with is not installed.
        ValueError: too few hours.
    """
    if hours < LEAST_HOURS:
        raise ValueError(f"hours: {hours:g} is too little to fit a codec on; give at least {LEAST_HOURS}")
    say("making speech")
    speech = list(_speech(hours * 3600 / (len(FORMATS) * len(SOURCES))))
    cases = [_write(speech, directory, format=format, source=source) for format in FORMATS for source in SOURCES]
    codec = SpectralCodec.fit([_mono(stereo_NC, rate=SpectralConfig.sample_rate) for stereo_NC in speech])
    say("checking what every decoder makes of it")
    loaded = {provider.name: _load(provider) for provider in providers}
    runs = [[(_checked(case, name, loaded[name]), loaded[name]) for name in loaded] for case in cases]
    for number in range(num_rounds):
        say(f"round {number + 1} of {num_rounds}")
        for case, of_case in zip(cases, runs, strict=True):
            first = number % len(of_case)
            for row, decode in of_case[first:] + of_case[:first]:
                if not row.fault:
                    _measure(row, case, decode=decode, codec=codec)
    say("end to end")
    return DecodingFigures(
        hours=sum(case.hours for case in cases),
        num_files=sum(len(case.paths) for case in cases),
        num_rounds=num_rounds,
        rows=[row for of_case in runs for row, _ in of_case],
        end_to_end=_end_to_end(cases, codec=codec),
    )


def _speech(seconds: float) -> Iterator[np.ndarray]:
    """Files' worth of speech at 48 kHz `[N, 2]`, a talker on each channel who says two sentences."""
    voices, made = cycle(draw_voices("en", NUM_VOICES, seed=1)), 0.0
    texts = cycle([f"{first} {second}" for first in TEXTS for second in TEXTS if first != second])
    while made < seconds:
        pair = [read_aloud(next(texts), voice=next(voices), sample_rate=48_000)[0].samples for _ in range(2)]
        stereo_NC = np.zeros((max(map(len, pair)), 2), dtype=np.float32)
        for channel, samples in enumerate(pair):
            stereo_NC[: len(samples), channel] = 0.5 * samples / abs(samples).max()
        made += len(stereo_NC) / 48_000
        yield stereo_NC


def _mono(stereo_NC: np.ndarray, *, rate: int) -> np.ndarray:
    import soxr  # which making speech has asked for

    return soxr.resample(stereo_NC.mean(1), 48_000, rate)


def _write(speech: Sequence[np.ndarray], directory: Path, *, format: str, source: str) -> _Case:
    import soundfile

    (suffix, container, coding), (rate, num_channels) = FORMATS[format], SOURCES[source]
    folder = directory / f"{format}, {source}".replace(", ", "_").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    case = _Case(format, source, [], [], [])
    for number, stereo_NC in enumerate(speech):
        path, mono_N = folder / f"{number:04d}.{suffix}", _mono(stereo_NC, rate=rate)
        samples = stereo_NC if num_channels == 2 else mono_N
        soundfile.write(path, samples, rate, format=container, subtype=coding)
        case.paths.append(path)
        case.seconds.append(len(stereo_NC) / 48_000)
        case.levels.append(_level(mono_N))
    return case


def _level(samples_N: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples_N, dtype=np.float64))))


def _load(provider: Provider) -> Decode | str:
    """How it decodes, or why it does not."""
    try:
        return provider.load()
    except ModuleNotFoundError as error:
        return f"not installed: {error}"
    except (ImportError, OSError, RuntimeError) as error:  # such as torchcodec's, where FFmpeg is missing
        return f"does not load: {_first_line(error)}"


def _checked(case: _Case, provider: str, decode: Decode | str) -> Row:
    """A row without figures, with a fault if what is decoded is not what was written."""
    row = Row(case.format, case.source, provider)
    if isinstance(decode, str):
        row.fault = decode
        return row
    try:
        waveforms = list(decode(case.paths, SAMPLE_RATE))
    except Exception as error:  # every package has its own kinds, and the table tells
        row.fault = f"cannot read it: {_first_line(error)}"
        return row
    for waveform, seconds, level in zip(waveforms, case.seconds, case.levels, strict=True):
        found, heard = len(waveform) / SAMPLE_RATE, _level(waveform)
        if abs(found - seconds) > MAY_DIFFER or abs(heard / level - 1) > MAY_DIFFER:
            row.fault = f"wrong: {found:.2f} s at a level of {heard:.3f}, not {seconds:.2f} s at {level:.3f}"
    return row


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _measure(row: Row, case: _Case, *, decode: Decode, codec: Codec) -> None:
    """Add a round's figures."""
    started = _cpu_seconds()
    for _ in decode(case.paths, SAMPLE_RATE):
        pass
    row.to_waveform.append(case.hours / (_cpu_seconds() - started))
    started = _cpu_seconds()
    window = Window()
    for path, waveform in zip(case.paths, decode(case.paths, codec.sample_rate), strict=True):
        window.add(Recording(path), waveform)
    encode_window(window, codec=codec, batch_seconds=WHOLE.batch_seconds, timeline=Timeline())
    row.to_codes.append(case.hours / (_cpu_seconds() - started))


def _end_to_end(cases: Sequence[_Case], *, codec: Codec) -> EndToEnd:
    recordings = [Recording(path) for paths in zip(*(case.paths for case in cases), strict=True) for path in paths]
    settings, timeline, codes = IN_SMALL_WINDOWS, Timeline(), {}
    started, clock, num_windows = _cpu_seconds(), time.perf_counter(), 0
    windows = decoded_windows(recordings, decoder=our_decoder(codec.sample_rate), settings=settings, timeline=timeline)
    for window in ahead(windows, timeline=timeline):
        codes.update(encode_window(window, codec=codec, batch_seconds=settings.batch_seconds, timeline=timeline))
        num_windows += 1
    cpu, elapsed = _cpu_seconds() - started, time.perf_counter() - clock
    assert len(codes) == len(recordings), "a file that was written here was rejected"
    hours = sum(case.hours for case in cases)
    return EndToEnd(
        hours=hours,
        per_cpu_second=hours / cpu,
        per_second=hours / elapsed,
        share_waited=timeline.share_waited,
        num_windows=num_windows,
    )


def _cpu_seconds() -> float:
    """Of this process, all of its threads, and the children it has waited for, so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
