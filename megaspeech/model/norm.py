"""RMSNorm for the local layer spec. megatron-core's own fallback refuses sequence parallelism."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class RMSNorm(torch.nn.Module):
    """y = weight * x / sqrt(eps + mean(x^2)), computed in FP32 (Zhang & Sennrich 2019); the runtime's `rms_norm_f32`.

    torch's computes in FP32 by itself, and on a GPU keeps `x` for the backward pass as it came.

    Args:
        config: megatron's TransformerConfig. Under sequence parallelism a rank sees its share of the frames only, so
            the weight is marked for megatron to sum its gradient over the tensor parallel group.
        hidden_size: width of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-8, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of `x`; shape and dtype stay."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
