"""From units of manifests to shards: read, decode, encode, lay the samples out, write, each ahead of the next.

Nothing is lost silently: whatever is left out, because a line is faulty, a recording cannot be used or a sample is
longer than those that are trained on, is written down with its reason, and the rest goes on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megaspeech.codecs.protocol import Codec
from megaspeech.config import Config
from megaspeech.config.schema import StreamsSection
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.preparation.alignment import UnusableTextError
from megaspeech.preparation.audio_checks import Limits
from megaspeech.preparation.augmentation import Augmenter, others_of
from megaspeech.preparation.compose import Composed, compose, shard_header
from megaspeech.preparation.decode import Decoder, Rejection
from megaspeech.preparation.encoding import Window, decoded_windows, encode_window
from megaspeech.preparation.reading_ahead import ahead
from megaspeech.preparation.sources import Refused, Unit, read_unit
from megaspeech.preparation.timeline import Timeline
from megaspeech.preparation.units import UnitStore
from megaspeech.preparation.utterance import Recording, Utterance

NOTES = ("moved_words", "frames_past_end", "unknown_pieces")
"""Counts of `compose.Composed` that add up."""


@dataclass
class UnitRead:
    """A unit of which everything is decoded."""

    unit: Unit
    utterances: list[Utterance]
    refused: list[Refused]
    codes: dict[Recording, np.ndarray] = field(default_factory=dict)
    unusable: dict[Recording, str] = field(default_factory=dict)
    """Reasons by recording."""
    seconds: float = 0.0
    """Of audio encoded."""

    def take(self, window: Window, codes: Mapping[Recording, np.ndarray], *, sample_rate: int) -> None:
        """The codes of one of its windows."""
        self.codes.update(codes)
        self.unusable.update(window.rejected)
        self.seconds += window.num_samples / sample_rate


class Preparation:
    """Makes units with one codec and tokenizer.

    Args:
        config: of the run.
        codec, tokenizer: what the codes and the text are made with.
        say: told once of what a person should know.

    Raises:
        ValueError: codec or tokenizer are not those that `[streams]` describes.
        ImportError: what decodes is not installed.
    """

    def __init__(
        self, config: Config, *, codec: Codec, tokenizer: Tokenizer, say: Callable[[str], None] | None = None
    ) -> None:
        check_sizes(config.streams, codec=codec, tokenizer=tokenizer)
        self.config, self.codec, self.tokenizer, self.timeline = config, codec, tokenizer, Timeline()
        self.store = UnitStore(config.data.directory, made_with=self._made_with)
        self._decoder = Decoder(
            sample_rate=codec.sample_rate,
            num_threads=config.preparation.num_threads,
            limits=limits_of(config, frame_rate=codec.frame_rate),
            loudness=config.preparation.loudness,
            say=say,
        )

    def _made_with(self, unit: Unit) -> dict[str, Any]:
        return made_with(self.config, unit, codec=self.codec, tokenizer=self.tokenizer)

    def run(self, units: Iterable[Unit], *, advance: Callable[[Unit, float], None] | None = None) -> None:
        """Make the units that are not done. `advance` is told of every one that is, with its seconds of audio."""
        advance = advance or (lambda unit, seconds: None)
        todo = []
        for unit in units:
            if self.store.is_done(unit):
                advance(unit, self.store.totals(unit).seconds)
            else:
                todo.append(unit)
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            writing: list[Future] = []
            for read in self._encoded(todo):
                if writing:
                    writing.pop().result()
                writing.append(writer.submit(self._write, read, advance))
            for last in writing:
                last.result()

    def _encoded(self, units: Sequence[Unit]) -> Iterator[UnitRead]:
        """Units with the codes of all of their recordings, while those after them are decoded."""
        for unit, window in ahead(self._decoded(units), timeline=self.timeline):
            if window is None:
                yield unit
                continue
            seconds = self.config.preparation.batch_seconds
            codes = encode_window(window, codec=self.codec, batch_seconds=seconds, timeline=self.timeline)
            unit.take(window, codes, sample_rate=self.codec.sample_rate)

    def _decoded(self, units: Sequence[Unit]) -> Iterator[tuple[UnitRead, Window | None]]:
        """Every window of every unit; None follows a unit's last."""
        for unit in units:
            read = self._read(unit)
            recordings = recordings_of(read.utterances)
            for window in decoded_windows(
                recordings,
                decoder=self._decoder,
                settings=self.config.preparation,
                timeline=self.timeline,
                background=self._background(recordings),
            ):
                yield read, window
            yield read, None

    def _read(self, unit: Unit) -> UnitRead:
        """A unit's lines, cut where they are too long to be trained on, altered where the config asks for it."""
        lines = list(read_unit(unit))
        utterances = [line for line in lines if isinstance(line, Utterance)]
        if is_altered(self.config, unit):
            config = self.config
            augmenter = Augmenter(config.augmentation, seed=config.run.seed, utterances=utterances)
            utterances = [version for line in utterances for version in augmenter.versions(line)]
        return UnitRead(unit, utterances, [line for line in lines if isinstance(line, Refused)])

    def _background(self, recordings: Sequence[Recording]) -> dict[Recording, np.ndarray]:
        """What is heard behind recordings, without those that cannot be decoded."""
        others = others_of(recordings)
        if not others:
            return {}
        # Nothing is asked of them: a room's response is short and quiet.
        decoder = Decoder(sample_rate=self.codec.sample_rate, num_threads=self.config.preparation.num_threads)
        return {others[index]: result for index, result in decoder.decode(others) if not isinstance(result, Rejection)}

    def _write(self, read: UnitRead, advance: Callable[[Unit, float], None]) -> None:
        samples: dict[str, list[np.ndarray]] = defaultdict(list)
        notes, largest_shift = Counter(), 0
        rejected = [_rejection(read.unit, path=line.where, reason=line.reason) for line in read.refused]
        with self.timeline.span("write", f"{read.unit.source.name} {read.unit.number}"):
            for utterance in read.utterances:
                composed = self._compose(utterance, read)
                if isinstance(composed, dict):
                    task = utterance.task.key
                    for recording, reason in composed.items():
                        rejected.append(_rejection(read.unit, path=recording, reason=reason, task=task))
                    continue
                samples[utterance.task.key].append(composed.codes_ST)
                notes.update({name: getattr(composed, name) for name in NOTES})
                largest_shift = max(largest_shift, composed.largest_shift)
            self.store.publish(
                read.unit,
                samples,
                header=lambda task: shard_header(task, config=self.config, codec=self.codec, tokenizer=self.tokenizer),
                rejected=rejected,
                notes=+notes,
                largest_shift=largest_shift,
                seconds=read.seconds,
            )
        advance(read.unit, read.seconds)

    def _compose(self, utterance: Utterance, read: UnitRead) -> Composed | dict[Path, str]:
        """The sample of a line; or why there is none, by file."""
        faults = {one.path: read.unusable[one] for one in utterance.recordings if one in read.unusable}
        if faults:
            return faults
        path = utterance.recordings[0].path if utterance.recordings else read.unit.path
        try:
            composed = compose(utterance, read.codes, config=self.config, codec=self.codec, tokenizer=self.tokenizer)
        except UnusableTextError as fault:
            return {path: str(fault)}
        num_frames, most = composed.codes_ST.shape[1], self.config.data.num_frames
        if num_frames > most:
            return {path: f"too long: {num_frames} frames with prompt and delays, more than data.num_frames = {most}"}
        return composed


