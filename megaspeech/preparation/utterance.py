"""What every kind of manifest is read into: words in time, what is heard and said, and the task they are given for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megaspeech.data.tasks import Task
from megaspeech.preparation.recording import Plan, Recording


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

    def altered(self, plan: Plan) -> Utterance:
        """The line as it is once `plan` is done to what it hears: the times of words follow the speed."""
        assert self.heard is not None
        assert plan.speed == 1.0 or self.spoken is None, "what is said keeps the clock of what is heard"

        def in_time(words: tuple[Word, ...]) -> tuple[Word, ...]:
            return tuple(replace(word, start=word.start / plan.speed, end=word.end / plan.speed) for word in words)

        heard = replace(self.heard, plan=plan)
        return replace(self, heard=heard, words=in_time(self.words), source_words=in_time(self.source_words))
