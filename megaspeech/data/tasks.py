"""What a sample of each task looks like: which words stand in the text stream, and at which frame.

A sample begins with the prompt, one piece a frame: the task (`<asr>`) and the language of the answer (`<en>`). Then the
heard audio starts (`asr`, `st`, `s2st`, `s2s`). The text stream follows Moshi's inner monologue (arXiv 2410.00037,
section 3.4.4): PAD everywhere, EPAD in the frame before a word, the word's pieces from its own frame on. Where a word
stands:

- `asr`, `st`: `task_delay` frames after the frame in which the heard word ends, so that a word is written once heard;
- `tts`, `s2st`, `s2s`: `speech_lead` frames before the frame in which the model starts to say it. What `tts` is told to
  say ends with end of sentence, right after the last word;
- `text`: right after the prompt, one piece a frame and end of sentence after the last; there is no audio.

`s2st` answers what it hears; in `s2s` (a conversation, as in Moshi) both parties may speak at any time: text and own
codebooks are the model's party, the heard ones the other.

Axes: Q codebooks, S streams (text, the model's own codebooks, the heard codebooks), T frames.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megaspeech.config.schema import StreamsSection

ZERO_TOKEN = -1
"""No input and no loss: the embedding of this token is exactly zero."""

PROMPT_FRAMES = 2
TASKS = ("asr", "st", "tts", "s2st", "s2s", "text")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Z][A-Za-z]*)?")
"""A code as in BCP 47: `en`, `yue`, `pt-BR`, `zh-Hant`. The capital tells `st-zh-Hant-en` from `st-zh-en`."""
_KEY = re.compile(rf"({'|'.join(TASKS)})-({LANGUAGE.pattern})(?:-({LANGUAGE.pattern}))?")


def prompt_symbols(languages: Iterable[str]) -> tuple[str, ...]:
    """What a tokenizer needs for the prompts of every task in these languages."""
    return tuple(f"<{word}>" for word in (*TASKS, *sorted(set(languages))))


@dataclass(frozen=True)
class Task:
    """One direction of one task, for example `Task("st", source="ja", target="en")`, written `st-ja-en`."""

    name: str
    source: str
    target: str

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(f"taskname {self.name!r} is not one of {', '.join(TASKS)}")
        for language in (self.source, self.target):
            if not LANGUAGE.fullmatch(language):
                raise ValueError(f"language {language!r} is no code such as 'en', 'yue' or 'pt-BR'")

    @classmethod
    def parse(cls, key: str) -> Task:
        """The task that is written `key`, in the header of a shard. Raises ValueError where there is none."""
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is no task such as 'asr-en' or 'st-ja-en'")
        name, source, _, target, _ = match.groups()
        return cls(name, source, target or source)

    @property
    def key(self) -> str:
        """`asr-en`, `tts-ja`, `st-ja-en`: the languages once where they are the same."""
        return (
            f"{self.name}-{self.target}" if self.source == self.target else f"{self.name}-{self.source}-{self.target}"
        )

    @property
    def prompt(self) -> tuple[str, str]:
        """The symbols that open the text stream; the spoken language is for the model to hear."""
        return (f"<{self.name}>", f"<{self.target}>")

    @property
    def hears(self) -> bool:
        """True where the given streams hold speech."""
        return self.name in ("asr", "st", "s2st", "s2s")

    @property
    def speaks(self) -> bool:
        """True where the predicted codebooks hold speech rather than silence."""
        return self.name in ("tts", "s2st", "s2s")


@dataclass(frozen=True)
class Timing:
    """Delays in frames, a property of the data.

    `task_delay`: from the frame in which a heard word ends to the frame of its text.
    `speech_lead`: from the frame of a word's text to the frame in which the model starts to say it.
    """

    task_delay: int = 3
    speech_lead: int = 1

    def speech_origin(self, task: Task) -> int:
        """The frame at which the clock of a task's audio starts: after the prompt; for `tts`, late enough for EPAD
        and the first word's text to come before its sound."""
        return PROMPT_FRAMES + 1 + self.speech_lead if task.name == "tts" else PROMPT_FRAMES

    def text_frame(self, task: Task, *, start: float, end: float, frame_rate: float) -> int:
        """The frame of the text of a word that sounds from `start` to `end` seconds."""
        seconds = start if task.speaks else end
        return self.speech_origin(task) + int(seconds * frame_rate) + self.text_shift(task)

    def text_shift(self, task: Task) -> int:
        """Frames from the sound of a word to its text; negative where the text comes first."""
        return -self.speech_lead if task.speaks else self.task_delay


