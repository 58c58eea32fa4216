"""What `tools/prepare_data.py` makes shards of, and how: sources, decoding, augmentation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megaspeech.config.section import Natural, Positive, Section


class SourceSection(Section):
    """One `[[sources]]`: audio with its text, as people have it. Its shards are `data.directory`/train/NAME/TASK.

    `task`, `source_lang` and `target_lang` are those of lines that name none themselves.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    format: Literal["nemo", "moshi", "lhotse", "folder"] = "nemo"
    train: str = ""
    """A manifest (a folder of audio for "folder"), or a pattern such as `manifests/*.jsonl`."""
    valid: str = ""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of the lines of `train` that are kept for validation instead, chosen by a hash of each."""
    task: str = ""
    source_lang: str = ""
    target_lang: str = ""
    weight: float = Field(1.0, gt=0)
    """In the mixture, where `data.mixture` names none."""
    augment: bool = True
    """Whether `[augmentation]` is for this source."""


class PreparationSection(Section):
    """How sources become shards. A unit of work is `lines_per_shard` lines of a manifest."""

    lines_per_shard: Positive = 5000
    num_threads: Positive = 1
    """Of the decoder, which runs beside the encoder."""
    device: str = "auto"
    """That encodes: "auto" is the accelerator where there is one, else "cpu"."""
    batch_seconds: float = Field(320.0, gt=0)
    """Audio that is encoded at once; recordings of like length are taken together."""
    read_ahead: Positive = 256
    """Recordings that are read, decoded and sorted by length ahead of the encoder."""
    loudness: float | None = Field(None, lt=0)
    """Level that every recording is brought to, in LUFS (ITU-R BS.1770); unset leaves it as it is."""
    min_seconds: float = Field(0.1, ge=0)
    max_seconds: float = Field(3600.0, gt=0)
    duration_tolerance: float = Field(0.5, gt=0)
    """Seconds by which audio may differ from what its manifest says before it is set aside."""
    silence_dbfs: float = Field(-60.0, lt=0)
    """Audio whose loudest stretch lies below is set aside as silent; decibels below full scale."""
    fit_recordings: Natural = 1500
    """Recordings that a codec without weights is fitted on."""


class AugmentationSection(Section):
    """What is done to the audio that a model hears, before it is encoded; deterministic by `run.seed`."""
