"""Tables of rules: which tensors of one side are which of the other, and how the numbers are laid out there.

A format is a list of `Rule`s. Each names the native tensors and the foreign ones that hold the same numbers, and a
`Layout` that turns the ones into the others, in both directions. So one table reads and writes, and a round trip gives
back every bit. Layouts only move numbers; they are run on tensors of the meta device to learn shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from megaspeech.conversion.deferred import Deferred, Weights

Move: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Layout(Protocol):
    """How the numbers of a rule's native tensors lie in its foreign ones."""

    def to_foreign(self, native: Sequence[Tensor]) -> Sequence[Tensor]:
        """The foreign tensors, in the rule's order."""
        ...

    def to_native(self, foreign: Sequence[Tensor]) -> Sequence[Tensor]:
        """The native tensors, in the rule's order."""
        ...


@dataclass(frozen=True)
class Rule:
    """The foreign tensors that hold the numbers of the native ones."""

    native: tuple[str, ...]
    foreign: tuple[str, ...]
    layout: Layout


def to_foreign(weights: Weights, rules: Iterable[Rule]) -> dict[str, Deferred]:
    """Native weights under foreign names, unread.

    Raises:
        ValueError: a tensor that a rule names is not there.
    """
    found: dict[str, Deferred] = {}
    for rule in rules:
        found |= _applied(weights, given=rule.native, wanted=rule.foreign, move=rule.layout.to_foreign)
    return found


def to_native(weights: Weights, rules: Iterable[Rule]) -> dict[str, Deferred]:
    """Foreign weights under native names, unread.

    Raises:
        ValueError: a tensor that a rule names is not there, or has a shape that the rule's layout cannot take.
    """
    found: dict[str, Deferred] = {}
    for rule in rules:
        found |= _applied(weights, given=rule.foreign, wanted=rule.native, move=rule.layout.to_native)
    return found


def _applied(weights: Weights, *, given: tuple[str, ...], wanted: tuple[str, ...], move: Move) -> dict[str, Deferred]:
    """`wanted` tensors made of `given` ones; the last reading is kept until another rule is read."""
    missing = [name for name in given if name not in weights]
    if missing:
        raise ValueError(f"tensor {missing[0]} is missing ({len(missing)} of {len(given)} that belong together)")
    sources = [weights[name] for name in given]
    try:
        shapes = move([torch.empty(one.shape, dtype=one.dtype, device="meta") for one in sources])
    except (RuntimeError, ValueError, IndexError) as error:
        described = ", ".join(f"{name} {list(weights[name].shape)}" for name in given)
        raise ValueError(f"{described} cannot be made into {', '.join(wanted)}: {error}") from error
    assert len(shapes) == len(wanted), (given, wanted)

    def made() -> Sequence[Tensor]:
        return move([one.read() for one in sources])

    reading = _LastReading(made)
    return {
        name: Deferred(tuple(meta.shape), meta.dtype, reading.part(index))
        for index, (name, meta) in enumerate(zip(wanted, shapes, strict=True))
    }


class _LastReading:
    """The parts of a rule, made together: as they are mostly asked for one after the other, the last made are kept."""

    _kept: tuple[_LastReading, Sequence[Tensor]] | None = None
    """Of all rules, one: a conversion holds no more than that."""

    def __init__(self, made: Callable[[], Sequence[Tensor]]) -> None:
        self.made = made

    def part(self, index: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            kept = _LastReading._kept
            if kept is None or kept[0] is not self:
                _LastReading._kept = None  # before, not after: two of them would not fit
                kept = _LastReading._kept = (self, self.made())
            return kept[1][index]

        return read


def forget() -> None:
    """Let go of what was read last."""
    _LastReading._kept = None
