"""Reference of `depth_attention`: causal attention over the codebooks of a frame, for all frames at once.

Axes: N frames, Q codebooks, A query heads, G key-value groups, C = A + 2 G heads in all, E head width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def depth_attention(qkv_QNCE: Tensor, *, num_query_groups: int) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over codebooks up to and including the query's.

    Args:
        qkv_QNCE: the heads are A of queries, then G of keys, then G of values; query head a reads group a // (A / G).
        num_query_groups: G.

    Returns:
        `[Q, N, A * E]`.
    """
    groups = num_query_groups
    heads = qkv_QNCE.shape[2] - 2 * groups
    query, key, value = qkv_QNCE.permute(1, 2, 0, 3).split([heads, groups, groups], dim=1)
    out_NAQE = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=groups != heads)
    return out_NAQE.permute(2, 0, 1, 3).flatten(2)
