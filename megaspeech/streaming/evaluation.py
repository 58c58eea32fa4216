"""Answers of a converted model to the utterances of manifests, and how soon they come.

Answers come in large batches; latencies are measured with as many sessions as are to be served, one by default.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from megaspeech.preparation.compose import compose, timing_of
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.sources import Refused
from megaspeech.preparation.utterance import Utterance
from megaspeech.streaming.folder import ServedFolder
from megaspeech.streaming.latency import Latency, speech_latency, summarise, text_latency
from megaspeech.streaming.scoring import answer_text
from megaspeech.streaming.session import Answer, Clock, Request, acoustic_delay, answer

Item = TypeVar("Item", "Asked", "Evaluated")
Progress = Callable[[Iterable], Iterable]
BATCH = 60
PATIENCE_FRAMES = 8
"""Frames that a speaking model gets beyond the length of the reference."""


class Asked(NamedTuple):
    """An utterance, and what the model is asked for it."""

    utterance: Utterance
    request: Request


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One utterance and the model's answer.

    `reference` and `text`: what it should have written, in the tokenizer's normal form, and what it wrote.
    `waveform_N`: what it said, decoded, frame 0 of the answer at sample 0; None for tasks that do not speak.
    """

    utterance: Utterance
    answer: Answer
    reference: str
    text: str
    waveform_N: np.ndarray | None


class Evaluator:
    """Answers of a converted model.

    Args:
        served: see `folder.open_folder`.
        clock: gives seconds, by which steps and the codec are timed.
    """

    def __init__(self, served: ServedFolder, *, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.lm, self.config, self.codec = served.lm, served.config, served.codec
        self.tokenizer, self.timing = served.tokenizer, timing_of(served.config)

    def requests(
        self,
        utterances: Iterable[Utterance],
        codes: Mapping[Recording, np.ndarray],
        *,
        refuse: Callable[[Refused], object] = lambda _: None,
    ) -> list[Asked]:
        """What the model is asked, in the order of the utterances.

        Args:
            utterances: of manifests.
            codes: of their recordings, see `preparation.encoding.encode_recordings`; utterances without are left
                out.
            refuse: told of each other utterance that cannot be asked, and why.
        """
        asked = []
        for utterance in utterances:
            if all(one in codes for one in utterance.recordings):
                try:
                    asked.append(Asked(utterance, self._request(utterance, codes)))
                except ValueError as error:
                    refuse(Refused(place_of(utterance), str(error)))
        return asked

    def answers(
        self, asked: Sequence[Asked], *, batch_size: int = BATCH, progress: Progress = iter
    ) -> Iterator[Evaluated]:
        """Answers, in batches of one task, and what they say.

        Args:
            asked: see `requests`.
            batch_size: sessions at once.
            progress: wraps the iteration over batches.
        """
        groups = _by_task(asked).values()
        batches = [group[first : first + batch_size] for group in groups for first in range(0, len(group), batch_size)]
        for batch in progress(batches):
            yield from self._run_batch(batch)

    def latencies(self, asked: Sequence[Asked], *, batch_size: int = 1, progress: Progress = iter) -> dict[str, dict]:
        """Response latency by task key: `{"median", "p99", "median_parts"}` in ms.

        Args:
            asked: see `requests`; each once, or more often where they do not fill a batch.
            batch_size: sessions that are served together, all from the same moment on.
            progress: wraps the iteration over batches.

        Returns:
            Nothing of a codec that cannot stream: no listener would hear such answers while they come.
        """
        if not self.codec.can_stream:
            return {}
        encode_seconds, decode_seconds = self._codec_seconds(batch_size)
        measured: dict[str, list[Latency]] = defaultdict(list)
        for batch in progress(full_batches(asked, batch_size=batch_size)):
            for result in self._run_batch(batch):
                latency = self._latency(result, decode_seconds=decode_seconds)
                if latency and result.utterance.task.hears:
                    latency = replace(latency, compute=latency.compute + 1000 * encode_seconds)
                measured[result.utterance.task.key].extend([latency] if latency else [])
        return {task: summarise(values) for task, values in measured.items()}

    def _run_batch(self, batch: Sequence[Asked]) -> Iterator[Evaluated]:
        answers = answer(
            self.lm,
            [one.request for one in batch],
            tokenizer=self.tokenizer,
            streams=self.config.streams,
            timing=self.timing,
            silence=self.codec.silence_codes.cpu().numpy(),
            clock=self.clock,
        )
        for (utterance, _), one in zip(batch, answers, strict=True):
            waveform_N = self._decode(one.codes) if utterance.task.speaks else None
            reference = self.tokenizer.normalise(utterance.text)
            yield Evaluated(utterance, one, reference, answer_text(one, tokenizer=self.tokenizer), waveform_N)

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
        return self.codec.decode(torch.from_numpy(codes_QT)[None])[0].clamp(-1, 1).cpu().numpy()

    def _codec_seconds(self, batch_size: int, *, num_frames: int = 20) -> tuple[float, float]:
        """Median times of a frame of the streaming encoder and decoder, with the decoder's own delay added to its."""
        silence_BQ = self.codec.silence_codes.expand(batch_size, -1)
        sound_BN = torch.zeros(batch_size, self.codec.frame_size)
        encoder = self.codec.streaming_encoder(batch_size=batch_size)
        decoder = self.codec.streaming_decoder(batch_size=batch_size)
        seconds = np.zeros((2, num_frames))
        for frame in range(num_frames):
            seconds[0, frame] = self._seconds(lambda: encoder.step(sound_BN).cpu())
            seconds[1, frame] = self._seconds(lambda: decoder.step(silence_BQ).cpu())
        encode, decode = np.median(seconds, axis=1)
        return float(encode), float(decode) + decoder.delay / self.codec.sample_rate

    def _seconds(self, call: Callable[[], object]) -> float:
        started = self.clock()
        call()
        return self.clock() - started

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


def place_of(utterance: Utterance) -> str:
    """Where an utterance's audio lies, for people; the text of one without."""
    if not utterance.recordings:
        return repr(utterance.text)
    recording = utterance.recordings[0]
    return f"{recording.path}, from {recording.start:g} s" if recording.start else str(recording.path)


def first_of_each_task(items: Iterable[Item], count: int) -> list[Item]:
    """The first `count` requests, or answers, of each task."""
    return [item for group in _by_task(items).values() for item in group[:count]]


def full_batches(asked: Iterable[Item], *, batch_size: int) -> list[list[Item]]:
    """Batches of one task each, all of `batch_size`: the first of a task come again where the last batch has room."""
    batches = []
    for group in _by_task(asked).values():
        around = itertools.cycle(group)
        num_batches = -(-len(group) // batch_size)
        batches += [list(itertools.islice(around, batch_size)) for _ in range(num_batches)]
    return batches


def _by_task(items: Iterable[Item]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.utterance.task.key].append(item)
    return groups
