"""The lines of a unit as they are prepared: cut where they are too long to be trained on, altered where it is asked."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from megaspeech.config import Config
from megaspeech.preparation.augmentation import Augmenter
from megaspeech.preparation.compose import timing_of
from megaspeech.preparation.cutting import cut_to_length
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.sources import Refused, Unit, read_unit
from megaspeech.preparation.utterance import Utterance

ROOM_FOR_TEXT = 8
"""Frames of a piece that are left free, since the text of its last words comes after them."""


def read_utterances(unit: Unit, *, config: Config, frame_rate: float) -> tuple[list[Utterance], list[Refused]]:
    """What a unit's lines become, in order, and those that are faulty."""
    lines = list(read_unit(unit))
    refused = [line for line in lines if isinstance(line, Refused)]
    whole = [line for line in lines if isinstance(line, Utterance)]
    utterances = [piece for line in whole for piece in _pieces(line, config=config, frame_rate=frame_rate)]
    if is_altered(config, unit):
        augmenter = Augmenter(config.augmentation, seed=config.run.seed, utterances=utterances)
        most = functools.partial(_max_seconds, config=config, frame_rate=frame_rate)
        utterances = [one for line in utterances for one in augmenter.versions(line, max_seconds=most(line))]
    return utterances, refused


def is_altered(config: Config, unit: Unit) -> bool:
    """Whether `[augmentation]` is for this unit."""
    return config.augmentation.is_on and unit.source.augment and (unit.split == "train" or config.augmentation.valid)


def recordings_of(utterances: Iterable[Utterance]) -> list[Recording]:
    """Every recording once, in order: many samples share one."""
    return list(dict.fromkeys(one for utterance in utterances for one in utterance.recordings))


def _most_frames(utterance: Utterance, *, config: Config) -> int:
    """Of audio that fit a training sample."""
    timing, task = timing_of(config), utterance.task
    return config.data.num_frames - timing.speech_origin(task) - (timing.task_delay if task.hears else 0)


def _max_seconds(utterance: Utterance, *, config: Config, frame_rate: float) -> float:
    """Of a piece of a line, with room for the text of its last words."""
    return max(1, _most_frames(utterance, config=config) - ROOM_FOR_TEXT) / frame_rate


def _pieces(utterance: Utterance, *, config: Config, frame_rate: float) -> list[Utterance]:
    """A line as it is, or cut into pieces that a training sample holds."""
    lengths = [recording.seconds or 0.0 for recording in utterance.recordings]
    if max(lengths, default=0.0) * frame_rate <= _most_frames(utterance, config=config):
        return [utterance]
    return cut_to_length(utterance, max_seconds=_max_seconds(utterance, config=config, frame_rate=frame_rate))
