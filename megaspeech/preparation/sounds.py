"""Noise and impulse responses as people have them: a folder of audio, or a manifest."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from megaspeech.preparation.manifests.folder import audio_files
from megaspeech.preparation.recording import Recording


@functools.lru_cache(maxsize=4)  # every unit asks, and a folder of a million noises takes long to list
def find_sounds(path: str, *, key: str) -> tuple[Recording, ...]:
    """The recordings of a folder (all below it, sorted) or of a JSONL manifest (in its order).

    Args:
        path: the folder or the manifest, of lines with `audio_filepath` (absolute or relative to the manifest) and, if
            they are known, `offset` and `duration` in seconds; other keys are left alone.
        key: of the config, which an error names.

    Raises:
        ValueError: there is no such path, no audio in it, or a line of it is none.
    """
    place = Path(path)
    if place.is_dir():
        sounds = tuple(Recording(place / name) for name in audio_files(place))
    elif place.is_file():
        lines = place.read_text(encoding="utf-8").split("\n")
        sounds = tuple(
            _recording(line, manifest=place, number=number) for number, line in enumerate(lines, 1) if line.strip()
        )
    else:
        raise ValueError(f"{key}: {path!r} is neither a folder nor a manifest; check the path")
    if not sounds:
        raise ValueError(f"{key}: {path!r} holds no audio; check the path")
    return sounds


def _recording(line: str, *, manifest: Path, number: int) -> Recording:
    try:
        values = json.loads(line)
        start, duration = float(values.get("offset") or 0.0), values.get("duration")
        end = None if duration is None or not start else start + float(duration)
        return Recording(
            manifest.parent / values["audio_filepath"],
            start=start,
            end=end,
            duration=None if duration is None else float(duration),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{manifest}, line {number}: {line[:60]!r} names no audio; write one JSON object a line, "
            '{"audio_filepath": ..., "offset": ..., "duration": ...}'
        ) from None


def stretch_of(recording: Recording, *, longest: float, rng: np.random.Generator | None = None) -> Recording:
    """At most `longest` seconds of a recording, from a drawn moment on (without `rng` its first ones), so that an hour
    of noise is not decoded for one sentence. One of unknown length is left whole."""
    duration = recording.duration if recording.duration is not None else _duration(recording)
    if duration is None or duration <= longest:
        return recording
    start = recording.start + (round(float(rng.uniform(0, duration - longest)), 2) if rng else 0.0)
    return replace(recording, start=start, end=start + longest, duration=longest)


def _duration(recording: Recording) -> float | None:
    """What the header of a file says; None where it says nothing that soundfile reads."""
    if recording.span is not None or recording.end is not None:
        return None if recording.end is None else recording.end - recording.start
    import soundfile

    try:
        return soundfile.info(recording.path).duration - recording.start
    except (soundfile.LibsndfileError, OSError):
        return None
