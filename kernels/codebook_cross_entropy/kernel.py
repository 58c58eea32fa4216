"""Triton kernels of `codebook_cross_entropy`: a matrix product whose tiles of logits never leave the chip.

Axes as in `reference.py`: Q codebooks, N frames, D depth width, V cardinality; T vocabulary tiles. A program makes one
tile of logits, BN frames by BV tokens of one codebook, summed over D by BD at a time.
"""

from __future__ import annotations

from megaspeech.kernels.arithmetic import dot, rounded
from megaspeech.kernels.launching import tl, triton

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest FP32: a maximum over nothing but -inf, so that -inf minus the maximum is -inf, not NaN."""
LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = 2^(x log2 e), as the GPU computes it; `exp2` leaves out what `exp` does for results below 2^-126."""


@triton.jit
def _tile_of_program(num_frames, cardinality, BN: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr):
    """(codebook, frame tile, vocabulary tile) of this program.

    Codebooks come one after the other. Within one, GROUP frame tiles go through the vocabulary together, so that the
    programs of a moment read few rows of hidden and few columns of heads, each many times, from L2.
    """
    frame_tiles, vocabulary_tiles = tl.cdiv(num_frames, BN), tl.cdiv(cardinality, BV)
    codebook = tl.program_id(0) // (frame_tiles * vocabulary_tiles)
    tile = tl.program_id(0) % (frame_tiles * vocabulary_tiles)
    frame_tile, vocabulary_tile = tl.swizzle2d(
        tile // vocabulary_tiles, tile % vocabulary_tiles, frame_tiles, vocabulary_tiles, GROUP
    )
    return codebook.to(tl.int64), frame_tile, vocabulary_tile


