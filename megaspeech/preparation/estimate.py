"""What a preparation will make and cost, before it is done: units, hours, shards, bytes, hours of a GPU.

From the manifests alone; of a source that has none yet, from its `hours`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from rich.table import Table

from megaspeech.config import Config
from megaspeech.config.preparation import SourceSection
from megaspeech.data.shards import token_type
from megaspeech.data.tasks import Task
from megaspeech.preparation.compose import timing_of
from megaspeech.preparation.reading import read_utterances
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.sources import Unit, evenly_spread
from megaspeech.preparation.utterance import Utterance

MOST_UNITS = 20
"""Of a source and split that are read, evenly spread; the others are taken to be like them."""
SAMPLE_BYTES = 28
"""Of index and checksum, for each sample."""
PLANNED_SECONDS = 10.0
"""Length taken for the samples of a source without manifests: utterances."""


@dataclass
class Estimate:
    """Of one source and split. `hours` are of audio, each recording once; `num_unknown` samples name no duration."""

    split: str
    source: str
    num_units: int
    num_read: int
    num_samples: float = 0.0
    num_unknown: float = 0.0
    num_refused: float = 0.0
    hours: float = 0.0
    num_shards: float = 0.0
    num_bytes: float = 0.0


def estimate(config: Config, units: Sequence[Unit], *, frame_rate: float) -> list[Estimate]:
    """Read some units of every source and split, and scale up.

    Args:
        config: of the run.
        units: all of them.
        frame_rate: frames a second of the codec.
    """
    of_source: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        of_source.setdefault((unit.split, unit.source.name), []).append(unit)
    return [
        _estimate(config, several, split=split, source=source, frame_rate=frame_rate)
        for (split, source), several in of_source.items()
    ]


def estimate_planned(config: Config, source: SourceSection, *, frame_rate: float) -> Estimate:
    """Of a source that names its `hours` and no manifest, all of them utterances of `PLANNED_SECONDS`."""
    audio, task = Recording(Path(), duration=PLANNED_SECONDS), Task(source.task or "asr", "en", "en")
    sample = Utterance(
        task, "", (), heard=audio if task.hears else None, spoken=audio if task.speaks and not task.hears else None
    )
    num_samples = source.hours * 3600 / PLANNED_SECONDS
    num_units = -int(-num_samples // config.preparation.lines_per_shard)
    num_bytes = num_samples * _bytes_of(sample, config=config, frame_rate=frame_rate)
    return Estimate(
        *("train", source.name, num_units, num_units, num_samples),
        hours=source.hours,
        num_shards=num_units,
        num_bytes=num_bytes,
    )


def _estimate(config: Config, units: Sequence[Unit], *, split: str, source: str, frame_rate: float) -> Estimate:
    chosen = evenly_spread(units, most=MOST_UNITS)
    found = Estimate(split, source, len(units), len(chosen))
    # By lines, because the last unit of a manifest has fewer.
    scale = sum(unit.num_lines for unit in units) / max(1, sum(unit.num_lines for unit in chosen))
    for unit in chosen:
        utterances, refused = read_utterances(unit, config=config, frame_rate=frame_rate)
        found.num_samples += scale * len(utterances)
        found.num_refused += scale * len(refused)
        recordings = {recording for utterance in utterances for recording in utterance.recordings}
        found.hours += scale * sum(recording.seconds or 0.0 for recording in recordings) / 3600
        found.num_unknown += scale * sum(_num_seconds(utterance) is None for utterance in utterances)
        found.num_shards += len(Counter(utterance.task.key for utterance in utterances)) * len(units) / len(chosen)
        found.num_bytes += scale * sum(_bytes_of(one, config=config, frame_rate=frame_rate) for one in utterances)
    return found


def _bytes_of(utterance: Utterance, *, config: Config, frame_rate: float) -> float:
    """Of a sample on disk: its audio, prompt and delay in every stream; without text, which seldom makes it longer."""
    timing, streams = timing_of(config), config.streams
    frames = (_num_seconds(utterance) or 0.0) * frame_rate + timing.speech_origin(utterance.task)
    frames += timing.task_delay if utterance.task.hears else 0
    return frames * streams.num_streams * np.dtype(token_type(streams.cardinalities)).itemsize + SAMPLE_BYTES


def _num_seconds(utterance: Utterance) -> float | None:
    """Of the longest recording; None where one does not name its length, 0 where there is none."""
    lengths = [recording.seconds for recording in utterance.recordings]
    return None if None in lengths else max(lengths, default=0.0)


def _short(value: float) -> str:
    """Three digits, or all of a whole number: 0.253, 31.4, 1,000,000."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def estimate_table(estimates: Sequence[Estimate], *, encode_rate: float | None = None) -> Table:
    """For a terminal. `encode_rate` is that of one GPU, in times real time."""
    table = Table("split", "source", title="To be prepared")
    for column in ("units", "samples", "hours", "shards", "GB", "GPU-hours"):
        table.add_column(column, justify="right")
    counts = [field.name for field in fields(Estimate) if field.name.startswith("num_")]
    total = Estimate("all", "", **{name: sum(getattr(one, name) for one in estimates) for name in (*counts, "hours")})
    for one in (*estimates, total):
        table.add_row(
            *(one.split, one.source, f"{one.num_units:,}", f"{one.num_samples:,.0f}", _short(one.hours)),
            *(f"{one.num_shards:,.0f}", _short(one.num_bytes / 1e9)),
            _short(one.hours / encode_rate) if encode_rate else "-",
            end_section=one is estimates[-1],
        )
    notes = {
        f"from {MOST_UNITS} units of each source and split, evenly spread": total.num_read < total.num_units,
        f"{total.num_unknown:,.0f} samples name no duration and count as none": total.num_unknown,
        f"{total.num_refused:,.0f} lines are faulty": total.num_refused,
        "GPU-hours to encode: --encode-rate, which tools/measure_codecs.py measures": encode_rate is None,
    }
    table.caption = "; ".join(note for note, holds in notes.items() if holds)
    return table
