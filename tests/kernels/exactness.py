"""The measure of a kernel's error: what torch errs by in the same precision."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_exact_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """`ours` is off the FP64 result `exact` by at most twice as much as `torchs` is, largest errors compared.

    One unit in the last place of the largest value is allowed anyway: on a handful of numbers torch may be lucky.
    """
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape == exact.shape and exact.dtype == torch.float64
    if ours.numel() == 0:
        return
    error, torch_error = ((x.double() - exact).abs().max() for x in (ours, torchs))
    allowed = 2 * torch_error + torch.finfo(ours.dtype).eps * exact.abs().max()
    assert error <= allowed, f"off by {error:.3g}, torch by {torch_error:.3g}"
