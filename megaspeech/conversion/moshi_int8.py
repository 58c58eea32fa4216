"""Matrices in eight bits, as moshi's `quantize = true` has them, and back.

Row r of a matrix is `round(127 * W[r] / scale[r])` with the scale the row's largest absolute value, kept beside it as
`NAME_scb` (moshi/utils/quantize.py, which leaves the products to bitsandbytes). Embeddings and norms stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from megaspeech.conversion.deferred import Deferred, Weights
from megaspeech.conversion.layouts import Same
from megaspeech.conversion.new_weights import ROWS_AT_ONCE
from megaspeech.conversion.rules import Rule, to_foreign, to_native

SCALE = "_scb"
LARGEST = 127
NO_MATRIX = re.compile(r"(depformer_)?(text_)?emb(\.\d+)?\.weight|.*\.alpha")


class Int8:
    """One matrix, and its eight bits with the scales of its rows."""

    def to_foreign(self, native: Sequence[Tensor]) -> Sequence[Tensor]:
        """Int8 `[out, in]`, FP32 `[out]`."""
        parts = zip(*map(_rounded, native[0].split(ROWS_AT_ONCE)), strict=True)
        return [torch.cat(part) for part in parts]

    def to_native(self, foreign: Sequence[Tensor]) -> Sequence[Tensor]:
        """FP32 `[out, in]`, off by up to half a step of its row."""
        steps_OI, scale_O = foreign
        return [steps_OI.float().mul_((scale_O.float() / LARGEST)[:, None])]


def _rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 `[out, in]`, FP32 `[out]` of some rows."""
    weight_OI = weight_OI.float()
    scale_O = weight_OI.abs().amax(1)
    steps_O1 = (LARGEST / scale_O.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    return (weight_OI * steps_O1).round().to(torch.int8), scale_O


def in_int8(weights: Weights) -> dict[str, Deferred]:
    """A model's weights by the names of moshi's files, matrices in eight bits."""
    return to_foreign(weights, [_rule(name, is_matrix=NO_MATRIX.fullmatch(name) is None) for name in weights])


def from_int8(weights: Weights) -> dict[str, Deferred]:
    """The weights whose matrices may be in eight bits, as numbers."""
    names = [name for name in weights if not name.endswith(SCALE)]
    return to_native(weights, [_rule(name, is_matrix=name + SCALE in weights) for name in names])


def _rule(name: str, *, is_matrix: bool) -> Rule:
    return Rule((name,), (name, name + SCALE), Int8()) if is_matrix else Rule((name,), (name,), Same())