@triton.jit
def _logits(
    hidden_QND, heads_QDV, codebook, frame_tile, vocabulary_tile,
    hidden_q, hidden_n, hidden_d, heads_q, heads_d, heads_v,
    num_frames, width, cardinality, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """FP32 logits `[BN, BV]` of a tile, 0 beyond the last frame and the last token.

    Where the tile starts takes 64 bits; offsets within it fit 32.
    """
    n, v, d = tl.arange(0, BN)[:, None], tl.arange(0, BV)[None, :], tl.arange(0, BD)
    frames_left, tokens_left = num_frames - frame_tile * BN, cardinality - vocabulary_tile * BV
    hidden_QND += codebook * hidden_q + frame_tile.to(tl.int64) * BN * hidden_n
    heads_QDV += codebook * heads_q + vocabulary_tile.to(tl.int64) * BV * heads_v
    hidden_at = hidden_QND + (n * hidden_n + d[None, :] * hidden_d)
    heads_at = heads_QDV + (d[:, None] * heads_d + v * heads_v)
    logits = tl.zeros([BN, BV], tl.float32)
    for start in range(0, width, BD):
        inside = start + d < width
        hidden = tl.load(hidden_at, mask=(n < frames_left) & inside[None, :], other=0.0)
        heads = tl.load(heads_at, mask=inside[:, None] & (v < tokens_left), other=0.0)
        logits = dot(hidden, heads, logits)
        hidden_at += BD * hidden_d
        heads_at += BD * heads_d
    return logits


@triton.jit
def tile_statistics(
    hidden_QND, heads_QDV, targets_QN, maxima_QTN, sums_QTN, argmaxes_QTN, target_logits_QN,
    hidden_q, hidden_n, hidden_d, heads_q, heads_d, heads_v, num_frames, width, cardinality,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of each frame and vocabulary tile: the largest logit, where it first stands, and sum exp(logit - largest).

    The tile that holds a frame's target writes the target's logit; of a target that is no token nobody
    reads it. A NaN among the logits makes the sum NaN. Strides are in elements; what has none is contiguous.
    """
    q, frame_tile, tile = _tile_of_program(num_frames, cardinality, BN, BV, GROUP)
    logits = _logits(
        hidden_QND, heads_QDV, q, frame_tile, tile, hidden_q, hidden_n, hidden_d, heads_q, heads_d, heads_v,
        num_frames, width, cardinality, BN, BV, BD,
    )  # fmt: skip
    n = frame_tile * BN + tl.arange(0, BN)
    v = tl.arange(0, BV)[None, :]
    first_v = tile * BV
    logits = tl.where(v < cardinality - first_v, logits, float("-inf"))
    maximum = tl.maximum(tl.max(logits, 1), LOWEST)
    argmax = tl.min(tl.where(logits == maximum[:, None], v, BV), 1)

    inside = n < num_frames
    target = tl.load(targets_QN + q * num_frames + n, mask=inside, other=-1) - first_v
    held = (target >= 0) & (target < BV)
    target_logit = tl.sum(tl.where(v == target.to(tl.int32)[:, None], logits, 0.0), 1)
    tl.store(target_logits_QN + q * num_frames + n, target_logit, mask=inside & held)

    to = (q * tl.cdiv(cardinality, BV) + tile) * num_frames + n
    tl.store(maxima_QTN + to, maximum, mask=inside)
    tl.store(argmaxes_QTN + to, first_v + argmax, mask=inside)
    # Last, so that each exponential takes its logit's register; before, both were needed at once, and spilled.
    total = tl.sum(tl.exp2((logits - maximum[:, None]) * LOG2_E), 1)
    tl.store(sums_QTN + to, total, mask=inside)


@triton.jit
def combine_tiles(
    maxima_QTN, sums_QTN, argmaxes_QTN, target_logits_QN, targets_QN,
    losses_QN, correct_QN, maxima_QN, sums_QN,
    num_frames, cardinality, num_tiles, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the tiles' statistics the whole rows': loss, whether the first largest logit is the target's, largest logit
    and sum exp(logit - largest).

    A target of -1 costs nothing; another outside of 0 .. V - 1 gives NaN.
    """
    q = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < num_frames
    maximum = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    argmax = tl.full([BLOCK], -1, tl.int32)
    for tile in range(num_tiles):
        at = (q * num_tiles + tile) * num_frames + n
        tile_maximum = tl.load(maxima_QTN + at, mask=inside, other=0.0)
        tile_total = tl.load(sums_QTN + at, mask=inside, other=1.0)
        tile_argmax = tl.load(argmaxes_QTN + at, mask=inside, other=0)
        argmax = tl.where(tile_maximum > maximum, tile_argmax, argmax)  # an equal one further on is not the first
        larger = tl.maximum(maximum, tile_maximum)
        total = total * tl.exp(maximum - larger) + tile_total * tl.exp(tile_maximum - larger)
        maximum = larger
    target = tl.load(targets_QN + q * num_frames + n, mask=inside, other=-1)
    exists = (target >= 0) & (target < cardinality)
    target_logit = tl.load(target_logits_QN + q * num_frames + n, mask=inside & exists, other=0.0)
    unknown = (target != -1) & (exists == 0)
    total = tl.where(unknown, float("nan"), total)
    # Of logits in the thousands, log sum exp would lose the digits behind the point; the difference of two does not.
    loss = tl.where(target == -1, 0.0, (maximum - target_logit) + tl.log(total))
    correct = exists & (argmax == target) & (total == total)
    tl.store(losses_QN + q * num_frames + n, loss, mask=inside)
    tl.store(correct_QN + q * num_frames + n, correct, mask=inside)
    tl.store(maxima_QN + q * num_frames + n, maximum, mask=inside)
    tl.store(sums_QN + q * num_frames + n, total, mask=inside)


@triton.jit
def logit_gradients(
    hidden_QND, heads_QDV, targets_QN, maxima_QN, sums_QN, loss_gradients_QN, out_QNV,
    hidden_q, hidden_n, hidden_d, heads_q, heads_d, heads_v, rows_q, num_frames, width, cardinality,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits: (softmax - one-hot of the target) * gradient of the loss, 0 where the target is -1.

    `rows_q` is the stride of a codebook in the four `[Q, N]` arguments, which are parts of longer ones.
    """
    q, frame_tile, tile = _tile_of_program(num_frames, cardinality, BN, BV, GROUP)
    logits = _logits(
        hidden_QND, heads_QDV, q, frame_tile, tile, hidden_q, hidden_n, hidden_d, heads_q, heads_d, heads_v,
        num_frames, width, cardinality, BN, BV, BD,
    )  # fmt: skip
    n = frame_tile * BN + tl.arange(0, BN)
    v = tl.arange(0, BV)[None, :]
    first_v = tile * BV
    inside = n < num_frames
    target = tl.load(targets_QN + q * rows_q + n, mask=inside, other=-1)
    maximum = tl.load(maxima_QN + q * rows_q + n, mask=inside, other=0.0)
    total = tl.load(sums_QN + q * rows_q + n, mask=inside, other=1.0)
    gradient = tl.load(loss_gradients_QN + q * rows_q + n, mask=inside & (target != -1), other=0.0)
    target = (target - first_v).to(tl.int32)  # 32 bits are enough for tokens; of another target the sum is NaN
    out = tl.exp2((logits - maximum[:, None]) * LOG2_E) * (gradient / total)[:, None]
    out = tl.where(v == target[:, None], out - gradient[:, None], out)
    out_QNV += (q * num_frames + frame_tile * BN) * cardinality + first_v
    to = tl.arange(0, BN)[:, None] * cardinality + v
    mask = inside[:, None] & (v < cardinality - first_v)
    tl.store(out_QNV + to, rounded(out, out_QNV.dtype.element_ty), mask=mask)
