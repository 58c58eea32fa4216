"""NeMo's JSONL, as it is found and with the keys that speech-text tasks need on top.

    {"audio_filepath": "wav/x.wav", "duration": 2.31, "offset": 0.0, "text": "three seven", "lang": "en",
     "taskname": "st", "source_lang": "ja", "target_lang": "en", "speaker": "en-us+f2",
     "words": [{"word": "three", "start": 0.31, "end": 0.66}, ...]}

`words` are what the model writes, in the target language. Their times, in seconds from the start of the line's stretch,
are those of what it hears (`asr`, `st`: of the source word) or says (`tts`, `s2st`, `s2s`). Without `words`,
`segments` (phrases with times) are taken; without both, the text is one phrase over the whole. `s2st` and `s2s` also
have `target_audio_filepath`, what the model says, on the clock of what it hears, and may have `source_words`, those
heard. A line with `shard_id` has its audio in `audio_{shard_id}.tar`, beside the manifest or one folder up, as NeMo's
tarred data sets have it. Other keys are left alone. Whether the audio exists and decodes is for
`megaspeech.preparation.decode` to say.
"""

from __future__ import annotations

import re
from pathlib import Path

from megaspeech.config.preparation import SourceSection
from megaspeech.data.tasks import Task
from megaspeech.preparation.manifests.archive import find_archive, span_of
from megaspeech.preparation.manifests.line import Line, whole
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance, Word

_REPEATED = re.compile(r"-sub\d+(?=\.\w+$|$)")
"""What NeMo adds to the name of a file of which several lines of a tarred manifest are stretches."""


def read_line(content: bytes, *, manifest: Path, source: SourceSection) -> list[Utterance]:
    """The utterance of one line.

    Raises:
        ValueError: the line is not JSON, or a key of it is missing or wrong; names key, value and remedy.
    """
    line = Line.parse(content, manifest=manifest, source=source)
    if line.values.get("_skipme"):
        raise ValueError("key '_skipme': its maker says that the line is not to be used")
    task, text = line.task(), line.text("text")
    if task.name == "text":
        return [Utterance(task=task, text=text, words=whole(text, duration=None))]
    audio = recording_of(line)
    target = Recording(line.path("target_audio_filepath")) if task.hears and task.speaks else None
    return [
        Utterance(
            task=task,
            text=text,
            words=_words(line, text, task=task, duration=audio.duration),
            heard=audio if task.hears else None,
            spoken=target if task.hears else audio,
            speaker=line.optional_text("speaker"),
            source_words=line.words("source_words") if "source_words" in line else (),
        )
    ]


def recording_of(line: Line) -> Recording:
    """The audio of a line, or the stretch of it. Raises ValueError as `read_line`."""
    duration, offset = line.duration(), line.offset()
    path, span = _tarred(line) if "shard_id" in line else (line.path("audio_filepath"), None)
    if offset is None:
        return Recording(path, duration=duration, span=span)
    end = None if duration is None else offset + duration
    return Recording(path, start=offset, end=end, duration=duration, span=span)


def _tarred(line: Line) -> tuple[Path, tuple[int, int]]:
    archive = find_archive(f"audio_{line.values['shard_id']}.tar", manifest=line.manifest)
    name = line.text("audio_filepath")
    span = span_of(name, archive=archive) or span_of(_REPEATED.sub("", name), archive=archive)
    if span is None:
        raise ValueError(f"not in its archive: there is no whole file {name!r} in {archive}; make the archive anew")
    return archive, span


def _words(line: Line, text: str, *, task: Task, duration: float | None) -> tuple[Word, ...]:
    for key in ("words", "segments"):
        if key in line:
            words = line.words(key)
            line.check_spelling(text, words, language=task.target)
            return words
    return whole(text, duration=duration)


def read_manifest(path: str | Path) -> list[Utterance]:
    """Read and check a whole manifest, of which every line must be right and name its task and languages.

    Args:
        path: a JSONL file; blank lines are skipped.

    Returns:
        Its utterances in order, at least one.

    Raises:
        ValueError: the file is missing or empty, or what is wrong with a line; the message names file, line, key and
            remedy.
    """
    manifest, source = Path(path), SourceSection(name="manifest")
    if not manifest.is_file():
        raise ValueError(f"{manifest}: no such manifest; check the path, which is relative to {Path.cwd()}")
    utterances: list[Utterance] = []
    with manifest.open("rb") as file:
        for number, content in enumerate(file, 1):
            if not content.strip():
                continue
            try:
                utterances += read_line(content, manifest=manifest, source=source)
            except ValueError as fault:
                raise ValueError(f"{manifest}, line {number}: {fault}") from None
    if not utterances:
        raise ValueError(f"{manifest}: the manifest is empty; write one JSON object a line, or leave it out of the run")
    return utterances
