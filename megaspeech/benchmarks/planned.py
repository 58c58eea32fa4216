"""What the planner says of a case, beside what was measured of it: its constants are fitted to the difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megaspeech.benchmarks.case import Case, config_of
from megaspeech.config import Config
from megaspeech.planning.gpus import Gpu, find_gpu
from megaspeech.planning.nodes import NODES
from megaspeech.planning.search import Machine, plan_of

MEMORY_WITHIN, TIME_WITHIN = 0.10, 0.15
"""What is asked of the planner: shares of the measured figures."""


def planned_figures(config: Config, *, gpu: Gpu | None) -> dict[str, float | None]:
    """`planned_ms` of a step alone on a GPU and `planned_bytes` that PyTorch allocates for it at most; None where there
    is no data sheet, and of FP32, for which nothing is planned."""
    if gpu is None or config.precision.recipe == "fp32":
        return {"planned_ms": None, "planned_bytes": None}
    plan = plan_of(config, Machine(gpu, NODES[0], num_gpus=1))
    return {"planned_ms": 1e3 * plan.time.seconds, "planned_bytes": plan.fullest.allocated}


def off(planned: float | None, measured: float | None) -> float | None:
    """How far a planned figure is from the measured one, as a share of it; None where one is missing."""
    return abs(planned / measured - 1) if planned and measured else None


def deviations(report: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """How far today's planner is from the rows of a report, the JSON of `tools/measure_throughput.py`, that it planned
    for when they were measured: (of time, of memory) by the case's name."""
    gpu, found = find_gpu(report["machine"]["device"]), {}
    for row in report["rows"]:
        if row["planned_ms"] is None:
            continue
        sizes = ("provider", "model", "num_layers", "recipe", "frames", "sample_frames", "micro_batch_size")
        case = Case(*(row[name] for name in sizes), overrides=tuple(row["overrides"]))
        planned = planned_figures(config_of(case), gpu=gpu)
        pairs = (planned["planned_ms"], row["step_ms"]), (planned["planned_bytes"], row["peak_bytes"])
        found[case.name] = tuple(off(*pair) for pair in pairs)
    return found
