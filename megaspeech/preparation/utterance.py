"""What every kind of manifest is read into: recordings, words in time, and the task they are given for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megaspeech.data.tasks import Task

if TYPE_CHECKING:
    from megaspeech.preparation.plan import Plan


@dataclass(frozen=True)
class Recording:
    """A stretch of one audio file, as one waveform.

    Attributes:
        path: the file, or the archive (tar) that holds it.
        start, end: seconds; `end` None is the end of the file.
        channel: which one, from 0; None mixes all of them.
        duration: of the stretch in seconds, as the manifest has it; None where it does not say.
        span: (first byte, number of bytes) of the file within an archive.
        plan: what is done to the waveform once it is decoded (megaspeech.preparation.augmentation); None is nothing.
            `duration` and the rest describe it as it is before.
    """

    path: Path
    start: float = 0.0
    end: float | None = None
    channel: int | None = None
    duration: float | None = None
    span: tuple[int, int] | None = None
    plan: Plan | None = None

    @property
    def seconds(self) -> float | None:
        """Its length; None where the manifest does not say."""
        if self.duration is None and self.end is not None:
            return self.end - self.start
        return self.duration


@dataclass(frozen=True)
class Word:
    """A word, or a phrase of several, and when it sounds, in seconds from the start of the recording's stretch.

    A phrase stands where no time of each word is known: a segment of a transcript, or all of it.
    """

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest: what a model hears, writes and says.

    Attributes:
        task: what is asked, with its languages.
        text: what is written, in the target language.
        words: `text` in time, in order. The times are those of what is heard where the task does not speak (of the
            source word), and of what is said where it does. Empty where neither times nor the audio's length are
            known: then the text is spread over the whole.
        heard: what the model hears, for a task that hears.
        spoken: what it says, for a task that speaks, on the clock of `heard`.
        speaker: who is heard, or for `tts` said; empty if not known.
        source_words: what is heard, in its own language, if known.
    """

    task: Task
    text: str
    words: tuple[Word, ...]
    heard: Recording | None = None
    spoken: Recording | None = None
    speaker: str = ""
    source_words: tuple[Word, ...] = ()

    @property
    def recordings(self) -> tuple[Recording, ...]:
        """Every recording of the line."""
        return tuple(recording for recording in (self.heard, self.spoken) if recording is not None)
