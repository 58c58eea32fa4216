"""Core attention of the local layer spec, on torch's scaled_dot_product_attention.

megatron-core's own local attention builds all scores in a shared buffer and knows no context parallelism; this one lets
torch choose a fused kernel, on the CPU too, and gathers keys and values over the context parallel ranks.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F

from megaspeech.model.frames import from_context_ranks, on_context_rank


class CoreAttention(MegatronModule):
    """Causal attention, optionally over a sliding window, of this rank's heads."""

    def __init__(
        self, config: object, layer_number: int, attn_mask_type: object, attention_type: str, **_: object
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self", "the temporal transformer has self attention only"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, **_: object) -> Tensor:
        """`query` `[T, B, heads, width]`, `key` and `value` `[T, B, groups, width]` -> `[T, B, heads * width]`.

        Under context parallelism T is this rank's frames (`model.frames`).
        """
        assert attention_mask is None, "the causal mask and the window come from the config"
        mine, grouped = query.shape[0], query.shape[2] != key.shape[2]
        if self.config.context_parallel_size > 1:
            key, value = from_context_ranks(torch.cat([key, value], -1)).chunk(2, -1)
        frames = key.shape[0]
        window = self.config.window_size[0] + 1 if self.config.window_size else frames
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None if window >= frames == mine else _mask(frames, window, query.device)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def _mask(frames: int, window: int, device: torch.device) -> Tensor:
    """True where position i, one of this rank's, sees position j: 0 <= i - j < window, `[mine, frames]`."""
    position = torch.arange(frames, device=device)
    distance = on_context_rank(position)[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