def limits_of(config: Config, *, frame_rate: float) -> Limits:
    """What `[preparation]` asks of audio. What is longer than a training sample is not encoded in the first place."""
    settings, trained_on = config.preparation, config.data.num_frames / frame_rate
    is_shorter = trained_on < settings.max_seconds
    return Limits(
        min_seconds=settings.min_seconds,
        max_seconds=trained_on if is_shorter else settings.max_seconds,
        longest=f"data.num_frames = {config.data.num_frames}" if is_shorter else "preparation.max_seconds",
        duration_tolerance=settings.duration_tolerance,
        silence_dbfs=settings.silence_dbfs,
    )


def is_altered(config: Config, unit: Unit) -> bool:
    """Whether `[augmentation]` is for this unit."""
    return config.augmentation.is_on and unit.source.augment and (unit.split == "train" or config.augmentation.valid)


def made_with(config: Config, unit: Unit, *, codec: Codec, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that a unit's samples depend on beside its lines and audio, by the name that a message shall have."""
    sections = {
        "streams": config.streams.model_dump(),
        "data": config.data.model_dump(include={"num_frames", "task_delay", "speech_lead"}),
        "preparation": config.preparation.model_dump(
            exclude={"num_threads", "device", "batch_seconds", "read_ahead", "fit_recordings"}
        ),
        "source": unit.source.model_dump(
            include={"format", "task", "source_lang", "target_lang", "held_out", "augment"}
        ),
    }
    if is_altered(config, unit):
        sections["augmentation"] = {**config.augmentation.model_dump(), "seed": config.run.seed}
    values = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {"codec.fingerprint": codec.fingerprint, "tokenizer.fingerprint": tokenizer.fingerprint, **values}


def check_sizes(streams: StreamsSection, *, codec: Codec, tokenizer: Tokenizer) -> None:
    """See that codes and text fit the streams. Fewer codebooks may be heard than the codec has: the first ones.

    Raises:
        ValueError: names the key of `[streams]`, its value and what it should be.
    """
    for key, size, what in (
        ("num_codebooks", codec.num_codebooks, f"codec {codec.name!r} has {codec.num_codebooks} codebooks"),
        ("cardinality", codec.cardinality, f"codec {codec.name!r} has codebooks of {codec.cardinality}"),
        ("text_cardinality", tokenizer.vocabulary_size, f"tokenizer has {tokenizer.vocabulary_size} pieces"),
    ):
        if getattr(streams, key) != size:
            raise ValueError(
                f"streams.{key} = {getattr(streams, key)}, but the {what}; set streams.{key} = {size}, "
                f"or make codec and tokenizer anew for these streams"
            )
    if streams.num_given_codebooks > codec.num_codebooks:
        raise ValueError(
            f"streams.num_given_codebooks = {streams.num_given_codebooks}, but the codec {codec.name!r} has "
            f"{codec.num_codebooks} codebooks; set it to {codec.num_codebooks} or less"
        )


def recordings_of(utterances: Iterable[Utterance]) -> list[Recording]:
    """Every recording once, in order: many samples share one."""
    return list(dict.fromkeys(one for utterance in utterances for one in utterance.recordings))


def _rejection(unit: Unit, *, path: object, reason: str, task: str = "") -> dict[str, str]:
    """A line of rejected.jsonl."""
    source = {"source": unit.source.name, "split": unit.split}
    return {"path": str(path), "task": task, **source, "reason": reason}
