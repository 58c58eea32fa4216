"""What a cast to FP8 does to a tensor: the scale that it takes, and the numbers that it loses.

N rows, C columns of a matrix; blocks of it are `[N/r, r, C/c, c]`. Numbers are multiplied by the scale and rounded to
E4M3 (up to 448, down to 2^-9) or E5M2 (up to 57344, down to 2^-16); see "FP8 Formats for Deep Learning", arXiv
2209.05433.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

OPERANDS = ("input", "weight", "gradient")
"""What a linear layer multiplies, forward the first two; the gradient is that of its output."""
NOMINAL_RECIPE = "tensorwise"
"""What is computed for a run without FP8: the recipe that would be tried first."""


@dataclass(frozen=True)
class Cast:
    """How one operand is cast.

    `dtype`: torch.float8_e4m3fn or torch.float8_e5m2. `block`: rows and columns that share a scale, None for one scale
    of the whole tensor. `margin`: bits of headroom.
    """

    dtype: torch.dtype
    block: tuple[int, int] | None = None
    margin: int = 0

    @property
    def lower(self) -> float:
        """The largest number that becomes 0: half the smallest one of the format, for a tie goes to the even 0."""
        limits = torch.finfo(self.dtype)
        return limits.tiny * limits.eps / 2

    @property
    def upper(self) -> float:
        """The number from which on rounding alone does not lead back to the format's largest: half a step beyond."""
        limits = torch.finfo(self.dtype)
        step = 2.0 ** (math.frexp(limits.max)[1] - 1) * limits.eps
        return limits.max + step / 2


def casts(megatron: TransformerConfig) -> dict[str, Cast]:
    """By operand, the cast of TransformerEngine's recipe; without FP8 that of `NOMINAL_RECIPE`.

    Blocks are those along the rows of an operand, 1 x 128 (128 x 128 of weights) or 1 x 32. The copies of it that are
    cast along its columns, for the products that need it transposed, are not looked at.
    """
    recipe = megatron.fp8_recipe if megatron.fp8 else NOMINAL_RECIPE
    small = {"blockwise": 128, "mxfp8": 32}.get(recipe)
    margin = megatron.fp8_margin if recipe == "delayed" else 0
    in_gradients = torch.float8_e4m3fn if megatron.fp8 == "e4m3" else torch.float8_e5m2
    along_rows = (1, small) if small else None
    return {
        "input": Cast(torch.float8_e4m3fn, along_rows, margin),
        "weight": Cast(torch.float8_e4m3fn, (small, small) if recipe == "blockwise" else along_rows, margin),
        "gradient": Cast(in_gradients, along_rows, margin),
    }


def scale_for(amax: Tensor, cast: Cast) -> Tensor:
    """FP32, what numbers up to `amax` are multiplied by: the format's largest / amax / 2^margin, and 1 where amax is 0
    or not finite (`_default_sf_compute` in TransformerEngine's quantization.py). The scale of a block is rounded down
    to a power of two, as its recipes do."""
    limits = torch.finfo(torch.float32)
    scale = (torch.finfo(cast.dtype).max / amax.float() / 2**cast.margin).clamp(max=limits.max)
    if cast.block:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.full_like(mantissa, 0.5), exponent)
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def in_blocks(x_NC: Tensor, block: tuple[int, int]) -> Tensor:
    """The blocks of a matrix, filled up with zeros, `[N/r, r, C/c, c]`."""
    rows, columns = block
    padded = F.pad(x_NC, (0, -x_NC.shape[1] % columns, 0, -x_NC.shape[0] % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def count_lost(x: Tensor, *, scale: Tensor, cast: Cast) -> Tensor:
    """Numbers of `x` that are not 0, those of them that the cast turns to 0, those that it saturates `[3]` int64.

    `scale` broadcasts against `x`. The product is FP32: it takes two or four times the memory of `x`, for a moment.
    """
    scaled = (x.float() * scale).abs_()
    nonzero = x != 0
    counts = [nonzero, nonzero & (scaled <= cast.lower), scaled > cast.upper]
    return torch.stack([torch.count_nonzero(each) for each in counts])


def lost_in_cast(x_NC: Tensor, *, amax: Tensor, cast: Cast, scale: Tensor | None = None) -> Tensor:
    """`count_lost` of a matrix with the scales that a recipe gives it.

    Args:
        x_NC: the operand.
        amax: the largest magnitude of the whole operand, of which this may be a part; not read with blocks.
        cast: the recipe's.
        scale: in use already; None computes what `amax`, or each block's own, asks for.
    """
    if cast.block is None:
        return count_lost(x_NC, scale=scale_for(amax, cast) if scale is None else scale, cast=cast)
    blocks = in_blocks(x_NC, cast.block)
    return count_lost(blocks, scale=scale_for(blocks.abs().amax((1, 3), keepdim=True), cast), cast=cast)
