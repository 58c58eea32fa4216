"""Manifests in NeMo's JSONL, one task sample a line, read into `Utterance` records and checked as they are read.

    {"audio_filepath": "wav/x.wav", "duration": 2.31, "taskname": "st", "source_lang": "ja", "target_lang": "en",
     "text": "three seven", "words": [{"word": "three", "start": 0.31, "end": 0.66}, ...], "speaker": "en-us+f2"}

`words` are what the model writes, in the target language. Their times are those of what it hears (`asr`, `st`: of the
source word) or says (`tts`, `s2st`). `s2st` also has `target_audio_filepath`, what the model says, on the clock of what
it hears, and may have `source_words`, those heard. Paths are absolute or relative to the manifest. Keys that are not
named here are left alone. Whether the audio exists and decodes is for `megaspeech.preparation.decode` to say.
"""

import difflib
import json
import math
from pathlib import Path
from typing import Any

from megaspeech.data.tasks import LANGUAGE, TASKS, Task
from megaspeech.preparation.utterance import Recording, Utterance, Word

_REMEDIES = {
    "audio_filepath": "the audio, absolute or relative to the manifest",
    "target_audio_filepath": "what the model shall say, on the clock of audio_filepath",
    "duration": "its length in seconds",
    "taskname": f"one of {', '.join(TASKS)}",
    "source_lang": "the language of what is heard, such as 'ja'",
    "target_lang": "the language of what is written or said, such as 'en'",
    "text": "the words in the target language, separated by spaces",
    "words": 'the words with their times, [{"word": "three", "start": 0.31, "end": 0.66}, ...]; '
    "a forced aligner such as NeMo Forced Aligner or Montreal Forced Aligner writes them",
}


class _Line:
    """One decoded line, which knows where it stands when something is wrong with it."""

    def __init__(self, manifest: Path, number: int, content: str) -> None:
        self.manifest, self._where = manifest, f"{manifest}, line {number}"
        try:
            self._values = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self._where}: not JSON ({error.msg} at column {error.colno}); write one JSON object a line"
            ) from None
        if not isinstance(self._values, dict):
            raise ValueError(f"{self._where}: {content[:40]!r} is not a JSON object; write one JSON object a line")

    def fault(self, key: str, complaint: str) -> ValueError:
        remedy = f"; give {_REMEDIES[key]}" if key in _REMEDIES else ""
        return ValueError(f"{self._where}: key '{key}': {complaint}{remedy}")

    def text(self, key: str) -> str:
        value = self._values.get(key)
        if value is None:
            near = difflib.get_close_matches(key, self._values, n=1)
            raise self.fault(key, "is missing" + (f" (there is {near[0]!r})" if near else ""))
        if not isinstance(value, str) or not value.strip():
            raise self.fault(key, f"{value!r} is not a text")
        return value

    def path(self, key: str) -> Path:
        return self.manifest.parent / self.text(key)

    def duration(self) -> float:
        value = self._values.get("duration")
        if value is None:
            raise self.fault("duration", "is missing")
        if not _is_number(value) or value <= 0:
            raise self.fault("duration", f"{value!r} is not a positive number")
        return float(value)

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            raise self.fault(key, f"{value!r} is unknown" + (f", perhaps {near[0]!r} is meant" if near else ""))
        return value

    def task(self) -> Task:
        name = self.choice("taskname", TASKS)
        return Task(name, self.language("source_lang"), self.language("target_lang"))

    def language(self, key: str) -> str:
        value = self.text(key)
        if not LANGUAGE.fullmatch(value):
            raise self.fault(key, f"{value!r} is no language code")
        return value

    def words(self, key: str) -> tuple[Word, ...]:
        entries = self._values.get(key)
        if not isinstance(entries, list) or not entries:
            raise self.fault(key, "no word times" if entries is None or entries == [] else f"{entries!r} is not a list")
        words: list[Word] = []
        for index, entry in enumerate(entries):
            word = _word(entry)
            if word is None:
                raise self.fault(key, f"entry {index} is {entry!r}, not a word with 0 <= start <= end in seconds")
            if words and word.start < words[-1].start:
                raise self.fault(key, f"entry {index} ({word.word!r}) starts at {word.start}, before the one before it")
            words.append(word)
        return tuple(words)

    def optional_text(self, key: str) -> str:
        return str(self._values.get(key) or "")

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _word(entry: Any) -> Word | None:
    """A `words` entry as a record, or None if it is not one."""
    if not isinstance(entry, dict) or not isinstance(entry.get("word"), str) or not entry["word"]:
        return None
    start, end = entry.get("start"), entry.get("end")
    if not _is_number(start) or not _is_number(end) or not 0 <= start <= end:
        return None
    return Word(entry["word"], float(start), float(end))


def _utterance(line: _Line) -> Utterance:
    task = line.task()
    text, words = line.text("text"), line.words("words")
    spelled = [word.word for word in words]
    if text.split() != spelled:
        raise line.fault("text", f"{text!r} is not what 'words' spell, {' '.join(spelled)!r}")
    audio = Recording(line.path("audio_filepath"), duration=line.duration())
    target = Recording(line.path("target_audio_filepath")) if task.name == "s2st" else None
    return Utterance(
        task=task,
        text=text,
        words=words,
        heard=audio if task.hears else None,
        spoken=target if task.hears else audio,
        speaker=line.optional_text("speaker"),
        source_words=line.words("source_words") if "source_words" in line else (),
    )


def read_manifest(path: str | Path) -> list[Utterance]:
    """Read and check a manifest.

    Args:
        path: a JSONL file; blank lines are skipped.

    Returns:
        Its utterances in order, at least one.

    Raises:
        ValueError: the file is missing, empty or not UTF-8, a line is not JSON, or a key of it is missing or wrong; the
            message names file, line, key and remedy.
    """
    manifest = Path(path)
    if not manifest.is_file():
        raise ValueError(f"{manifest}: no such manifest; check the path, which is relative to {Path.cwd()}")
    try:
        lines = manifest.read_text(encoding="utf-8").split(
            "\n"
        )  # splitlines() would also cut at U+2028 inside a string
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest}: not UTF-8 text (byte {error.start}); name a JSONL manifest") from None
    utterances = [_utterance(_Line(manifest, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not utterances:
        raise ValueError(f"{manifest}: the manifest is empty; write one JSON object a line, or leave it out of the run")
    return utterances
