"""Noise and impulse responses as people have them: a folder of audio, or a manifest."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from megaspeech.config.preparation import SourceSection
from megaspeech.preparation.manifests import nemo
from megaspeech.preparation.manifests.folder import audio_files
from megaspeech.preparation.manifests.line import Line
from megaspeech.preparation.recording import Recording

_SOURCE = SourceSection(name="sounds")


@functools.lru_cache(maxsize=4)  # every unit asks, and a folder of a million noises takes long to list
def find_sounds(path: str, *, key: str) -> tuple[Recording, ...]:
    """The recordings of a folder (all below it, sorted) or of a JSONL manifest (in its order).

    Args:
        path: the folder or the manifest, as NeMo has them; of its keys those count that say where audio is.
        key: of the config, which an error names.

    Raises:
        ValueError: there is no such path, no audio in it, or a line of it is none.
    """
    place = Path(path)
    if place.is_dir():
        sounds = tuple(Recording(place / name) for name in audio_files(place))
    elif place.is_file():
        lines = enumerate(place.read_bytes().split(b"\n"), 1)
        sounds = tuple(_recording(line, manifest=place, number=number) for number, line in lines if line.strip())
    else:
        raise ValueError(f"{key}: {path!r} is neither a folder nor a manifest; check the path")
    if not sounds:
        raise ValueError(f"{key}: {path!r} holds no audio; check the path")
    return sounds


def _recording(content: bytes, *, manifest: Path, number: int) -> Recording:
    try:
        return nemo.recording_of(Line.parse(content, manifest=manifest, source=_SOURCE))
    except ValueError as fault:
        raise ValueError(f"{manifest}, line {number}: {fault}") from None


def stretch_of(recording: Recording, *, longest: float, rng: np.random.Generator | None = None) -> Recording:
    """At most `longest` seconds of a recording, from a drawn moment on, so that an hour of noise is not decoded for one
    sentence. Without `rng`, or where nobody knows its length, its first ones."""
    duration = recording.duration if recording.duration is not None else _duration(recording)
    if duration is None:  # the decoder ends where the file does
        return replace(recording, end=recording.start + longest)
    if duration <= longest:
        return recording
    start = recording.start + (round(float(rng.uniform(0, duration - longest)), 2) if rng else 0.0)
    return replace(recording, start=start, end=start + longest, duration=longest)


def _duration(recording: Recording) -> float | None:
    """What the header of a file says; None where it says nothing that soundfile reads."""
    if recording.span is not None or recording.end is not None:
        return None if recording.end is None else recording.end - recording.start
    import soundfile

    try:
        return soundfile.info(os.fsencode(recording.path)).duration - recording.start
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError):  # TypeError: of ".raw"; ValueError: of a NUL
        return None
