"""Reference of `codebook_cross_entropy`: the heads of all codebooks and their cross entropies.

Axes: Q codebooks, N frames, D depth width, V cardinality.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def codebook_cross_entropy(hidden_QND: Tensor, heads_QDV: Tensor, targets_QN: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy, in FP32, of `hidden @ heads` against `targets`; a target of -1 gives 0.

    Returns:
        (cross entropy `[Q, N]` FP32, whether the largest logit is the target's `[Q, N]` bool).
    """
    logits_QNV = torch.bmm(hidden_QND, heads_QDV).float()
    losses = F.cross_entropy(logits_QNV.flatten(0, 1), targets_QN.flatten(), ignore_index=-1, reduction="none")
    correct_QN = logits_QNV.detach().argmax(-1) == targets_QN
    return losses.view_as(targets_QN), correct_QN
