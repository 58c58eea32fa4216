"""A stretch of audio, and what is done to it before it is encoded: drawn in augmentation.py, done in effects.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Recording:
    """A stretch of one audio file, as one waveform.

    Attributes:
        path: the file, or the archive (tar) that holds it.
        start, end: seconds; `end` None is the end of the file.
        channel: which one, from 0; None mixes all of them.
        duration: of the stretch in seconds, as the manifest has it; None where it does not say.
        span: (first byte, number of bytes) of the file within an archive.
        plan: what is done to the waveform once it is decoded (`[augmentation]`); None is nothing.
            `duration` and the rest describe it as it is before.
    """

    path: Path
    start: float = 0.0
    end: float | None = None
    channel: int | None = None
    duration: float | None = None
    span: tuple[int, int] | None = None
    plan: Plan | None = None

    @property
    def seconds(self) -> float | None:
        """Its length; None where the manifest does not say."""
        if self.duration is None and self.end is not None:
            return self.end - self.start
        return self.duration


@dataclass(frozen=True)
class Room:
    """A box-shaped room with a talker and a microphone; metres from a corner.

    Attributes:
        reverberation: seconds in which the sound falls by 60 dB.
    """

    size: Point
    talker: Point
    microphone: Point
    reverberation: float


@dataclass(frozen=True)
class Layer:
    """Sounds that are mixed in together.

    Attributes:
        kind: "talker" is one voice that begins at `offsets[0]` of the main one's length and ends with it at the latest;
            "babble" and "noise" last from beginning to end, each sound taken from `offsets[i]` of its own length on and
            repeated.
        offsets: in [0, 1), one a recording.
        snr: decibels of the main voice over all of it.
    """

    kind: Literal["talker", "babble", "noise"]
    recordings: tuple[Recording, ...]
    offsets: tuple[float, ...]
    snr: float


@dataclass(frozen=True)
class Plan:
    """What is done to one recording, in this order.

    Attributes:
        version: counts the altered versions of one recording, from 1.
        speed: factor; above 1 is faster and higher.
        room: where it sounds: a simulated room, or a recorded impulse response.
        layers: what is mixed in.
        telephone: whether it goes through a telephone line.
        level_db: gain in decibels.
    """

    version: int
    speed: float = 1.0
    room: Room | Recording | None = None
    layers: tuple[Layer, ...] = ()
    telephone: bool = False
    level_db: float = 0.0

    @property
    def others(self) -> tuple[Recording, ...]:
        """Every other recording that is needed to do it."""
        response = (self.room,) if isinstance(self.room, Recording) else ()
        return response + tuple(recording for layer in self.layers for recording in layer.recordings)

    @property
    def effects(self) -> tuple[str, ...]:
        """What it consists of, in the names of `[augmentation]`: for a report to count."""
        done = {
            "speed": self.speed != 1.0,
            "room": self.room is not None,
            **{layer.kind: True for layer in self.layers},
            "telephone": self.telephone,
            "level": self.level_db != 0.0,
        }
        return tuple(name for name, is_done in done.items() if is_done)
