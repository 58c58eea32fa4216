"""Score a held-out manifest on the runtime: answers, word error rates, what is said, response latency.

Error rates come from large batches, latencies from one session at a time, as it would be served.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from megaspeech.data.tasks import Task
from megaspeech.preparation.compose import compose, timing_of
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance
from megaspeech.streaming.folder import ServedFolder
from megaspeech.streaming.latency import Latency, speech_latency, summarise, text_latency
from megaspeech.streaming.scoring import answer_words
from megaspeech.streaming.session import Answer, Request, acoustic_delay, answer

Item = TypeVar("Item")
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
    """Answers of a converted model, in batches.

    Args:
        served: see `folder.open_folder`.
    """

    def __init__(self, served: ServedFolder) -> None:
        self.lm, self.config, self.codec = served.lm, served.config, served.codec
        self.tokenizer, self.timing = served.tokenizer, timing_of(served.config)

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
        self,
        utterances: Sequence[Utterance],
        codes: Mapping[Recording, np.ndarray],
        *,
        batch_size: int = 1,
        progress: Progress = iter,
    ) -> dict[str, dict]:
        """Response latency by task key: `{"median", "p99", "median_parts"}` in ms.

        Args:
            utterances: each is asked once, or more often where they do not fill a batch.
            codes: of their recordings.
            batch_size: sessions that are served together, all from the same moment on.
            progress: wraps the iteration over batches.
        """
        encode_seconds, decode_seconds = self._codec_seconds(batch_size)
        measured: dict[str, list[Latency]] = defaultdict(list)
        for batch in progress(full_batches(utterances, batch_size=batch_size)):
            for result in self._run_batch(batch, codes):
                latency = self._latency(result, decode_seconds=decode_seconds)
                if latency and result.utterance.task.hears:
                    latency = replace(latency, compute=latency.compute + 1000 * encode_seconds)
                measured[result.utterance.task.key].extend([latency] if latency else [])
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

    def _codec_seconds(self, batch_size: int, *, num_frames: int = 20) -> tuple[float, float]:
        """Median times of a frame of the streaming encoder and decoder, with the decoder's own delay added to its."""
        silence_BQ = self.codec.silence_codes.expand(batch_size, -1)
        sound_BN = torch.zeros(batch_size, self.codec.frame_size)
        encoder = self.codec.streaming_encoder(batch_size=batch_size)
        decoder = self.codec.streaming_decoder(batch_size=batch_size)
        seconds = np.zeros((2, num_frames))
        for frame in range(num_frames):
            seconds[0, frame] = _seconds(lambda: encoder.step(sound_BN).cpu())
            seconds[1, frame] = _seconds(lambda: decoder.step(silence_BQ).cpu())
        encode, decode = np.median(seconds, axis=1)
        return float(encode), float(decode) + decoder.delay / self.codec.sample_rate

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


def first_of_each_task(items: Iterable[Item], count: int, *, task_of: Callable[[Item], Task]) -> list[Item]:
    """The first `count` utterances, or what there is of them, of each task."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[task_of(item).key].append(item)
    return [item for group in groups.values() for item in group[:count]]


def full_batches(utterances: Sequence[Utterance], *, batch_size: int) -> list[list[Utterance]]:
    """Batches of one task each, all of `batch_size`: the first utterances come again where the last batch has room."""
    by_task: dict[str, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        by_task[utterance.task.key].append(utterance)
    batches = []
    for group in by_task.values():
        around = itertools.cycle(group)
        num_batches = -(-len(group) // batch_size)
        batches += [list(itertools.islice(around, batch_size)) for _ in range(num_batches)]
    return batches


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
