"""What the kernels are for, in figures, and whether they reach it. The worst case counts, not the average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megaspeech.kernels.benchmarks.providers import COMPILED, EAGER
from megaspeech.kernels.benchmarks.rows import Measurements, Row, by_case, speedup_over

OURS = "triton"
FORWARD, BACKWARD, BOTH = ("forward",), ("backward",), ("forward", "backward")


@dataclass(frozen=True)
class Aim:
    """A bound on a figure of every case of an operation; `figure` is None where there is nothing to compare with."""

    operation: str
    text: str
    bound: float
    figure: Callable[[Measurements], float | None]
    is_least: bool = True


@dataclass(frozen=True)
class Judged:
    """An aim and its worst case; `cases` that had a figure, of `all_cases`. `verdict`: pass, fail, not measured."""

    operation: str
    text: str
    bound: float
    verdict: str
    worst: float | None
    worst_case: str | None
    cases: int
    all_cases: int


def _share(direction: str) -> Callable[[Measurements], float | None]:
    return lambda case: case[OURS][direction].share_of_floor


def _speedup(others: tuple[str, ...], directions: tuple[str, ...]) -> Callable[[Measurements], float | None]:
    return lambda case: speedup_over(case, OURS, others, directions=directions)


def _memory(case: Measurements) -> float | None:
    """Our peak over eager's."""
    eager = EAGER[case[OURS]["forward"].operation][0]
    ours, theirs = ([row.peak_bytes for row in case.get(name, {}).values()] for name in (OURS, eager))
    return max(ours) / max(theirs) if ours and theirs and None not in ours + theirs else None


_STREAMS, _ATTENTION, _ENTROPY = "stream_embedding", "depth_attention", "codebook_cross_entropy"
AIMS = (
    Aim(_STREAMS, "forward: share of the copy's GB/s", 0.85, _share("forward")),
    Aim(_STREAMS, "forward: times eager embeddings", 4.0, _speedup(EAGER[_STREAMS], FORWARD)),
    Aim(_STREAMS, "forward: times torch.compile", 1.5, _speedup(COMPILED[_STREAMS], FORWARD)),
    Aim(_STREAMS, "backward: share of the copy's GB/s", 0.60, _share("backward")),
    Aim(_STREAMS, "backward: times eager embeddings", 3.0, _speedup(EAGER[_STREAMS], BACKWARD)),
    Aim(_ATTENTION, "forward: times SDPA, in its faster layout", 3.0, _speedup(EAGER[_ATTENTION], FORWARD)),
    Aim(_ATTENTION, "backward: times SDPA, in its faster layout", 3.0, _speedup(EAGER[_ATTENTION], BACKWARD)),
    Aim(_ENTROPY, "forward and backward: times eager", 1.0, _speedup(EAGER[_ENTROPY], BOTH)),
    Aim(_ENTROPY, "peak memory: share of eager's", 1 / 8, _memory, is_least=False),
)


def worst_of(
    figures: Sequence[tuple[float, Any]], *, bound: float, is_least: bool
) -> tuple[str, float | None, Any | None]:
    """(verdict, figure, where) of the worst of some (figure, where): "pass" where it is on the right side of the bound,
    "fail" where not, "not measured" without any."""
    worst, where = (min if is_least else max)(figures, default=(None, None))
    if worst is None:
        return "not measured", None, None
    return "pass" if (worst >= bound if is_least else worst <= bound) else "fail", worst, where


def judge(rows: list[Row]) -> list[Judged]:
    """Every aim. A case that our kernel failed fails the aim; one that only its opponent failed is left out."""
    return [_judge(aim, [case for key, case in by_case(rows).items() if key[0] == aim.operation]) for aim in AIMS]


def _judge(aim: Aim, cases: list[Measurements]) -> Judged:
    ours = [case for case in cases if OURS in case]
    broken = [_name(case) for case in ours if any(row.is_fault for row in case[OURS].values())]
    figures = [(figure, _name(case)) for case in ours if (figure := aim.figure(case)) is not None]
    verdict, worst, where = worst_of(figures, bound=aim.bound, is_least=aim.is_least)
    if broken:
        verdict, where = "fail", broken[0]
    return Judged(aim.operation, aim.text, aim.bound, verdict, worst, where, len(figures), len(cases))


def _name(case: Measurements) -> str:
    row = case[OURS]["forward"]
    return f"{row.model}, {row.frames:,} frames"
