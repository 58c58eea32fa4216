"""How a room answers: impulse responses of drawn rooms, by the image source method of pyroomacoustics.

Every response starts with the direct sound at its first sample, so that what it is applied to keeps its word times.
Shapes: K samples of a response.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from megaspeech.preparation.recording import Room

_SMALLEST, _LARGEST = (3.0, 3.0, 2.4), (8.0, 7.0, 3.5)  # m
_WALL, _NEAREST, _FARTHEST = 0.5, 0.4, 2.5  # m from walls, and from talker to microphone


def draw_room(rng: np.random.Generator, *, reverberation: tuple[float, float]) -> Room:
    """A room for speech: from a small office to a meeting room, the talker 0.4 to 2.5 m from the microphone.

    Args:
        rng: what it is drawn from.
        reverberation: seconds, lowest and highest.
    """
    size = rng.uniform(_SMALLEST, _LARGEST)
    while True:
        talker, microphone = (rng.uniform(_WALL, size - _WALL) for _ in range(2))
        if _NEAREST <= np.linalg.norm(talker - microphone) <= _FARTHEST:
            break
    seconds = rng.uniform(*reverberation)
    return Room(_point(size), _point(talker), _point(microphone), round(float(seconds), 3))


def _point(values: np.ndarray) -> tuple[float, float, float]:
    return tuple(round(float(value), 2) for value in values)


@functools.lru_cache(maxsize=256)
def simulate(room: Room, *, sample_rate: int) -> np.ndarray:
    """Its impulse response, float32 `[K]`, from the direct sound to where 60 dB have decayed.

    Allen and Berkley, "Image method for efficiently simulating small-room acoustics" (1979); the walls' absorption
    from Sabine's formula.

    Raises:
        ImportError: pyroomacoustics is not installed.
    """
    acoustics = _import_acoustics()
    absorption, num_reflections = acoustics.inverse_sabine(room.reverberation, room.size)
    box = acoustics.ShoeBox(
        room.size, fs=sample_rate, materials=acoustics.Material(absorption), max_order=num_reflections
    )
    box.add_source(room.talker)
    box.add_microphone(room.microphone)
    box.compute_rir()
    response = from_direct_sound(np.asarray(box.rir[0][0]))
    return response[: round(room.reverberation * sample_rate)]


def from_direct_sound(response_K: np.ndarray) -> np.ndarray:
    """A response without what comes before its loudest sample, float32, that sample being 1: the direct sound.

    Raises:
        ValueError: it is silent.
    """
    loudest = int(np.abs(response_K).argmax()) if len(response_K) else 0
    if not len(response_K) or response_K[loudest] == 0:
        raise ValueError("the impulse response is silent")
    return (response_K[loudest:] / response_K[loudest]).astype(np.float32)


def _import_acoustics() -> Any:
    try:
        import pyroomacoustics
    except ImportError as error:
        raise ImportError(
            f"simulated rooms need pyroomacoustics ({error}): pip install megaspeech[augmentation], or name room_files"
        ) from None
    return pyroomacoustics
