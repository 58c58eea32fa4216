"""Times, peak memory, and the floors of the machine: how fast it copies and multiplies at best."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from megaspeech.kernels.benchmarks.providers import Prepared

QUANTILES = (0.25, 0.5, 0.75)
WARM_UP_MS = 25
CPU_REPETITIONS = 3
COPIED_BYTES, MATRIX_SIDE = 2**30, 8192
"""Of the floors: far more than caches hold, and enough tiles for every multiprocessor."""


@dataclass(frozen=True)
class Measured:
    """`quartiles_ms` are the first and the third. `peak_bytes` is above the inputs, None on a CPU."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    peak_bytes: int | None

    @classmethod
    def of(cls, quantiles: tuple[float, float, float], peak_bytes: int | None) -> Measured:
        """Of what `quantiles_ms` gives."""
        low, median, high = quantiles
        return cls(median, (low, high), peak_bytes)


def quantiles_ms(call: Callable[[], Any], *, device: str, milliseconds: int) -> tuple[float, float, float]:
    """Quartiles of the time of `call`, warmed up: on a GPU by events, its L2 cache flushed before each repetition.

    Args:
        milliseconds: about how long to repeat, on a GPU.
    """
    if device == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(call, warmup=WARM_UP_MS, rep=milliseconds, quantiles=QUANTILES))
    call()
    times = [_seconds(call) * 1e3 for _ in range(CPU_REPETITIONS)]
    return tuple(statistics.quantiles(times, n=4, method="inclusive"))


def _seconds(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def measure(prepared: Prepared, *, device: str, milliseconds: int) -> dict[str, Measured]:
    """Both directions. The forward keeps what the backward needs; the backward's peak has that in it, and gradients."""

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, prepared.leaves, prepared.grad_output, retain_graph=True)

    output = prepared.forward()
    backward()  # compiles, and makes workspaces that stay
    del output
    time = {"device": device, "milliseconds": milliseconds}
    forward_ms = quantiles_ms(prepared.forward, **time)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    output, forward_peak = _with_peak(prepared.forward, device=device, before=before)
    _, backward_peak = _with_peak(backward, device=device, before=before)
    return {
        "forward": Measured.of(forward_ms, forward_peak),
        "backward": Measured.of(quantiles_ms(backward, **time), backward_peak),
    }


def _with_peak(call: Callable[[], Any], *, device: str, before: int) -> tuple[Any, int | None]:
    """(result, the most bytes allocated meanwhile, above `before`)."""
    if device != "cuda":
        return call(), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def floors(*, device: str, milliseconds: int) -> dict[str, float]:
    """{"GB/s": of a copy, bytes read and written; "TFLOP/s": of a square BF16 product}, medians."""
    size, side = (COPIED_BYTES, MATRIX_SIDE) if device == "cuda" else (2**20, 64)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    out = torch.empty_like(a)
    time = {"device": device, "milliseconds": milliseconds}
    _, copying_ms, _ = quantiles_ms(lambda: target.copy_(source), **time)
    _, multiplying_ms, _ = quantiles_ms(lambda: torch.mm(a, b, out=out), **time)
    return {
        "GB/s": rate(2 * size, copying_ms, unit="GB/s"),
        "TFLOP/s": rate(2 * side**3, multiplying_ms, unit="TFLOP/s"),
    }


def fp8_product(*, device: str, milliseconds: int) -> float | None:
    """TFLOP/s of a square product of E4M3 matrices with one scale each, accumulated fast, median; None where there is
    no such product."""
    side = MATRIX_SIDE if device == "cuda" else 64
    a, b = torch.randn(2, side, side, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        _, multiplying_ms, _ = quantiles_ms(multiply, device=device, milliseconds=milliseconds)
    except (RuntimeError, ValueError, NotImplementedError):  # older chips, some of torch's builds
        return None
    return rate(2 * side**3, multiplying_ms, unit="TFLOP/s")


def rate(work: int, milliseconds: float, *, unit: str) -> float:
    """Bytes or FLOPs in some milliseconds, in `unit`: "GB/s" or "TFLOP/s"."""
    return work / milliseconds * 1e3 / {"GB/s": 1e9, "TFLOP/s": 1e12}[unit]
