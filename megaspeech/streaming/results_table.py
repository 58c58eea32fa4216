"""Results of an evaluation, for people and for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

HEADER = ("task", "samples", "word error", "character error", "BLEU", "chrF", "heard: word", "heard: character")
LATENCY_HEADER = ("latency ms: median", "p99")


def table_of(result: dict[str, Any]) -> Table:
    """A line a task of what `results.evaluate` gave; of latencies those of one session at a time."""
    table = Table(*HEADER, *LATENCY_HEADER, title=f"{result['num_rejected']} set aside" * bool(result["num_rejected"]))
    for column in table.columns[1:]:
        column.justify = "right"
    for task, figures in result["tasks"].items():
        heard, latency = figures.get("heard", {}), result["latency_ms"].get(task, {})
        table.add_row(
            task,
            str(figures["num_samples"]),
            *(_percent(figures.get(key)) for key in ("word_error_rate", "character_error_rate")),
            *(_number(figures.get(key)) for key in ("bleu", "chrf")),
            *(_percent(heard.get(key)) for key in ("word_error_rate", "character_error_rate")),
            *(_number(latency.get(key), digits=0) for key in ("median", "p99")),
        )
    return table


def scalars_of(result: dict[str, Any]) -> dict[str, float]:
    """`{"asr-en/word_error_rate": 0.03, "asr-en/latency_median_ms": 201.0}`: what has a curve over the steps."""
    return dict(_scalars(result))


def _scalars(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for task, figures in result["tasks"].items():
        heard = {f"heard/{key}": value for key, value in figures.get("heard", {}).items()}
        for key, value in {**figures, **heard}.items():
            if isinstance(value, float):
                yield f"{task}/{key}", value
    for task, latency in result["latency_ms"].items():
        for key in ("median", "p99"):
            if latency[key] is not None:
                yield f"{task}/latency_{key}_ms", latency[key]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, *, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
