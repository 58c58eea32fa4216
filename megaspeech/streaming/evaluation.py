"""Score a held-out manifest on the runtime: answers, word error rates, what is said, response latency.

Error rates come from large batches, latencies from one session at a time, as it would be served.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from megaspeech.codecs.protocol import Codec
from megaspeech.config import Config
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.preparation.compose import compose, timing_of
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance
from megaspeech.streaming.latency import Latency, speech_latency, summarise, text_latency
from megaspeech.streaming.scoring import answer_words
from megaspeech.streaming.session import Answer, Request, acoustic_delay, answer

if TYPE_CHECKING:
    from moshi.models import LMModel

Progress = Callable[[Iterable], Iterable]
BATCH = 60
PATIENCE_FRAMES = 8
"""Frames that a speaking model gets beyond the length of the reference."""


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One held-out utterance and the model's answer.

    `waveform_N`: what it said, decoded, frame 0 of the answer at sample 0; None for tasks that do not speak.
    """

    utterance: Utterance
    answer: Answer
    words: list[str]
    waveform_N: np.ndarray | None

    @property
    def reference(self) -> list[str]:
        """The words as they should be."""
        return self.utterance.text.split()


class Evaluator:
    """An exported model with everything that a session needs.

    Args:
        lm: see `runtime.load_runtime`.
        config: of the run that was exported.
        codec, tokenizer: those of the run.
    """

    def __init__(self, lm: LMModel, *, config: Config, codec: Codec, tokenizer: Tokenizer) -> None:
        self.lm, self.config, self.codec, self.tokenizer = lm, config, codec, tokenizer
        self.timing = timing_of(config)

    def run(
        self, utterances: Sequence[Utterance], codes: Mapping[Recording, np.ndarray], *, progress: Progress = iter
    ) -> list[Evaluated]:
        """Answers to all utterances, in batches of one task, and what they say.

        Args:
            utterances: a manifest.
            codes: of their recordings, see `preparation.encoding.encode_recordings`; utterances without are left
                out.
            progress: wraps the iteration over batches.
        """
        by_task: dict[str, list[Utterance]] = defaultdict(list)
        for utterance in utterances:
            if all(one in codes for one in utterance.recordings):
                by_task[utterance.task.key].append(utterance)
        batches = [group[first : first + BATCH] for group in by_task.values() for first in range(0, len(group), BATCH)]
        return [result for batch in progress(batches) for result in self._run_batch(batch, codes)]

    def latencies(
        self, utterances: Sequence[Utterance], codes: Mapping[Recording, np.ndarray], *, progress: Progress = iter
    ) -> dict[str, dict]:
        """Response latency by task key: `{"median", "p99", "median_parts"}` in ms, one session at a time."""
        decode_seconds = self._decode_seconds()
        measured: dict[str, list[Latency]] = defaultdict(list)
        for utterance in progress(utterances):
            (result,) = self._run_batch([utterance], codes)
            latency = self._latency(result, decode_seconds=decode_seconds)
            measured[utterance.task.key].extend([latency] if latency else [])
        return {task: summarise(values) for task, values in measured.items()}

    def _run_batch(self, batch: Sequence[Utterance], codes: Mapping[Recording, np.ndarray]) -> Iterator[Evaluated]:
        answers = answer(
            self.lm,
            [self._request(utterance, codes) for utterance in batch],
            tokenizer=self.tokenizer,
            streams=self.config.streams,
            timing=self.timing,
            silence=self.codec.silence_codes.numpy(),
        )
        for utterance, one in zip(batch, answers, strict=True):
            waveform = self._decode(one.codes) if utterance.task.speaks else None
            yield Evaluated(utterance, one, answer_words(one, tokenizer=self.tokenizer), waveform)

    def _request(self, utterance: Utterance, codes: Mapping[Recording, np.ndarray]) -> Request:
        task, told = utterance.task, None
        if task.name == "tts":
            told = tuple(word.pieces for word in self.tokenizer.spell(utterance.text, ends=True) if word.pieces)
        reference = compose(utterance, codes, config=self.config, codec=self.codec, tokenizer=self.tokenizer)
        return Request(
            task,
            num_frames=reference.codes_ST.shape[1] + (PATIENCE_FRAMES if task.speaks else 0),
            heard=None if utterance.heard is None else codes[utterance.heard],
            words=told,
        )

    def _decode(self, codes_QT: np.ndarray) -> np.ndarray:
        return self.codec.decode(torch.from_numpy(codes_QT)[None])[0].clamp(-1, 1).numpy()

    def _decode_seconds(self, *, num_frames: int = 20) -> float:
        """By how much a decoded frame trails its codes: the streaming decoder's median time and its own delay."""
        decoder, silence = self.codec.streaming_decoder(), self.codec.silence_codes[None]
        seconds = []
        for _ in range(num_frames):
            started = time.perf_counter()
            decoder.step(silence)
            seconds.append(time.perf_counter() - started)
        return float(np.median(seconds)) + decoder.delay / self.codec.sample_rate

    def _latency(self, result: Evaluated, *, decode_seconds: float) -> Latency | None:
        task = result.utterance.task
        shared = {"task": task, "timing": self.timing, "frame_rate": self.codec.frame_rate, "tokenizer": self.tokenizer}
        heard_words = result.utterance.source_words or (() if task.speaks else result.utterance.words)
        if task.hears and not heard_words:  # when the last heard word ends is not known
            return None
        heard_end = heard_words[-1].end if task.hears else None
        if not task.speaks:
            return text_latency(result.answer, heard_end=heard_end, **shared)
        return speech_latency(
            result.answer,
            heard_end=heard_end,
            waveform_N=result.waveform_N,
            sample_rate=self.codec.sample_rate,
            acoustic_delay=acoustic_delay(self.config.streams),
            decode_seconds=decode_seconds,
            **shared,
        )
