"""A session that answers while it is spoken to: a frame of sound in, the text and the sound that are there by now out.

Step s of the runtime is fed what was heard in frame s - 1 (see `session`). So a session opens with the steps of the
prompt and one more, before anything is heard; from then on every frame that is heard is a step. What is heard after
its end is silence, by the codec's codes for it, as in training.

Shapes: B = 1 request, Q codebooks of one speaker, N samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from megaspeech.codecs.protocol import Codec
from megaspeech.data.tasks import ZERO_TOKEN, Task
from megaspeech.data.tokenizer import SPACE, Tokenizer
from megaspeech.preparation.compose import timing_of
from megaspeech.streaming.runtime import make_generator
from megaspeech.streaming.session import check_streams
from megaspeech.streaming.steering import TextScript, TextSteering

if TYPE_CHECKING:
    from megaspeech.streaming.folder import ServedFolder

QUIET_LEVEL = 0.01
"""Root mean square (full scale 1) below which nobody is speaking: -40 dB."""
QUIET_SECONDS = 1.0
"""How long an answer is quiet when it is over, beyond the frames that it is behind of what is heard."""
LONGEST_REST = 60.0
"""Seconds after which an answer is taken to go on for ever."""


@dataclass(frozen=True, eq=False)
class Said:
    """What a step gave.

    Attributes:
        frame: whose text this is; 0 is the frame in which the sound starts.
        token: of the text stream.
        text: what it adds to the text; empty for pauses and for characters that are not complete.
        samples_N: the next float32 samples of the model's voice: a frame of them, or none while its first is not there.
    """

    frame: int
    token: int
    text: str
    samples_N: np.ndarray


class LiveText:
    """Text from the tokens of a text stream, as they come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = b""

    def push(self, token: int) -> str:
        """What `token` adds to the text, with the space before a word; empty for what is no text."""
        if not self._tokenizer.is_text(token):
            return ""
        processor = self._tokenizer.processor
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):  # "<0xE3>": one byte of a character that has no piece of its own
            self._bytes += bytes([int(piece[1:-1], 16)])
            piece = ""
            if len(self._bytes) < _num_bytes(self._bytes[0]):
                return ""
        before, self._bytes = self._bytes.decode(errors="replace"), b""
        return before + piece.replace(SPACE, " ")


def _num_bytes(first: int) -> int:
    """Of the character that begins with the byte `first`, in UTF-8."""
    return 1 + sum(first >= least for least in (0xC0, 0xE0, 0xF0))


