"""How a Triton kernel is started: on a GPU, in Triton's interpreter, or only compiled, to be looked at.

The one place that imports Triton, which is optional; kernels take `triton` and `tl` from here. The interpreter
(`TRITON_INTERPRET=1`, set before this is imported) runs kernels on the CPU, slowly and to the letter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ValueError(
        'model.kernels: "triton" needs Triton, which is not installed; install megaspeech[gpu], or take "reference"'
    ) from error

__all__ = ["compiled_only", "launch", "require_device", "tl", "triton"]

Compiled = list[tuple[str, dict[str, Any], Any]]
"""(name, options, triton's compiled kernel) of every launch."""

_compiled: Compiled | None = None


def require_device(tensor: Tensor | None = None) -> None:
    """Raise ValueError where kernels cannot run on `tensor`, or without one, on this machine."""
    on_gpu = torch.cuda.is_available() if tensor is None else tensor.is_cuda
    if not on_gpu and not triton.knobs.runtime.interpret:
        raise ValueError(
            'model.kernels: "triton" runs on a GPU, and here is none; take "reference", '
            "or set TRITON_INTERPRET=1 to run the kernels slowly in Triton's interpreter"
        )


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` on a grid of programs; a grid without programs is nothing to do.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along each axis; only the first may exceed 65,535.
        arguments: the kernel's, tensors among them.
        options: its constants, and `num_warps`, `num_stages`.
    """
    if _compiled is not None:
        compiled = kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **options)
        _compiled.append((kernel.__name__, options, compiled))
    elif all(grid):
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


@contextmanager
def compiled_only() -> Iterator[Compiled]:
    """Within, launches compile for the active target and run nothing; so tensors may be on the meta device.

    What is compiled is what a launch of such arguments would run: the launcher chose its sizes, and Triton's own
    launcher its hints of alignment and divisibility.
    """
    global _compiled
    _compiled = []
    try:
        yield _compiled
    finally:
        _compiled = None
