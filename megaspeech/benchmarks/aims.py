"""What a training step is to reach, in figures, and whether it does. The worst case counts, not the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megaspeech.benchmarks.figures import Row, by_provider
from megaspeech.benchmarks.planned import MEMORY_WITHIN, TIME_WITHIN, off
from megaspeech.kernels.benchmarks.aims import worst_of

AIMED_AT = "set for one H200, model 8b, 16,384 frames a step or more"
PUBLISHED = (
    "Published beside: NVIDIA's pair of an 8B in FP8 and BF16 is 1.34x apart; the best published 8B in FP8 reaches 744 "
    "TFLOP/s on an H100; moshi-finetune states about 12,000 tokens/s = 1,300 frames/s on an H100, for adapters (LoRA)"
)


@dataclass(frozen=True)
class Aim:
    """A bound on a figure of the measured rows of one number of layers: our BF16, our fastest FP8, the peer's."""

    text: str
    bound: float
    figure: Callable[[Row | None, Row | None, Row | None], float | None]
    is_least: bool = True


@dataclass(frozen=True)
class Judged:
    """An aim and its worst case, `num_layers` of it. `verdict`: pass, fail, not measured."""

    text: str
    bound: float
    verdict: str
    worst: float | None
    num_layers: int | None


def _times(row: Row | None, other: Row | None) -> float | None:
    return row.frames_per_second / other.frames_per_second if row and other else None


def _depth(row: Row | None) -> float | None:
    return row.depth_share_of_time / row.depth_share_of_flops if row and row.parts_ms else None


def _worst_off(*pairs: tuple[float | None, float | None]) -> float | None:
    return max((share for pair in pairs if (share := off(*pair)) is not None), default=None)


AIMS = (
    Aim("BF16: share of the measured matrix product's rate", 0.55, lambda bf16, _, __: bf16 and bf16.share_of_product),
    Aim("fastest FP8 recipe: times BF16", 1.4, lambda bf16, fp8, _: _times(fp8, bf16)),
    Aim("BF16: times the moshi peer", 2.0, lambda bf16, _, peer: _times(bf16, peer)),
    Aim("fastest FP8 recipe: times the moshi peer", 3.0, lambda _, fp8, peer: _times(fp8, peer)),
    Aim(
        "BF16: depth transformer's share of the time over its share of the FLOPs",
        1.3,
        lambda bf16, _, __: _depth(bf16),
        is_least=False,
    ),
    Aim(
        "the planner's memory, off the measured peak",
        MEMORY_WITHIN,
        lambda bf16, fp8, _: _worst_off(*((row.planned_bytes, row.peak_bytes) for row in (bf16, fp8) if row)),
        is_least=False,
    ),
    Aim(
        "the planner's step, off the measured time",
        TIME_WITHIN,
        lambda bf16, fp8, _: _worst_off(*((row.planned_ms, row.step_ms) for row in (bf16, fp8) if row)),
        is_least=False,
    ),
)


def judge(rows: list[Row], *, is_gpu: bool) -> list[Judged]:
    """Every aim; on a CPU, of which nothing is wanted, none is measured."""
    return [_judge(aim, rows if is_gpu else []) for aim in AIMS]


def _judge(aim: Aim, rows: list[Row]) -> Judged:
    layers = sorted({row.num_layers for row in rows})
    cases = [(aim.figure(*by_provider(rows, num_layers=number)), number) for number in layers]
    figures = [(figure, number) for figure, number in cases if figure is not None]
    return Judged(aim.text, aim.bound, *worst_of(figures, bound=aim.bound, is_least=aim.is_least))
