"""`codebook_cross_entropy` over its Triton kernels; the backward recomputes the logits, a few frames at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaspeech.kernels.codebook_cross_entropy.kernel import combine_tiles, logit_gradients, tile_statistics
from megaspeech.kernels.launching import launch, require_device, triton

GROUP = 16
"""Frame tiles that go through the vocabulary together: 16 x 128 frames by 8 x 256 tokens keep 128 of 132 SMs busy."""
COMBINED = 128
"""Frames of a program that combines vocabulary tiles, one a thread."""


class Tile(NamedTuple):
    """Frames, tokens and widths of a tile of logits, with the warps that share it and the loads in flight."""

    BN: int
    BV: int
    BD: int
    num_warps: int
    num_stages: int


def tile_for(dtype: torch.dtype) -> Tile:
    """BF16: the largest tile whose sums fit in registers, 128 a thread, because each number read from L2 is used as
    often as the tile is long on its other side. FP32, for checks, has no tensor cores here: a small tile."""
    if dtype == torch.bfloat16:
        return Tile(BN=128, BV=256, BD=64, num_warps=8, num_stages=4)
    return Tile(BN=64, BV=64, BD=32, num_warps=4, num_stages=2)


def chunk_sizes(num_codebooks: int, num_frames: int, cardinality: int) -> tuple[int, int]:
    """(codebooks, frames) whose gradients of logits exist at once: about 2^24 numbers, 32 MiB in BF16.

    Frames come first, up to 4096: each chunk of n frames reads and writes the FP32 sums of the heads' gradients,
    8 D V bytes, for three products of 2 n D V FLOPs; at 3.35 TB/s and 700 TFLOP/s that is 280 / n of their time: 7 %
    at 4096, 27 % at 1024, which is the least whatever V is. Then as many codebooks as there is room for.
    """
    at_once = 2**24
    frames = min(4096, max(1024, at_once // cardinality))
    chunks = max(1, triton.cdiv(num_frames, frames))
    frames = 128 * max(1, triton.cdiv(num_frames, chunks * 128))  # chunks alike, and of whole tiles
    return min(num_codebooks, max(1, at_once // (frames * cardinality))), frames


def launch_forward(hidden_QND: Tensor, heads_QDV: Tensor, targets_QN: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`[Q, N]` each: cross entropy FP32, whether the first largest logit is the target's, and for the backward the
    largest logit and sum exp(logit - largest), FP32."""
    (codebooks, frames, width), cardinality = hidden_QND.shape, heads_QDV.shape[2]
    tile = tile_for(hidden_QND.dtype)
    num_tiles = triton.cdiv(cardinality, tile.BV)
    targets_QN = targets_QN.contiguous()
    maxima_QTN = hidden_QND.new_empty((codebooks, num_tiles, frames), dtype=torch.float32)
    sums_QTN, argmaxes_QTN = torch.empty_like(maxima_QTN), torch.empty_like(maxima_QTN, dtype=torch.int32)
    losses_QN = torch.empty_like(targets_QN, dtype=torch.float32)
    target_logits_QN, row_maxima_QN, row_sums_QN = (torch.empty_like(losses_QN) for _ in range(3))
    correct_QN = torch.empty_like(losses_QN, dtype=torch.bool)
    launch(
        tile_statistics,
        (codebooks * triton.cdiv(frames, tile.BN) * num_tiles,),
        *(hidden_QND, heads_QDV, targets_QN, maxima_QTN, sums_QTN, argmaxes_QTN, target_logits_QN),
        *(*hidden_QND.stride(), *heads_QDV.stride(), frames, width, cardinality),
        **tile._asdict(),
        GROUP=GROUP,
    )
    launch(
        combine_tiles,
        (triton.cdiv(frames, COMBINED), codebooks),
        *(maxima_QTN, sums_QTN, argmaxes_QTN, target_logits_QN, targets_QN),
        *(losses_QN, correct_QN, row_maxima_QN, row_sums_QN),
        *(frames, cardinality, num_tiles),
        BLOCK=COMBINED,
        num_warps=COMBINED // 32,
    )
    return losses_QN, correct_QN, row_maxima_QN, row_sums_QN


