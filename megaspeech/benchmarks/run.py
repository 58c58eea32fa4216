"""A whole run: the floors of the machine, then every case in a process of its own; a fault costs one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from megaspeech.benchmarks.aims import Judged, judge
from megaspeech.benchmarks.apart import call_apart
from megaspeech.benchmarks.case import OURS, Case, config_of
from megaspeech.benchmarks.figures import FP8_PRODUCT, Row, extrapolated, row_of
from megaspeech.benchmarks.step import Measured, measure_case
from megaspeech.kernels.benchmarks import measuring
from megaspeech.kernels.benchmarks.machine import describe_machine
from megaspeech.kernels.benchmarks.rows import SKIPPED
from megaspeech.planning.gpus import Gpu, find_gpu

MILLISECONDS = 300
"""How long each floor is repeated."""
PACKAGES = ("triton", "megatron-core", "transformer-engine", "moshi")


@dataclass(frozen=True)
class Report:
    """All of a run: the machine, its floors by unit, a row a case, the aims."""

    machine: dict[str, Any]
    floors: dict[str, float | None]
    rows: list[Row]
    aims: list[Judged]


def run(cases: list[Case], *, minutes: float, hear: Callable[[str], None]) -> Report:
    """Measure the cases in order.

    Args:
        cases: of one machine, this one.
        minutes: what has not begun by then is skipped.
        hear: is called with a line for every step.

    Raises:
        ValueError: a case that no machine could run.
        RuntimeError: the floors could not be measured.
    """
    end, rows = perf_counter() + 60 * minutes, []
    measured, fault = call_apart(measure_floors, hear=hear)
    if fault:
        raise RuntimeError(f"the floors of this machine: {fault}")
    machine, floors = measured
    for case in cases:
        outcome: Measured | str
        if perf_counter() < end:
            outcome, fault = call_apart(measure_case, case, hear=hear)
            outcome = fault or outcome
        else:
            outcome = f"{SKIPPED}: the {minutes:g} minutes were up"
        rows.append(row_of(case, config_of(case), outcome, floors=floors, gpu=find_gpu(machine["device"])))
    rows += _whole_peers(cases, rows, floors=floors, gpu=find_gpu(machine["device"]))
    return Report(machine, floors, rows, judge(rows, is_gpu=machine["device"] != "cpu"))


def _whole_peers(cases: list[Case], rows: list[Row], *, floors: dict[str, float | None], gpu: Gpu | None) -> list[Row]:
    """What a peer would take for as many layers as we were measured at, where it was not measured itself."""
    peers = [case for case in cases if case.provider != OURS]
    if not peers:
        return []
    known = [row for row in rows if row.provider != OURS]
    wanted = dict.fromkeys(case.num_layers for case in cases if case.provider == OURS)
    configs = [config_of(replace(peers[0], num_layers=layers)) for layers in wanted]
    found = [extrapolated(known, config, floors=floors, gpu=gpu) for config in configs]
    return [row for row in found if row]


def measure_floors(*, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, float | None]]:
    """(the machine, the rates of a copy and of BF16 and FP8 products on its device)."""
    say("floors")
    device = torch.accelerator.current_accelerator()
    where = {"device": device.type if device else "cpu", "milliseconds": MILLISECONDS}
    machine = describe_machine(where["device"], packages=PACKAGES)
    return machine, {**measuring.floors(**where), FP8_PRODUCT: measuring.fp8_product(**where)}
