"""kyutai-labs/moshi-finetune's JSONL: conversations in stereo, the model on the left, the user on the right.

    {"path": "data_stereo/a.wav", "duration": 24.52}

Beside each recording stands a `.json` of the same name with what is said and when, in seconds:

    {"alignments": [["Hello", [0.31, 0.66], "SPEAKER_MAIN"], ...]}

`SPEAKER_MAIN` is the model; words of others are kept as those that it hears. A model that says nothing has no words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaspeech.config.preparation import SourceSection
from megaspeech.preparation.manifests.line import Line, decode_utf8, is_number, joined
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance, Word

MAIN_SPEAKER = "SPEAKER_MAIN"
MODEL_CHANNEL, USER_CHANNEL = 0, 1


def read_line(content: bytes, *, manifest: Path, source: SourceSection) -> list[Utterance]:
    """The utterance (task `s2s`) of one line.

    Raises:
        ValueError: the line is not JSON, a key of it is missing or wrong, or its alignments cannot be read.
    """
    line = Line.parse(content, manifest=manifest, source=source)
    path, duration = line.path("path"), line.duration()
    task = Line({"taskname": "s2s"}, manifest=manifest, source=source).task()
    said = _alignments(path.with_suffix(".json"))
    words = tuple(word for word, speaker in said if speaker == MAIN_SPEAKER)
    return [
        Utterance(
            task=task,
            text=joined([word.word for word in words], language=task.target),
            words=words,
            heard=Recording(path, channel=USER_CHANNEL, duration=duration),
            spoken=Recording(path, channel=MODEL_CHANNEL, duration=duration),
            source_words=tuple(word for word, speaker in said if speaker != MAIN_SPEAKER),
        )
    ]


def _alignments(path: Path) -> list[tuple[Word, str]]:
    """(word, speaker), by time."""
    try:
        values = json.loads(decode_utf8(path.read_bytes(), name=path.name))
    except FileNotFoundError:
        raise ValueError(f"no transcript: there is no {path}; moshi-finetune's annotate.py writes it") from None
    except OSError as error:
        raise ValueError(f"unreadable transcript: {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"unreadable transcript: {path}: not JSON, {error.msg} at line {error.lineno}; write it anew"
        ) from None
    entries = values.get("alignments") if isinstance(values, dict) else None
    if not isinstance(entries, list):
        raise ValueError(
            f"unreadable transcript: {path}: no alignments; "
            'write {"alignments": [[word, [start, end], speaker], ...]}'
        )
    said = [_word(entry, path=path, place=place) for place, entry in enumerate(entries)]
    return sorted((each for each in said if each[0].word), key=lambda each: each[0].start)


def _word(entry: Any, *, path: Path, place: int) -> tuple[Word, str]:
    where = f"unreadable transcript: {path}: entry {place} of alignments"
    try:
        word, (start, end), speaker = entry
    except (TypeError, ValueError):
        word = start = end = speaker = None
    if not (isinstance(word, str) and isinstance(speaker, str) and is_number(start) and is_number(end)):
        raise ValueError(f"{where} is {entry!r}, not [word, [start, end], speaker]")
    if not 0 <= start <= end:
        raise ValueError(f"{where} ({word!r}) lasts from {start} to {end} s")
    return Word(word.strip(), float(start), float(end)), speaker