def launch_backward(
    loss_gradients_QN: Tensor,
    hidden_QND: Tensor,
    heads_QDV: Tensor,
    targets_QN: Tensor,
    maxima_QN: Tensor,
    sums_QN: Tensor,
    of_hidden: bool = True,
    of_heads: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients `[Q, N, D]` and `[Q, D, V]` in the inputs' precision; an empty tensor for one not asked for."""
    (codebooks, frames, _), cardinality = hidden_QND.shape, heads_QDV.shape[2]
    hidden_gradient, heads_gradient = _empty_gradients(hidden_QND, heads_QDV, of_hidden=of_hidden, of_heads=of_heads)
    per_row = targets_QN.contiguous(), maxima_QN, sums_QN, loss_gradients_QN.contiguous()
    step_q, step_n = chunk_sizes(codebooks, frames, cardinality)
    for q in _slices(codebooks, step_q):
        total_QDV = torch.zeros_like(heads_QDV[q], dtype=torch.float32) if of_heads else None
        for n in _slices(frames, step_n):
            hidden = hidden_QND[q, n]
            gradient_QNV = _logit_gradients(hidden, heads_QDV[q], *(x[q, n] for x in per_row))
            if of_hidden:
                torch.bmm(gradient_QNV, heads_QDV[q].mT, out=hidden_gradient[q, n])
            if of_heads:
                _add_product(total_QDV, hidden.mT, gradient_QNV)
            del gradient_QNV  # before the next one is made
        if of_heads:
            heads_gradient[q] = total_QDV
    return hidden_gradient, heads_gradient


def _empty_gradients(hidden: Tensor, heads: Tensor, *, of_hidden: bool, of_heads: bool) -> tuple[Tensor, Tensor]:
    return tuple(
        torch.empty_like(x) if wanted else x.new_empty(0) for x, wanted in ((hidden, of_hidden), (heads, of_heads))
    )


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


def _logit_gradients(
    hidden_QND: Tensor,
    heads_QDV: Tensor,
    targets_QN: Tensor,
    maxima_QN: Tensor,
    sums_QN: Tensor,
    loss_gradients_QN: Tensor,
) -> Tensor:
    """`[Q, N, V]` of one chunk, in the precision of hidden; `[Q, N]` arguments have the same strides."""
    (codebooks, frames, width), cardinality = hidden_QND.shape, heads_QDV.shape[2]
    tile = tile_for(hidden_QND.dtype)
    out_QNV = hidden_QND.new_empty(codebooks, frames, cardinality)
    launch(
        logit_gradients,
        (codebooks * triton.cdiv(frames, tile.BN) * triton.cdiv(cardinality, tile.BV),),
        *(hidden_QND, heads_QDV, targets_QN, maxima_QN, sums_QN, loss_gradients_QN, out_QNV),
        *(*hidden_QND.stride(), *heads_QDV.stride(), targets_QN.stride(0), frames, width, cardinality),
        **tile._asdict(),
        GROUP=GROUP,
    )
    return out_QNV


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, batched, with an FP32 total of BF16 factors."""
    if total.is_cuda:
        torch.baddbmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # torch's CPU product has no FP32 result of BF16 factors
        total.baddbmm_(a.float(), b.float())


_forward = torch.library.custom_op("megaspeech::codebook_cross_entropy", launch_forward, mutates_args=())
_backward = torch.library.custom_op("megaspeech::codebook_cross_entropy_backward", launch_backward, mutates_args=())


@_forward.register_fake
def _fake_forward(hidden_QND: Tensor, heads_QDV: Tensor, targets_QN: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    precisions = torch.float32, torch.bool, torch.float32, torch.float32
    return tuple(targets_QN.new_empty(targets_QN.shape, dtype=dtype) for dtype in precisions)


@_backward.register_fake
def _fake_backward(gradients, hidden, heads, targets, maxima, sums, of_hidden=True, of_heads=True):
    return _empty_gradients(hidden, heads, of_hidden=of_hidden, of_heads=of_heads)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, correct_QN, maxima_QN, sums_QN = output
    ctx.mark_non_differentiable(correct_QN, maxima_QN, sums_QN)
    ctx.save_for_backward(*inputs, maxima_QN, sums_QN)


def _gradients(ctx: Any, loss_gradients_QN: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
    of_hidden, of_heads, _ = ctx.needs_input_grad
    hidden, heads = _backward(loss_gradients_QN, *ctx.saved_tensors, of_hidden, of_heads)
    return hidden if of_hidden else None, heads if of_heads else None, None


_forward.register_autograd(_gradients, setup_context=_save)


def codebook_cross_entropy(hidden_QND: Tensor, heads_QDV: Tensor, targets_QN: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy, in FP32, of `hidden @ heads` against `targets`; a target of -1 gives 0.

    Any sizes and strides will do; it is fast where D, V and the strides but the last are multiples of 16. A target
    that is neither -1 nor a token gives NaN, in its row's gradient too. A row with a NaN logit is not correct.

    Args:
        hidden_QND: BF16 or FP32.
        heads_QDV: in the precision of hidden.
        targets_QN: int64.

    Returns:
        (cross entropy `[Q, N]` FP32, whether the first largest logit is the target's `[Q, N]` bool).

    Raises:
        ValueError: another precision, shapes that do not go together, or no GPU.
    """
    require_device(hidden_QND)
    _check(hidden_QND, heads_QDV, targets_QN)
    loss_QN, correct_QN, *_ = _forward(hidden_QND, heads_QDV, targets_QN)
    return loss_QN, correct_QN


def _check(hidden: Tensor, heads: Tensor, targets: Tensor) -> None:
    if hidden.dtype not in (torch.bfloat16, torch.float32) or heads.dtype != hidden.dtype:
        raise ValueError(
            f"codebook_cross_entropy: hidden is {hidden.dtype} and heads {heads.dtype}; give both in BF16, or in FP32"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"codebook_cross_entropy: targets are {targets.dtype}; give them as int64")
    (codebooks, frames, width), cardinality = hidden.shape, heads.shape[-1]
    if heads.shape != (codebooks, width, cardinality) or targets.shape != (codebooks, frames) or not cardinality:
        raise ValueError(
            "codebook_cross_entropy takes [Q, N, D], [Q, D, V] and [Q, N] with at least one token, not "
            f"{list(hidden.shape)}, {list(heads.shape)} and {list(targets.shape)}"
        )
