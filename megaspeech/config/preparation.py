"""What `tools/prepare_data.py` makes shards of, and how: sources, decoding, augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

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
    hours: float = Field(0.0, ge=0)
    """Of audio, of a source whose manifests are not there yet: for what `--dry-run` reckons, and nothing else."""
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


Chance = Annotated[float, Field(ge=0, le=1)]


class AugmentationSection(Section):
    """What is done to the audio that a model hears, before it is encoded; deterministic by `run.seed`.

    `share` and `copies` say how many recordings are altered; the chances below say how, each by itself, and one that
    is altered has at least one of them. A pair is a range, drawn from evenly. docs/augmentation.md tells what they do.
    """

    share: Chance = 0.0
    """Of the recordings, altered in place: the clean one is not trained on."""
    copies: Natural = 0
    """Altered versions of every recording beside the first, each a sample of its own."""
    valid: bool = False
    """Whether validation hears altered audio too."""
    noise: Chance = 0.0
    noise_files: str = ""
    """A folder of audio, or NeMo's JSONL (`audio_filepath`, and if known `offset`, `duration`)."""
    noise_snr: tuple[float, float] = (0.0, 20.0)
    """Decibels of speech over noise, both where they sound."""
    babble: Chance = 0.0
    """Of several people at once in the background: other recordings of the same unit."""
    babble_talkers: tuple[Positive, Positive] = (3, 8)
    babble_snr: tuple[float, float] = (5.0, 20.0)
    talker: Chance = 0.0
    """Of one other talker, who begins later than the first."""
    talker_snr: tuple[float, float] = (0.0, 15.0)
    room: Chance = 0.0
    room_files: str = ""
    """Measured impulse responses, given as `noise_files` are; without any, rooms are simulated."""
    reverberation: tuple[float, float] = (0.2, 0.8)
    """Seconds in which a simulated room's sound falls by 60 dB."""
    speed: Chance = 0.0
    speed_factor: tuple[float, float] = (0.9, 1.1)
    """Above 1 is faster and higher; word times follow. Not where the model answers on the clock of what it hears."""
    telephone: Chance = 0.0
    """Of 300 to 3,400 Hz in the 8 bits of ITU-T G.711."""
    level: Chance = 0.0
    level_db: tuple[float, float] = (-20.0, 0.0)
    """Gain in decibels."""

    @property
    def is_on(self) -> bool:
        """Whether anything is altered at all."""
        return self.share > 0 or self.copies > 0


EFFECTS = ("speed", "room", "talker", "babble", "noise", "telephone", "level")
"""The chances of `[augmentation]`, in the order in which they are applied."""


def augmentation_faults(sections: Mapping[str, Any], _: int | None) -> Iterator[str]:
    """Ranges the wrong way round, chances without effect, files that are lacking; as every check of checks.py."""
    section = sections["augmentation"]
    ranges = [name for name, value in section if isinstance(value, tuple)]
    for name in ranges:
        low, high = getattr(section, name)
        if low > high:
            yield f"augmentation.{name}: [{low}, {high}] is the wrong way round; put the lower bound first"
    if section.speed_factor[0] < 0.5 or section.speed_factor[1] > 2:
        yield f"augmentation.speed_factor: {list(section.speed_factor)} reaches out of 0.5 to 2; 0.9 to 1.1 is usual"
    if section.reverberation[0] < 0.2 or section.reverberation[1] > 2:
        yield f"augmentation.reverberation: {list(section.reverberation)} reaches out of 0.2 to 2 s"
    chosen = [name for name in EFFECTS if getattr(section, name) > 0]
    if chosen and not section.is_on:
        yield f"augmentation.{chosen[0]}: alters nothing while share and copies are 0; set one of them"
    if section.is_on and not chosen:
        key = "share" if section.share else "copies"
        yield f"augmentation.{key}: {getattr(section, key)}, but no effect has a chance; set {' or '.join(EFFECTS)}"
    if section.noise > 0 and not section.noise_files:
        yield "augmentation.noise: noise_files names none; name a folder or a manifest, or use babble alone"