def settle(words: Sequence[tuple[int, Sequence[int]]], *, first: int) -> list[int]:
    """The frame that each word gets.

    Args:
        words: (wanted frame, piece ids) in order; a word whose frame is still taken moves right.
        first: the first frame that is free.
    """
    frames = []
    for wanted, pieces in words:
        frames.append(max(wanted, first))
        first = frames[-1] + len(pieces)
    return frames


def text_stream(
    words: Sequence[tuple[int, Sequence[int]]], *, prompt: Sequence[int], num_frames: int, streams: StreamsSection
) -> np.ndarray:
    """The text tokens `[T]` int64 of a sample.

    Args:
        words: (frame, piece ids) in order; see `settle`.
        prompt: the prompt's piece ids, one for each of the first `PROMPT_FRAMES` frames.
        num_frames: least T; longer if the words need it.
        streams: names the PAD and EPAD ids.
    """
    row = list(prompt)
    for frame, (_, pieces) in zip(settle(words, first=len(prompt)), words, strict=True):
        row.extend([streams.text_pad_id] * (frame - len(row)))
        if frame - 1 >= len(prompt) and row[frame - 1] == streams.text_pad_id:
            row[frame - 1] = streams.text_end_pad_id
        row.extend(pieces)
    row.extend([streams.text_pad_id] * (num_frames - len(row)))
    return np.asarray(row, dtype=np.int64)


def lay_out(
    task: Task,
    *,
    text: np.ndarray,
    heard: np.ndarray | None,
    spoken: np.ndarray | None,
    silence: np.ndarray,
    timing: Timing,
    streams: StreamsSection,
) -> np.ndarray:
    """The codes `[S, T]` int64 of a sample.

    Args:
        task: says where the audio starts.
        text: tokens of the text stream `[T]`; T grows where the audio is longer. Where the model answers what it hears,
            `task_delay` frames of silence follow: a session goes on, and nothing more is to be answered. A stretch of
            a conversation (`s2s`) has no such end.
        heard: codes `[Q, T_heard]` of what the model hears, or None.
        spoken: codes `[Q, T_spoken]` of what the model says, or None.
        silence: the codec's codes for silence `[Q]`; what the model says, and hears, outside the audio.
        timing: the delays.
        streams: number of codebooks of each speaker.

    Returns:
        Codes; streams that nobody speaks on hold `ZERO_TOKEN`.

    Raises:
        ValueError: the task speaks, and the model has no codebooks of its own.
    """
    if task.speaks and not streams.num_codebooks:
        raise ValueError(f"task {task.key}: speaks, but streams.num_codebooks = 0; give the model codebooks of its own")
    origin = timing.speech_origin(task)
    ends = [origin + codes.shape[1] for codes in (heard, spoken) if codes is not None]
    num_frames = max([len(text), *ends]) + (timing.task_delay if task.hears and task.name != "s2s" else 0)
    codes = np.full((streams.num_streams, num_frames), ZERO_TOKEN, dtype=np.int64)
    codes[0] = streams.text_pad_id
    codes[0, : len(text)] = text
    own, given = codes[1 : 1 + streams.num_codebooks], codes[1 + streams.num_codebooks :]
    if task.name != "text":
        own[:] = silence[: streams.num_codebooks, None]
    if spoken is not None:
        own[:, origin : origin + spoken.shape[1]] = spoken[: streams.num_codebooks]
    if heard is not None:
        given[:, origin:] = silence[: streams.num_given_codebooks, None]
        given[:, origin : origin + heard.shape[1]] = heard[: streams.num_given_codebooks]
    return codes


@dataclass(frozen=True, eq=False)
class Parts:
    """What a sample was laid out from.

    Attributes:
        prompt: piece ids.
        text: tokens `[T]` of the text stream from the prompt's end on, PAD and EPAD among them.
        heard: codes `[Q, T]` from the frame on in which the audio starts, with the silence after its end; None where
            the task does not hear.
        spoken: the same of what the model says; None where it does not speak.
    """

    prompt: tuple[int, ...]
    text: np.ndarray
    heard: np.ndarray | None
    spoken: np.ndarray | None


def take_apart(codes_ST: np.ndarray, *, task: Task, timing: Timing, num_codebooks: int) -> Parts:
    """The inverse of `lay_out`, where each party has up to `num_codebooks` codebooks. How long the audio was a sample
    does not say: silence goes on after it."""
    origin, own = timing.speech_origin(task), slice(1, 1 + num_codebooks)
    return Parts(
        prompt=tuple(codes_ST[0, :PROMPT_FRAMES].tolist()),
        text=codes_ST[0, PROMPT_FRAMES:],
        heard=codes_ST[own.stop :, origin:] if task.hears else None,
        spoken=codes_ST[own, origin:] if task.speaks else None,
    )
