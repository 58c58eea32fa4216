"""Garbage is collected at the steps that are named, and only there."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from megaspeech.training.garbage import collected_at_steps


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations collected since."""
    seen: list[int] = []

    def note(phase: str, info: dict) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def test_only_at_those_steps(collections: list[int]) -> None:
    with collected_at_steps(3) as done:
        del collections[:]
        counts = []
        for step in range(1, 8):
            rings = [[] for _ in range(20_000)]  # enough for the collector to wake up, were it awake
            done(step)
            counts.append(len(collections))
            del rings
    assert counts == [0, 0, 1, 1, 1, 2, 2]
    assert gc.isenabled()


def test_the_collector_is_given_back_after_an_error() -> None:
    with pytest.raises(ValueError), collected_at_steps(3):
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()


def test_zero_leaves_it_alone(collections: list[int]) -> None:
    with collected_at_steps(0) as done:
        del collections[:]
        assert gc.isenabled()
        done(1)
    assert not collections
