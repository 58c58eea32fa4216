"""From units of manifests to shards: read, decode, encode, lay the samples out, write, each ahead of the next.

Nothing is lost silently: whatever is left out, because a line is faulty, a recording cannot be used or a sample is
longer than those that are trained on, is written down with its reason, and the rest goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megaspeech.codecs.protocol import Codec
from megaspeech.config import Config
from megaspeech.config.schema import StreamsSection
from megaspeech.data.tokenizer import Tokenizer
from megaspeech.preparation.alignment import UnusableTextError
from megaspeech.preparation.audio_checks import Limits
from megaspeech.preparation.augmentation import others_of
from megaspeech.preparation.compose import Composed, compose, compose_text, shard_header
from megaspeech.preparation.decode import Decoder, Rejection
from megaspeech.preparation.encoding import Window, decoded_windows, encode_window
from megaspeech.preparation.reading import is_altered, read_utterances, recordings_of
from megaspeech.preparation.reading_ahead import ahead
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.sources import Refused, Unit
from megaspeech.preparation.timeline import Timeline
from megaspeech.preparation.units import Totals, UnitStore
from megaspeech.preparation.utterance import Utterance

NOTES = ("moved_words", "frames_past_end", "unknown_pieces")
"""Counts of `compose.Composed` that add up."""


@dataclass
class UnitRead:
    """A unit of which everything is decoded."""

    unit: Unit
    utterances: list[Utterance]
    refused: list[Refused]
    num_recordings: int
    codes: dict[Recording, np.ndarray] = field(default_factory=dict)
    unusable: dict[Recording, str] = field(default_factory=dict)
    """Reasons by recording."""
    seconds: float = 0.0
    """Of audio encoded."""


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

    def run(self, units: Iterable[Unit], *, advance: Callable[[float, float], None] | None = None) -> None:
        """Make the units that are not done. `advance` is told of progress: (lines, seconds of audio)."""
        advance, todo = advance or (lambda lines, seconds: None), []
        for unit in units:
            if self.store.is_done(unit):
                advance(unit.num_lines, self.store.totals(unit).seconds)
            else:
                todo.append(unit)
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            writing: list[Future] = []
            for read in self._encoded(todo, advance=advance):
                if writing:  # no more than one waits to be written
                    writing.pop().result()
                writing.append(writer.submit(self._write, read))
            for last in writing:
                last.result()

    def _encoded(self, units: Sequence[Unit], *, advance: Callable[[float, float], None]) -> Iterator[UnitRead]:
        """Units with the codes of all of their recordings, while those after them are decoded."""
        most, lines = self.config.preparation.batch_seconds, 0.0
        for read, window in ahead(self._decoded(units), timeline=self.timeline):
            if window is None:
                advance(read.unit.num_lines - lines, 0.0)
                lines = 0.0
                yield read
                continue
            codes = encode_window(window, codec=self.codec, batch_seconds=most, timeline=self.timeline)
            read.codes.update(codes)
            read.unusable.update(window.rejected)
            seconds, share = window.num_samples / self.codec.sample_rate, len(window) / read.num_recordings
            read.seconds += seconds
            advance(share * read.unit.num_lines, seconds)
            lines += share * read.unit.num_lines

    def _decoded(self, units: Sequence[Unit]) -> Iterator[tuple[UnitRead, Window | None]]:
        """Every window of every unit; None follows a unit's last."""
        for unit in units:
            utterances, refused = read_utterances(unit, config=self.config, frame_rate=self.codec.frame_rate)
            recordings = recordings_of(utterances)
            read = UnitRead(unit, utterances, refused, num_recordings=len(recordings))
            for window in decoded_windows(
                recordings,
                decoder=self._decoder,
                settings=self.config.preparation,
                timeline=self.timeline,
                background=self._background(recordings, refused=refused),
            ):
                yield read, window
            yield read, None

    def _background(self, recordings: Sequence[Recording], *, refused: list[Refused]) -> dict[Recording, np.ndarray]:
        """What is heard behind recordings. Of what cannot be decoded, the user's own files are added to `refused`; a
        recording of the unit is set aside for itself."""
        others, background = others_of(recordings), {}
        if not others:
            return {}
        own = {(one.path, one.span) for one in recordings}
        # Nothing is asked of them: a room's response is short and quiet.
        decoder = Decoder(sample_rate=self.codec.sample_rate, num_threads=self.config.preparation.num_threads)
        for index, result in decoder.decode(others):
            if not isinstance(result, Rejection):
                background[others[index]] = result
            elif (others[index].path, others[index].span) not in own:
                refused.append(Refused(str(others[index].path), result.reason))
        return background

    def _write(self, read: UnitRead) -> None:
        samples: dict[str, list[np.ndarray]] = defaultdict(list)
        totals = Totals(seconds=read.seconds)
        totals.effects.update(effect for one in read.codes if one.plan for effect in one.plan.effects)
        rejected = [_rejection(read.unit, path=line.where, reason=line.reason) for line in read.refused]
        known: set[Hashable] = set()
        with self.timeline.span("write", f"{read.unit.source.name} {read.unit.number}"):
            for utterance in read.utterances:
                task, composed = utterance.task.key, self._compose(utterance, read)
                if isinstance(composed, dict):
                    if not _is_known(composed, utterance, known=known):
                        rejected += [
                            _rejection(read.unit, path=path, reason=reason, task=task)
                            for path, reason in composed.items()
                        ]
                    continue
                for one in composed:
                    samples[task].append(one.codes_ST)
                    totals.notes.update({name: count for name in NOTES if (count := getattr(one, name))})
                    totals.largest_shift = max(totals.largest_shift, one.largest_shift)
                if len(composed) > 1:
                    totals.notes["text_cuts"] += len(composed) - 1
            self.store.publish(
                read.unit,
                samples,
                header=lambda task: shard_header(task, config=self.config, codec=self.codec, tokenizer=self.tokenizer),
                rejected=rejected,
                totals=totals,
            )

    def _compose(self, utterance: Utterance, read: UnitRead) -> list[Composed] | dict[Path, str]:
        """The samples of a line, one unless it is a long text; or why there is none, by file."""
        faults = {one.path: read.unusable[one] for one in utterance.recordings if one in read.unusable}
        if faults:
            return faults
        made_with = {"config": self.config, "codec": self.codec, "tokenizer": self.tokenizer}
        most = self.config.data.num_frames
        path = utterance.recordings[0].path if utterance.recordings else read.unit.path
        try:
            if utterance.task.name == "text":
                composed = compose_text(utterance, **made_with, most_frames=most)
            else:
                composed = [compose(utterance, read.codes, **made_with)]
        except UnusableTextError as fault:
            return {path: str(fault)}
        num_frames = max(one.codes_ST.shape[1] for one in composed)
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


