"""The measure of a kernel's error: what torch errs by in the same precision."""

from __future__ import annotations

from torch import Tensor

from megaspeech.kernels.benchmarks.checks import compare


def assert_as_exact_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """`ours` is off the FP64 result `exact` by at most twice as much as `torchs` is: see `compare`."""
    errors = compare(ours, torchs, exact)
    assert errors.holds, f"off by {errors.error:.3g}, torch by {errors.torch_error:.3g}"
