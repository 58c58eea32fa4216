"""One JSON line of a manifest: looked up by key, with faults that name key, value and remedy.

A line's own task and languages win over those of its source (`[[sources]]`). What stands before the first colon of a
fault is its kind, which is the same for all lines that have it, so that they can be counted.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaspeech.config.preparation import SourceSection
from megaspeech.data.tasks import LANGUAGE, TASKS, Task
from megaspeech.preparation.utterance import Word

TASK_NAMES = {
    **{name: name for name in TASKS},
    **{"ast": "st", "translate": "st", "s2t_translation": "st", "transcribe": "asr"},
}
"""As NeMo's Canary manifests call them, too."""
LANGUAGE_NAMES = {"english": "en", "japanese": "ja"}
"""Lhotse's recipes write names where others write codes."""
UNSPACED = ("ja", "zh", "yue", "th", "lo", "km", "my")
"""Languages whose words are not parted by spaces."""

DAY = 86400.0
"""Seconds. What is said to last longer was told in other units, and would be cut into pieces without end."""

_REMEDIES = {
    "audio_filepath": "the audio, absolute or relative to the manifest",
    "target_audio_filepath": "what the model shall say, on the clock of audio_filepath",
    "path": "the audio, absolute or relative to the manifest",
    "duration": "its length in seconds, or -1 where it is not known",
    "offset": "the second at which the stretch starts",
    "taskname": f"one of {', '.join(TASKS)}, or 'task' of the source",
    "source_lang": "the language of what is heard, such as 'ja', or 'source_lang' of the source",
    "target_lang": "the language of what is written or said, such as 'en', or 'target_lang' of the source",
    "text": "the words in the target language",
    "words": 'the words with their times, [{"word": "three", "start": 0.31, "end": 0.66}, ...]; '
    "a forced aligner such as NeMo Forced Aligner or Montreal Forced Aligner writes them",
    "segments": 'phrases with their times, [{"text": "three seven", "start": 0.31, "end": 1.1}, ...]',
}


