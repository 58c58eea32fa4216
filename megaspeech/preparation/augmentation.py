"""What is done to the audio that a model hears, drawn from a seed: noise, babble, talkers, rooms, speed.

Everything is drawn from `run.seed` and a recording's own name (the end of its path, start, channel), never from an
order, a batch or an array index; which recordings babble in the background, from those of its unit. So a plan can be
drawn anywhere, in any order, before a sound is decoded. A recording carries its plan (`Recording.plan`) and so is
another one than the same stretch without it, or with another. As the preparation uses it:

    augmenter = Augmenter(config.augmentation, seed=config.run.seed, utterances=unit)
    versions = [version for line in unit for version in augmenter.versions(line)]
    background = {one: decoded(one) for one in others_of(recordings)}          # those that can be decoded
    waveform = alter(waveform, recording.plan, sample_rate=24000, background=background)

Every effect has draws of its own: to change the chance of one leaves what is drawn for the others as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import xxhash

from megaspeech.config.preparation import EFFECTS, AugmentationSection
from megaspeech.preparation.recording import Layer, Plan, Recording
from megaspeech.preparation.rooms import draw_room
from megaspeech.preparation.sounds import find_sounds, stretch_of
from megaspeech.preparation.utterance import Utterance

NUM_VOICES = 64
"""Recordings of a unit that may be heard behind others, and noises, and responses: they are decoded once and kept."""
LONGEST = 30.0
"""Seconds of each of them."""
NUM_ROOMS = 100
"""Rooms of a run: a process simulates each once, in some tenths of a second."""
_MIXED = ("talker", "babble", "noise")


class Augmenter:
    """Draws what is done to the recordings of one unit."""

    def __init__(self, settings: AugmentationSection, *, seed: int, utterances: Sequence[Utterance]) -> None:
        """Args:
            settings: `[augmentation]`.
            seed: `run.seed`.
            utterances: the unit's, in any order.

        Raises:
            ValueError: `noise_files` or `room_files` name nothing.
        """
        self._settings, self._seed = settings, seed
        self._voices = self._choose_voices(utterances)
        self._noises = self._choose_files("noise") if settings.noise else []
        self._responses = self._choose_files("room") if settings.room and settings.room_files else []

    def versions(self, utterance: Utterance, *, max_seconds: float = math.inf) -> tuple[Utterance, ...]:
        """The samples that a line becomes: the first one, as it is or altered, and `copies` altered ones.

        A line that hears nothing stays as it is, and so does one to which nothing can be done (it alone in its unit
        cannot have babble). None is slowed to more than `max_seconds`, which is what can be trained on.
        """
        if utterance.heard is None:
            return (utterance,)
        is_altered = self._draws(utterance.heard, 0, "share").random() < self._settings.share
        numbers = [*range(1, self._settings.copies + 1)]
        plans = [self.plan(utterance, version=number, max_seconds=max_seconds) for number in numbers]
        first = self.plan(utterance, version=len(numbers) + 1, max_seconds=max_seconds) if is_altered else None
        copies = tuple(utterance.altered(plan) for plan in plans if plan is not None)
        return (utterance if first is None else utterance.altered(first), *copies)

    def plan(self, utterance: Utterance, *, version: int, max_seconds: float = math.inf) -> Plan | None:
        """What is done to what a line hears, at least one thing; None if nothing can be."""
        heard, settings = utterance.heard, self._settings
        assert heard is not None
        voices = self._voices_behind(utterance)
        possible = {name: getattr(settings, name) for name in EFFECTS}
        slowest, fastest = settings.speed_factor
        slowest = max(slowest, (heard.seconds or 0.0) / max_seconds)
        if utterance.spoken is not None or slowest > fastest:
            possible["speed"] = 0.0
        if not voices:
            possible["talker"] = possible["babble"] = 0.0
        possible = {name: chance for name, chance in possible.items() if chance > 0}
        if not possible:
            return None
        chosen = {name for name, chance in possible.items() if self._draws(heard, version, name).random() < chance}
        if not chosen:
            weights = np.array(list(possible.values()))
            chosen = {str(self._draws(heard, version, "one").choice(list(possible), p=weights / weights.sum()))}
        return self._draw_plan(heard, version, chosen=chosen, voices=voices, speeds=(slowest, fastest))

    def _draw_plan(
        self,
        heard: Recording,
        version: int,
        *,
        chosen: set[str],
        voices: Sequence[Recording],
        speeds: tuple[float, float],
    ) -> Plan:
        """The particulars of the chosen effects."""
        settings, plan = self._settings, Plan(version)
        draws = {name: self._draws(heard, version, f"{name} how") for name in chosen}
        if "speed" in chosen:
            plan = replace(plan, speed=math.ceil(1000 * draws["speed"].uniform(*speeds)) / 1000)
        if "room" in chosen:
            plan = replace(plan, room=self._draw_place(draws["room"]))
        if "level" in chosen:
            plan = replace(plan, level_db=round(float(draws["level"].uniform(*settings.level_db)), 1))
        layers = [self._draw_layer(kind, draws[kind], voices=voices) for kind in _MIXED if kind in chosen]
        return replace(plan, layers=tuple(layers), telephone="telephone" in chosen)

    def _draw_place(self, rng: np.random.Generator):
        if self._responses:
            return self._responses[rng.integers(len(self._responses))]
        number = int(rng.integers(NUM_ROOMS))
        return draw_room(self._generator("room", number), reverberation=self._settings.reverberation)

    def _draw_layer(self, kind: str, rng: np.random.Generator, *, voices: Sequence[Recording]) -> Layer:
        if kind == "noise":
            recordings = [self._noises[rng.integers(len(self._noises))]]
        else:
            low, high = self._settings.babble_talkers if kind == "babble" else (1, 1)
            count = min(int(rng.integers(low, high + 1)), len(voices))
            recordings = [voices[index] for index in rng.choice(len(voices), count, replace=False)]
        offsets = tuple(round(float(offset), 4) % 1 for offset in rng.random(len(recordings)))
        low, high = getattr(self._settings, f"{kind}_snr")
        return Layer(kind, tuple(recordings), offsets, snr=round(float(rng.uniform(low, high)), 2))

    def _choose_voices(self, utterances: Iterable[Utterance]) -> list[tuple[Recording, str]]:
        """(recording, speaker) of those that have the lowest hashes: the same in whatever order a unit is read."""
        heard = {_name(line.heard): (line.heard, line.speaker) for line in utterances if line.heard is not None}
        names = sorted(heard, key=lambda name: (self._hash("voice", name), name))[:NUM_VOICES]
        return [(stretch_of(one, longest=LONGEST), speaker) for one, speaker in (heard[name] for name in names)]

    def _choose_files(self, effect: str) -> list[Recording]:
        """Up to `NUM_VOICES` stretches of the user's files, others for other units."""
        key = f"{effect}_files"
        found = find_sounds(getattr(self._settings, key), key=f"augmentation.{key}")
        rng = self._generator(effect, *(_name(voice) for voice, _ in self._voices))
        chosen = rng.permutation(len(found))[:NUM_VOICES]
        drawn = rng if effect == "noise" else None  # a response begins where it begins
        return [stretch_of(found[index], longest=LONGEST, rng=drawn) for index in chosen]

    def _voices_behind(self, utterance: Utterance) -> list[Recording]:
        """The unit's voices without a line's own: of another file, and of another speaker where that is known."""
        own = utterance.heard
        return [
            voice
            for voice, speaker in self._voices
            if (voice.path, voice.span) != (own.path, own.span) and not (speaker and speaker == utterance.speaker)
        ]

    def _draws(self, recording: Recording, version: int, what: str) -> np.random.Generator:
        return self._generator(what, version, _name(recording))

    def _generator(self, *what: object) -> np.random.Generator:
        return np.random.default_rng(self._hash(*what))

    def _hash(self, *what: object) -> int:
        return xxhash.xxh64_intdigest("\n".join(map(str, (self._seed, *what))).encode(errors="surrogatepass"))


def others_of(recordings: Iterable[Recording]) -> list[Recording]:
    """Every recording that the plans of others need, once, in order."""
    plans = (recording.plan for recording in recordings if recording.plan is not None)
    return list(dict.fromkeys(other for plan in plans for other in plan.others))


def _name(recording: Recording) -> str:
    """Who a recording is, wherever the folder that holds it lies."""
    return f"{'/'.join(recording.path.parts[-3:])} {recording.span} {recording.start!r} {recording.channel}"
