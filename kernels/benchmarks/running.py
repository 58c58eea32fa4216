"""A whole run: which cases there are, each provider checked and then timed, and what a fault does: it ends no run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from megaspeech.kernels.benchmarks import checks, measuring, rows
from megaspeech.kernels.benchmarks.measuring import Measured
from megaspeech.kernels.benchmarks.operations import OPERATIONS, Inputs, Operation
from megaspeech.kernels.benchmarks.providers import PROVIDERS, Provider
from megaspeech.kernels.benchmarks.rows import Report, Row
from megaspeech.kernels.benchmarks.shapes import ModelShape

DTYPE = torch.bfloat16
"""What is timed."""
MASKED = 1 / 16
"""Share of tokens that are -1 in the checks; where time is taken, none is."""


@dataclass(frozen=True)
class Plan:
    """Every operation at every shape and number of frames, by its `providers`.

    Args:
        memory: bytes of the device; a case whose tensors alone do not fit is skipped.
        milliseconds: about how long to repeat each direction.
        minutes: what has not begun by then is skipped.
    """

    providers: dict[str, tuple[Provider, ...]]
    shapes: tuple[ModelShape, ...]
    frames: tuple[int, ...]
    device: str
    memory: float
    milliseconds: int
    minutes: float

    @property
    def num_steps(self) -> int:
        """How often `run` says that it got on."""
        per_frames = sum(len(providers) for providers in self.providers.values())
        return 1 + len(self.shapes) * (len(self.providers) + len(self.frames) * per_frames)


def run(plan: Plan, *, machine: dict[str, Any], advance: Callable[[str], None]) -> Report:
    """Check, then time; `advance` hears of each step."""
    end = perf_counter() + 60 * plan.minutes
    floors = measuring.floors(device=plan.device, milliseconds=plan.milliseconds)
    advance("floors")
    found, checked = [], []
    too_late = f"{rows.SKIPPED}: the {plan.minutes:g} minutes were up"
    for shape, name in product(plan.shapes, plan.providers):
        if perf_counter() < end:
            statuses, errors = _check(plan, OPERATIONS[name], shape)
            checked += errors
        else:
            statuses = {each.name: too_late for each in plan.providers[name]}
        advance(f"checks of {name}, {shape.name}")
        for frames in plan.frames:
            if perf_counter() >= end:
                statuses = {each: status or too_late for each, status in statuses.items()}
            for row in _measure(plan, OPERATIONS[name], shape, frames, statuses=statuses, floors=floors):
                found.append(row)
                if row.direction == rows.DIRECTIONS[-1]:
                    advance(f"{name}, {shape.name}, {frames:,} frames, {row.provider}")
    return Report(machine, floors, checked, rows.with_speedups(found))


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, str]:
    """(what the function returns, "") or (None, the status of whoever could not do it)."""
    try:
        gc.collect()  # graphs hold tensors in cycles
        torch.cuda.empty_cache()
        return function(*arguments, **options), ""
    except torch.OutOfMemoryError:
        return None, rows.OUT_OF_MEMORY
    except Exception as error:  # of whatever kind: one provider's fault must not cost the others' figures
        first, *_ = str(error).strip().splitlines() or [""]
        return None, f"{rows.FAILED}: {type(error).__name__}: {first[:100]}"


def _check(plan: Plan, operation: Operation, shape: ModelShape) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """(why each provider is not timed, "" where it is; its errors), at the fewest frames of the plan."""
    providers = plan.providers[operation.name]
    statuses = {each.name: "" if each.is_installed else f"{rows.NOT_INSTALLED}: {each.package}" for each in providers}
    found = []
    for dtype in checks.DTYPES:
        truth, fault = attempt(_truth, plan, operation, shape, dtype=dtype)
        for provider in providers:
            name = provider.name
            if statuses[name] or fault:
                statuses[name] = statuses[name] or f"{fault}, in the check's reference"
                continue
            errors, statuses[name] = attempt(_errors, provider, *truth)
            if errors is None:
                continue
            if not (passed := checks.passes(provider, errors, dtype=dtype)):
                statuses[name] = rows.CHECK_FAILED
            where = {"operation": operation.name, "model": shape.name, "provider": name, "dtype": _name(dtype)}
            found.append({**where, "passed": passed, "errors": {key: asdict(each) for key, each in errors.items()}})
        del truth
    return statuses, found


Results = dict[str, Tensor]


def _truth(
    plan: Plan, operation: Operation, shape: ModelShape, *, dtype: torch.dtype
) -> tuple[Inputs, Results, Results]:
    """(inputs, what torch makes of them, what is right)."""
    inputs = _draw(plan, operation, shape, min(plan.frames), dtype=dtype, masked=MASKED)
    reference = next(each for each in PROVIDERS[operation.name] if each.name == "reference")
    return inputs, checks.results(reference.prepare(inputs)), checks.exact_results(operation, inputs)


def _draw(plan: Plan, operation: Operation, shape: ModelShape, frames: int, **options: Any) -> Inputs:
    torch.manual_seed(0)
    return operation.draw(shape, frames, device=plan.device, **options)


def _errors(provider: Provider, inputs: Inputs, torchs: Results, exact: Results) -> dict[str, checks.Errors]:
    return checks.compare_all(checks.results(provider.prepare(inputs)), torchs, exact)


def _measure(
    plan: Plan,
    operation: Operation,
    shape: ModelShape,
    frames: int,
    *,
    statuses: dict[str, str],
    floors: dict[str, float],
) -> Iterator[Row]:
    """The rows of one case, as they come."""
    needed = operation.draw(shape, frames, dtype=DTYPE, device="meta").num_bytes
    if all(statuses.values()):
        inputs, fault = None, ""  # nobody is timed
    elif needed < plan.memory:
        inputs, fault = attempt(_draw, plan, operation, shape, frames, dtype=DTYPE)
    else:
        inputs, fault = None, f"{rows.SKIPPED}: {needed / 1e9:.0f} GB of tensors, {plan.memory / 1e9:.0f} GB of memory"
    for provider in plan.providers[operation.name]:
        measured, status = {}, statuses[provider.name] or fault
        if not status:
            measured, status = attempt(_timed, plan, provider, inputs)
        for direction in rows.DIRECTIONS:
            row = Row(
                operation.name,
                shape.name,
                frames,
                _name(DTYPE),
                provider.name,
                direction,
                status or rows.MEASURED,
                operation.unit,
            )
            if measured:
                work, floor = operation.work(inputs)[direction], floors[operation.unit]
                row = replace(row, **_figures(measured[direction], work=work, unit=operation.unit, floor=floor))
            yield row


def _timed(plan: Plan, provider: Provider, inputs: Inputs) -> dict[str, Measured]:
    return measuring.measure(provider.prepare(inputs), device=plan.device, milliseconds=plan.milliseconds)


def _figures(measured: Measured, *, work: int, unit: str, floor: float) -> dict[str, Any]:
    """What a row says of a measurement."""
    rate = measuring.rate(work, measured.median_ms, unit=unit)
    return {**asdict(measured), "rate": rate, "share_of_floor": rate / floor}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