class Line:
    """A decoded line; all its methods raise ValueError where the line has not what they are asked for."""

    def __init__(self, values: dict[str, Any], *, manifest: Path, source: SourceSection) -> None:
        self.values, self.manifest, self.source = values, manifest, source

    @classmethod
    def parse(cls, content: bytes, *, manifest: Path, source: SourceSection) -> Line:
        """The line as it stands in the file."""
        try:
            values = json.loads(decode_utf8(content))
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at column {error.colno}; write one JSON object a line") from None
        if not isinstance(values, dict):
            shown = content[:40].decode("utf-8", errors="replace")
            raise ValueError(f"not a JSON object: {shown!r}; write one JSON object a line")
        return cls(values, manifest=manifest, source=source)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def fault(self, key: str, complaint: str) -> ValueError:
        """What is wrong with a key, and what it should be."""
        remedy = f"; give {_REMEDIES[key]}" if key in _REMEDIES else ""
        return ValueError(f"key '{key}': {complaint}{remedy}")

    def missing(self, key: str) -> ValueError:
        """That a key is missing, with the nearest one that is there."""
        near = difflib.get_close_matches(key, [other for other in self.values if other in self], n=1)
        return self.fault(key, "is missing" + (f" (there is {near[0]!r})" if near else ""))

    def text(self, key: str) -> str:
        """A text that is not empty."""
        if key not in self:
            raise self.missing(key)
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            raise self.fault(key, f"{value!r} is not a text")
        return value

    def optional_text(self, *keys: str) -> str:
        """The first of the keys that is there, or nothing."""
        return next((str(self.values[key]) for key in keys if key in self), "")

    def path(self, key: str) -> Path:
        """A file, relative to the manifest's folder."""
        return self.manifest.parent / os.path.expanduser(self.text(key))

    def duration(self) -> float | None:
        """Seconds; None where it is left blank or -1, as is usual for audio that nobody has measured."""
        value = self.values.get("duration")
        if value is None or value == "" or (is_number(value) and value == -1):
            return None
        if not is_number(value) or value <= 0:
            raise self.fault("duration", f"{value!r} is not a positive number")
        if value > DAY:
            raise self.fault("duration", f"{value!r} s is more than a day")
        return float(value)

    def offset(self) -> float | None:
        """Seconds at which the stretch starts; None where the whole file is meant."""
        value = self.values.get("offset")
        if value is not None and (not is_number(value) or value < 0):
            raise self.fault("offset", f"{value!r} is not a number from 0 on")
        return None if value is None else float(value)

    def task(self) -> Task:
        """The line's task and languages, or its source's; where a task has one language, either names it."""
        name = self.optional_text("taskname", "task") or self.source.task
        if not name:
            raise self.missing("taskname")
        if name not in TASK_NAMES:
            near = difflib.get_close_matches(name, TASK_NAMES, n=1)
            raise self.fault("taskname", f"{name!r} is unknown" + (f", perhaps {near[0]!r} is meant" if near else ""))
        name = TASK_NAMES[name]
        # NeMo's `lang` is the language of `text`.
        target = self.optional_text("target_lang", "lang") or self.source.target_lang
        source = self.optional_text("source_lang") or ("" if translates(name) else self.optional_text("lang"))
        source = source or self.source.source_lang
        if not translates(name):
            source, target = source or target, target or source
        return Task(name, self._language("source_lang", source), self._language("target_lang", target))

    def _language(self, key: str, name: str) -> str:
        if not name:
            raise self.missing(key)
        code = LANGUAGE_NAMES.get(name.lower(), name)
        if not LANGUAGE.fullmatch(code):
            raise self.fault(key, f"{name!r} is not a language's code")
        return code

    def words(self, key: str) -> tuple[Word, ...]:
        """Words or phrases with their times in seconds, in order."""
        entries = self.values.get(key)
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

    def check_spelling(self, text: str, words: Sequence[Word], *, language: str) -> None:
        """See that words, or phrases of several, are what the text says."""
        spelled = [piece for word in words for piece in word.word.split()]
        same = squeezed(text) == "".join(spelled) if is_unspaced(language) else text.split() == spelled
        if not same:
            raise self.fault("text", f"{text!r} is not what 'words' spell, {' '.join(spelled)!r}")


def translates(task: str) -> bool:
    """Whether a task of this name has two languages."""
    return task in ("st", "s2st")


def decode_utf8(content: bytes, *, name: str = "the line") -> str:
    """Text, without the byte order mark that some editors write.

    Raises:
        ValueError: it is not UTF-8; names where it stands, and the byte.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} of {name}; convert it with iconv") from None


def is_unspaced(language: str) -> bool:
    """Whether a language parts its words by no spaces."""
    return language.split("-")[0] in UNSPACED


def squeezed(text: str) -> str:
    """Text without whitespace."""
    return "".join(text.split())


def joined(texts: Sequence[str], *, language: str) -> str:
    """Words as a text of their language."""
    return ("" if is_unspaced(language) else " ").join(texts)


def whole(text: str, *, duration: float | None) -> tuple[Word, ...]:
    """A text of which no times are known, as one phrase; nothing where the audio's length is not known either."""
    return () if duration is None else (Word(text, 0.0, duration),)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _word(entry: Any) -> Word | None:
    """An entry of a list of words or of phrases as a record, or None if it is not one."""
    if not isinstance(entry, dict):
        return None
    text = next((entry[key] for key in ("word", "segment", "text") if entry.get(key)), None)
    start, end = entry.get("start"), entry.get("end")
    if not isinstance(text, str) or not text.strip():
        return None
    if not is_number(start) or not is_number(end) or not 0 <= start <= end:
        return None
    return Word(text.strip(), float(start), float(end))