def made_with(config: Config, unit: Unit, *, codec: Codec, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that a unit's samples depend on beside its lines and audio, by the name that a message shall have."""
    sections = {
        "streams": config.streams.model_dump(exclude={"delays"}),  # which the model applies
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
    tokenizer.check_streams(streams)
    encoded = "num_codebooks" if streams.num_codebooks else "num_given_codebooks"
    for key, size in ((encoded, codec.num_codebooks), ("cardinality", codec.cardinality)):
        if getattr(streams, key) != size:
            raise ValueError(
                f"streams.{key} = {getattr(streams, key)}, but that of codec {codec.name!r} is {size}; set "
                f"streams.{key} = {size}, or make the codec anew for these streams"
            )
    if streams.num_given_codebooks > codec.num_codebooks:
        raise ValueError(
            f"streams.num_given_codebooks = {streams.num_given_codebooks}, but the codec {codec.name!r} has "
            f"{codec.num_codebooks} codebooks; set it to {codec.num_codebooks} or less"
        )


def _is_known(faults: Mapping[Path, str], utterance: Utterance, *, known: set[Hashable]) -> bool:
    """Whether a recording has been set aside for the same reason in another version of its; adds to `known`."""
    bare = tuple(replace(one, plan=None) for one in utterance.recordings)
    key = (utterance.task, bare, *faults.values())
    is_version, was_known = any(one.plan for one in utterance.recordings), key in known
    known.add(key)
    return is_version and was_known


def _rejection(unit: Unit, *, path: object, reason: str, task: str = "") -> dict[str, str]:
    """A line of rejected.jsonl."""
    source = {"source": unit.source.name, "split": unit.split}
    return {"path": str(path), "task": task, **source, "reason": reason}
