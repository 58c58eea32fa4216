"""Reference of `stream_embedding`: raw codes to the sum of their delayed embeddings.

With `d` the delay of stream s, the model's input at frame t is the token of frame t - 1 - d, or the stream's initial
token where there is none (moshi's `LMModel.forward`):

    out[t, b] = sum_s table[offset_s + token(b, s, t - 1 - d_s)],    zero tokens (-1) add nothing.

Axes: B microbatch, S streams, T frames, H hidden, R rows of the table this rank holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delayed_codes(codes_BST: Tensor, *, shifts: Tensor, fill: Tensor, starts_T: Tensor | None = None) -> Tensor:
    """Every stream of `codes_BST` moved right by `shifts` `[S]` frames, with `fill` `[S]` moved in.

    Args:
        codes_BST: integer tokens, or what else goes with them.
        shifts, fill: by stream.
        starts_T: where rows are packed, the first frame of the sample that each frame is of: nothing moves into a
            sample from the one before.

    Returns:
        `[B, S, T]`, the last `shifts[s]` frames of stream s fallen off.
    """
    frames = torch.arange(codes_BST.shape[-1], device=codes_BST.device)
    source_ST = frames[None, :] - shifts[:, None]
    gathered = codes_BST.gather(-1, source_ST.clamp(min=0).expand_as(codes_BST))
    known_ST = source_ST >= (0 if starts_T is None else starts_T)
    return torch.where(known_ST, gathered, fill[:, None].to(gathered.dtype))


def stream_embedding(
    codes_BST: Tensor,
    table_RH: Tensor,
    *,
    delays: Tensor,
    initial: Tensor,
    offsets: Tensor,
    first_row: int = 0,
    frames: Tensor | None = None,
    starts: Tensor | None = None,
    atomic: bool = False,
) -> Tensor:
    """The partial sum over streams of the rows that this rank holds.

    Args:
        codes_BST: integer tokens; -1 adds nothing.
        table_RH: rows `first_row` to `first_row + R` of the packed table.
        delays: acoustic delay of each stream, frames `[S]`.
        initial: initial token of each stream `[S]`, read before the first frame.
        offsets: the stream's first row in the whole table `[S]`.
        first_row: row range of this rank.
        frames: which frames are wanted, where a context parallel rank holds some of them only; None for all.
        starts: where rows are packed, the first frame of the sample that each frame is of `[T]`; None where each row is
            one sample.
        atomic: whether the table's gradient may be summed in any order; torch sums in an order of its own.

    Returns:
        `[T, B, H]` of the frames wanted; summed over the ranks that share the table it is the embedding.
    """
    tokens_BST = delayed_codes(codes_BST, shifts=delays + 1, fill=initial, starts_T=starts)
    if frames is not None:
        tokens_BST = tokens_BST[..., frames]
    return packed_embedding(tokens_BST, table_RH, offsets=offsets, first_row=first_row).transpose(0, 1).contiguous()


def packed_embedding(tokens_BST: Tensor, table_RH: Tensor, *, offsets: Tensor, first_row: int = 0) -> Tensor:
    """Sum over streams of `table[offsets[s] + tokens[..., s, t]]` `[B, T, H]`; -1 and foreign rows add nothing."""
    rows_BTS = (tokens_BST + (offsets - first_row)[:, None]).transpose(1, 2)
    mine = (tokens_BST.transpose(1, 2) >= 0) & (rows_BTS >= 0) & (rows_BTS < table_RH.shape[0])
    batch, frames, streams = rows_BTS.shape
    out = torch.nn.functional.embedding_bag(
        rows_BTS.where(mine, torch.zeros_like(rows_BTS)).reshape(-1, streams),
        table_RH,
        mode="sum",
        per_sample_weights=mine.reshape(-1, streams).to(table_RH.dtype),
    )
    return out.view(batch, frames, -1)
