"""Reference of `depth_attention`: causal attention over the codebooks of a frame, for all frames at once.

Axes: N frames, Q codebooks, A heads, G key-value heads, E head width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def depth_attention(query_QNAE: Tensor, key_QNGE: Tensor, value_QNGE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over codebooks up to and including the query's; GQA where G < A.

    Returns:
        `[Q, N, A * E]`.
    """
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_QNAE, key_QNGE, value_QNGE))
    grouped = key.shape[1] != query.shape[1]
    out_NAQE = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return out_NAQE.permute(2, 0, 1, 3).flatten(2)
