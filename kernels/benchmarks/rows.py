"""What a run of the benchmarks finds, as it is written to JSON: a row for each direction of each case and provider."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megaspeech.kernels.benchmarks.providers import COMPILED, EAGER

MEASURED, SKIPPED, NOT_INSTALLED, CHECK_FAILED = "measured", "skipped", "not installed", "check failed"
OUT_OF_MEMORY, FAILED = "out of memory", "failed"
"""What a row's status is, or begins with."""
DIRECTIONS = ("forward", "backward")
Case = tuple[str, str, int]
"""(operation, model, frames)."""


@dataclass(frozen=True)
class Row:
    """One direction of one provider in one case.

    `status` is "measured", or says why there are no figures.
    `rate` is in `unit`; `speedup` says how many times faster than "eager" and "compile" this is.
    """

    operation: str
    model: str
    frames: int
    dtype: str
    provider: str
    direction: str
    status: str
    unit: str
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    rate: float | None = None
    share_of_floor: float | None = None
    peak_bytes: int | None = None
    speedup: dict[str, float] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        """What it was measured at."""
        return self.operation, self.model, self.frames

    @property
    def is_ours(self) -> bool:
        """Whether one of our kernels was measured."""
        return self.provider.startswith("triton")

    @property
    def is_fault(self) -> bool:
        """Whether figures are missing through the provider's own fault."""
        return self.status != MEASURED and not self.status.startswith((SKIPPED, NOT_INSTALLED))


Measurements = dict[str, dict[str, Row]]
"""Rows of one case: provider, then direction."""


def by_case(rows: list[Row]) -> dict[Case, Measurements]:
    """The rows, to be looked up."""
    cases: dict[Case, Measurements] = {}
    for row in rows:
        cases.setdefault(row.case, {}).setdefault(row.provider, {})[row.direction] = row
    return cases


def total_ms(case: Measurements, provider: str, directions: tuple[str, ...]) -> float | None:
    """Medians of the directions, added; None where there is one without."""
    times = [case[provider][direction].median_ms for direction in directions] if provider in case else [None]
    return None if None in times else sum(times)


def speedup_over(
    case: Measurements, provider: str, others: tuple[str, ...], *, directions: tuple[str, ...]
) -> float | None:
    """How many times faster than the fastest of `others`; None where that was not measured."""
    mine = total_ms(case, provider, directions)
    theirs = [time for other in others if (time := total_ms(case, other, directions)) is not None]
    return min(theirs) / mine if mine and theirs else None


def with_speedups(rows: list[Row]) -> list[Row]:
    """The rows with `speedup` filled in."""
    cases, done = by_case(rows), []
    for row in rows:
        kinds = {"eager": EAGER[row.operation], "compile": COMPILED[row.operation]}
        found = {
            kind: speedup_over(cases[row.case], row.provider, others, directions=(row.direction,))
            for kind, others in kinds.items()
        }
        done.append(replace(row, speedup={kind: value for kind, value in found.items() if value is not None}))
    return done


@dataclass(frozen=True)
class Report:
    """All of a run. `machine` names it; `floors` by unit; `checks` are the errors of each provider."""

    machine: dict[str, Any]
    floors: dict[str, float]
    checks: list[dict[str, Any]]
    rows: list[Row]
