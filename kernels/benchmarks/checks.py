"""Whether a provider computes the operation, asked before it is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaspeech.kernels.benchmarks.operations import Inputs, Operation
from megaspeech.kernels.benchmarks.providers import Prepared, Provider

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Errors:
    """Largest absolute errors against FP64, of a result and of torch's in the same precision."""

    error: float
    torch_error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """False of NaN too."""
        return self.error <= self.allowed


def compare(ours: Tensor, torchs: Tensor, exact: Tensor) -> Errors:
    """`ours` may be off the FP64 result `exact` by twice as much as `torchs` is, largest errors compared.

    One unit in the last place of the largest value is allowed anyway: on a handful of numbers torch may be lucky.
    """
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape == exact.shape and exact.dtype == torch.float64
    if ours.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    error, torch_error = (float((x.double() - exact).abs().max()) for x in (ours, torchs))
    return Errors(error, torch_error, 2 * torch_error + torch.finfo(ours.dtype).eps * float(exact.abs().max()))


def results(prepared: Prepared) -> dict[str, Tensor]:
    """Output and gradients, in the reference's layout."""
    output = prepared.forward()
    gradients = torch.autograd.grad(output, prepared.leaves, prepared.grad_output)
    return prepared.restore(output.detach(), gradients)


def exact_results(operation: Operation, inputs: Inputs) -> dict[str, Tensor]:
    """What `results` should be, in FP64."""
    inputs = inputs.in_fp64()
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves.items()}
    output = operation.exact(**leaves, **inputs.constants)
    gradients = torch.autograd.grad(output, list(leaves.values()), inputs.grad_output)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def compare_all(ours: dict[str, Tensor], torchs: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Errors]:
    """`compare` of each result by name."""
    assert ours.keys() == torchs.keys() == exact.keys()
    return {name: compare(ours[name], torchs[name], exact[name]) for name in exact}


def passes(provider: Provider, errors: dict[str, Errors], *, dtype: torch.dtype) -> bool:
    """Whether the errors let the provider be timed.

    What is torch itself must agree in FP32, where another formula would show; how it rounds BF16 is torch's own error.
    """
    if provider.is_torch and dtype is torch.bfloat16:
        return all(each.error < float("inf") for each in errors.values())
    return all(each.holds for each in errors.values())
