"""Core attention, which knows packed rows: of the local layer spec by torch, else by TransformerEngine.

megatron-core's own local attention builds all scores in a shared buffer and knows no context parallelism; this one lets
torch choose a fused kernel, on the CPU too, and gathers keys and values over the context parallel ranks.

Packed rows come as megatron-core's `PackedSeqParams`, but in "sbhd" and with one row: in "thd" its attention would turn
the queries and keys by TransformerEngine's fused RoPE without a word of `rotary_interleaved` (0.16.1, rope_utils.py).
RoPE sees distances alone, so positions may as well be counted from the row's first frame.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F

from megaspeech.model.frames import from_context_ranks, on_context_rank, sample_starts


class CoreAttention(MegatronModule):
    """Causal attention, optionally over a sliding window, of this rank's heads."""

    def __init__(
        self, config: object, layer_number: int, attn_mask_type: object, attention_type: str, **_: object
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self", "the temporal transformer has self attention only"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> Tensor:
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
        if packed_seq_params is not None:
            starts_T = sample_starts(packed_seq_params.cu_seqlens_q, num_frames=frames)
            mask = _mask(frames, window, query.device) & (starts_T[:, None] == starts_T[None, :])
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def _mask(frames: int, window: int, device: torch.device) -> Tensor:
    """True where position i, one of this rank's, sees position j: 0 <= i - j < window, `[mine, frames]`."""
    position = torch.arange(frames, device=device)
    distance = on_context_rank(position)[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def packed_attention(bounds_D: Tensor | None, *, longest: int) -> PackedSeqParams | None:
    """What the attention of a packed row is given; `bounds_D` is `Batch.bounds_D`, and `longest` its longest sample.

    TransformerEngine plans its kernels by `longest`: an upper bound that stays the same spares it new plans.
    """
    if bounds_D is None:
        return None
    return PackedSeqParams("sbhd", bounds_D, bounds_D, max_seqlen_q=longest, max_seqlen_kv=longest)


if HAVE_TE:

    class TransformerEngineAttention(TEDotProductAttention):
        """TransformerEngine's, which takes packed rows without the axis of rows ("thd")."""

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *arguments: Any,
            packed_seq_params: Any = None,
            **options: Any,
        ) -> Tensor:
            """As `CoreAttention.forward`."""
            if packed_seq_params is None:
                return super().forward(query, key, value, *arguments, **options)
            query, key, value = (x.squeeze(1) for x in (query, key, value))
            packed_seq_params = replace(packed_seq_params, qkv_format="thd")
            out = super().forward(query, key, value, *arguments, packed_seq_params=packed_seq_params, **options)
            return out.reshape(out.shape[0], 1, -1)