def spelled(text: str, *, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """What a voice is told to say, word by word, as `session.Request.words`.

    Raises:
        ValueError: the tokenizer can write none of it.
    """
    words = tuple(word.pieces for word in tokenizer.spell(text, ends=True) if word.pieces)
    if not words:
        raise ValueError(f"text = {text!r}: {tokenizer.name} has no piece for any of it; give words to say")
    return words


def task_of(key: str | None, served: ServedFolder) -> Task | None:
    """The task that is written `key`; None for a model that knows none.

    Raises:
        ValueError: it is no task, the model wants one, or knows none.
    """
    if key is None and served.knows_tasks:
        raise ValueError("--task is missing: the model was trained on tasks; name one, such as asr-en or st-ja-en")
    if key is not None and not served.knows_tasks:
        raise ValueError(f"--task {key}: the folder has no megaspeech.toml, so its model knows no tasks; leave it out")
    try:
        return None if key is None else Task.parse(key)
    except ValueError as error:
        raise ValueError(f"--task: {error}") from error


def prompt_of(task: Task | None, *, tokenizer: Tokenizer) -> list[int]:
    """The pieces that open a session; none for a model that knows no tasks.

    Raises:
        ValueError: the tokenizer lacks them.
    """
    return [] if task is None else tokenizer.encode_prompt(task)


class LiveSession:
    """One session, from its prompt on: `open`, then a `step` for every frame. A model has one at a time.

    Args:
        served: the model and what belongs to it.
        task: what is asked; None for a model that knows no tasks.
        text: what to say, for `tts` alone.
        temperature: of the draws; None takes the most likely tokens.

    Raises:
        ValueError: task, text and model do not fit each other, or the codec cannot stream.
    """

    def __init__(
        self, served: ServedFolder, *, task: Task | None, text: str | None = None, temperature: float | None = None
    ) -> None:
        self.hears = task is None or task.hears
        _check_asked(task, text=text)
        streams, codec, device = served.config.streams, served.codec, served.lm.device
        check_streams(served.lm, streams)
        self.frame_size, self.frame_rate, self.sample_rate = codec.frame_size, codec.frame_rate, codec.sample_rate
        prompt = prompt_of(task, tokenizer=served.tokenizer)
        self._num_steps, self._num_prompt_frames = 0, len(prompt)
        self._patience = timing_of(served.config).task_delay + round(QUIET_SECONDS * codec.frame_rate)
        words = None if text is None else spelled(text, tokenizer=served.tokenizer)
        self._script = TextScript(prompt, words=words, streams=streams)
        self._steering = TextSteering([self._script], streams=streams, device=device)
        self._ears = _Ears(codec, num_codebooks=streams.num_given_codebooks)
        self._voice = _Voice(codec, delays=streams.delays[1 : 1 + streams.num_codebooks], num_unheard=len(prompt))
        self._token, self._text = streams.text_pad_id, LiveText(served.tokenizer)
        self._generator = make_generator(
            served.lm,
            temperature=temperature,
            on_text_logits_hook=self._steering.restrict,
            on_text_hook=self._on_text,
            on_audio_hook=self._voice.push,
        )
        self._streaming = ExitStack()

    def __enter__(self) -> LiveSession:
        self._streaming.enter_context(self._generator.streaming(1))
        return self

    def __exit__(self, *raised: object) -> None:
        self._streaming.close()

    def open(self) -> Said:
        """The steps of the prompt, and the one whose answer needs nothing heard. To be called first, once."""
        for _ in range(self._num_prompt_frames):
            self._step(self._ears.deaf)
        return self._step(self._ears.deaf)

    def step(self, samples_N: np.ndarray | None) -> Said:
        """The answer to the next frame.

        Args:
            samples_N: what is heard, `[frame_size]` float32 at `sample_rate`, only the last shorter; None after its
                end, and for `tts` throughout.
        """
        if not self.hears:
            return self._step(self._ears.deaf)
        return self._step(self._ears.silent if samples_N is None else self._ears.hear(samples_N))

    def run(self, sound: Iterable[np.ndarray]) -> Iterator[Said]:
        """Open, step through all frames of `sound`, and go on until the answer is over.

        That is when nothing has been written or said for a while; `LONGEST_REST` at most.
        """
        yield self.open()
        for samples_N in sound:
            yield self.step(samples_N)
        num_rest = num_quiet = 0
        while num_rest < round(LONGEST_REST * self.frame_rate) and num_quiet < self._patience:
            said = self.step(None)
            yield said
            if self._script.is_over:  # a text is said to its end
                num_rest, num_quiet = num_rest + 1, num_quiet + 1 if _is_quiet(said) else 0

    def _on_text(self, tokens_B: torch.Tensor) -> None:
        self._steering.force(tokens_B)
        self._token = int(tokens_B[0])

    def _step(self, codes_Q: torch.Tensor) -> Said:
        self._generator.step(codes_Q[None, :, None].to(self._generator.lm_model.device))
        frame, self._num_steps = self._num_steps - self._num_prompt_frames, self._num_steps + 1
        return Said(frame, self._token, self._text.push(self._token), self._voice.speak())


class _Ears:
    """Codes `[Q]` of what the model hears."""

    def __init__(self, codec: Codec, *, num_codebooks: int) -> None:
        self._encoder, self._frame_size = codec.streaming_encoder(), codec.frame_size
        self._num_codebooks = num_codebooks
        self.silent = codec.silence_codes[:num_codebooks]
        self.deaf = torch.full((num_codebooks,), ZERO_TOKEN)

    def hear(self, samples_N: np.ndarray) -> torch.Tensor:
        missing = self._frame_size - len(samples_N)
        assert missing >= 0, f"{len(samples_N)} samples are more than a frame of {self._frame_size}"
        frame_N = torch.from_numpy(np.pad(samples_N, (0, missing)).astype(np.float32))
        return self._encoder.step(frame_N[None])[0, : self._num_codebooks]


class _Voice:
    """The sound of the model's own codes: codebook q of a frame is there `delays[q]` steps after the frame's text.

    The sound of the prompt is silence, for nobody to hear: `num_unheard` frames.
    """

    def __init__(self, codec: Codec, *, delays: Sequence[int], num_unheard: int) -> None:
        self._decoder, self._delays, self._num_unheard = codec.streaming_decoder(), delays, num_unheard
        self._steps: deque[torch.Tensor] = deque(maxlen=max(delays, default=0) + 1)

    def push(self, codes_BQ: torch.Tensor) -> None:
        self._steps.append(codes_BQ[0].clone())

    def speak(self) -> np.ndarray:
        """The next frame of sound, after a step."""
        if len(self._steps) < (self._steps.maxlen or 0):
            return np.zeros(0, dtype=np.float32)
        codes_Q = torch.stack([self._steps[delay][q] for q, delay in enumerate(self._delays)])
        samples_N = self._decoder.step(codes_Q[None])[0].clamp(-1, 1).cpu().numpy()
        self._num_unheard -= 1
        return samples_N if self._num_unheard < 0 else samples_N[:0]


def _check_asked(task: Task | None, *, text: str | None) -> None:
    key = "no task" if task is None else task.key
    if task is not None and task.name == "text":
        raise ValueError(f"task {key}: nothing is heard or said in it; name one of asr, st, tts, s2s, s2st")
    says = task is not None and not task.hears
    if says and text is None:
        raise ValueError(f"task {key}: it says a text; give one (--text)")
    if text is not None and not says:
        raise ValueError(f"task {key}: it hears, and is told no text; leave --text out, or name a task such as tts-en")


def _is_quiet(said: Said) -> bool:
    level = float(np.sqrt(np.mean(said.samples_N**2))) if len(said.samples_N) else 0.0
    return not said.text and level < QUIET_LEVEL
