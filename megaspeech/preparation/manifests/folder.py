"""A bare folder of audio, with what is said in a `.txt` of the same name beside each file.

It stands for a manifest whose lines are the names of its audio files, relative to the folder and in order. Neither
lengths nor times are known; languages and task are those of the source.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megaspeech.config.preparation import SourceSection
from megaspeech.preparation.manifests.line import Line, decode_utf8, whole
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance

AUDIO = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".mp4", ".aac", ".webm", ".wma"),
    *(".aif", ".aiff", ".au", ".caf", ".w64", ".sph", ".amr", ".3gp"),
)
"""Endings of what is taken for audio, so that it is tried and, where it cannot be read, set aside by name."""


def audio_files(root: Path, *, first: str = "") -> Iterator[str]:
    """Paths of all audio files under a folder, relative to it, in one order whatever the file system.

    Args:
        root: the folder; links are followed, but not in circles, and hidden files left alone.
        first: the path to begin at: folders before it are not even listed.

    Raises:
        ValueError: a folder cannot be read.
    """
    yield from _walk(root, prefix="", start=first.split("/") if first else [], above=frozenset())


def _walk(folder: Path, *, prefix: str, start: list[str], above: frozenset[tuple[int, int]]) -> Iterator[str]:
    try:
        status = folder.stat()
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise ValueError(f"{folder}: unreadable: {error.strerror}") from None
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that holds it
        return
    for name in names:
        if name.startswith(".") or (start and name < start[0]):
            continue
        if os.path.splitext(name)[1].lower() in AUDIO:
            yield prefix + name
        elif (folder / name).is_dir():
            rest = start[1:] if start and name == start[0] else []
            yield from _walk(folder / name, prefix=f"{prefix}{name}/", start=rest, above=above | {here})


def read_name(content: bytes, *, manifest: Path, source: SourceSection) -> list[Utterance]:
    """The utterance of one audio file.

    Args:
        content: its path, relative to the folder.
        manifest: the folder.
        source: names task and languages.

    Raises:
        ValueError: there is no text beside it, or it is empty or not UTF-8.
    """
    path = manifest / os.fsdecode(content)
    beside = path.with_suffix(".txt")
    try:
        text = " ".join(decode_utf8(beside.read_bytes(), name=beside.name).split())
    except FileNotFoundError:
        raise ValueError(f"no text: there is no {beside.name} beside it; write what is said into one") from None
    except OSError as error:
        raise ValueError(f"unreadable text: {beside.name}: {error.strerror}") from None
    if not text:
        raise ValueError(f"no text: {beside.name} is empty; write what is said into it")
    task, audio = Line({}, manifest=manifest, source=source).task(), Recording(path)
    return [
        Utterance(
            task=task,
            text=text,
            words=whole(text, duration=None),
            heard=audio if task.hears else None,
            spoken=audio if task.speaks else None,
        )
    ]
