"""Weights that no stored model has: drawn as a new native model draws them, and always the same ones.

A tensor's numbers follow from the seed and its name, so they can be drawn when they are written and read again.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from megaspeech.config import Config
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.native import native_shapes
from megaspeech.model.counting import used_rows

ROWS_AT_ONCE = 1024
"""Rows of a table that are computed with in FP32 at a time: all of them would take more memory than the table."""


def generator(name: str, *, seed: int) -> torch.Generator:
    """The source of a tensor's random numbers."""
    return torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))


def mean_row(rows_VH: Tensor) -> Tensor:
    """The mean of all rows, FP32 `[H]`."""
    total_H = torch.zeros(rows_VH.shape[1])
    for part_VH in rows_VH.split(ROWS_AT_ONCE):
        total_H += part_VH.float().sum(0)
    return total_H / len(rows_VH)


def root_mean_square(rows_VH: Tensor) -> float:
    """Of all numbers of a table."""
    norms = [float(torch.linalg.vector_norm(part_VH.float())) for part_VH in rows_VH.split(ROWS_AT_ONCE)]
    return (sum(norm * norm for norm in norms) / rows_VH.numel()) ** 0.5


def new_depth(config: Config, *, seed: int, dtype: torch.dtype) -> dict[str, Deferred]:
    """The depth transformer of a new model by native names, see `model.depth`; empty where the model has none.

    Norms are 1, the rows of its embedding normal of standard deviation 1 / sqrt(width), matrices uniform within
    +-1 / sqrt(width in).
    """
    shapes = {name: shape for name, (shape, _) in native_shapes(config).items() if name.startswith("depth.")}

    def drawing(name: str) -> Deferred:
        shape = shapes[name]
        return Deferred(shape, dtype, lambda: _drawn(name, config=config, shape=shape, seed=seed).to(dtype))

    return {name: drawing(name) for name in shapes}


def _drawn(name: str, *, config: Config, shape: tuple[int, ...], seed: int) -> Tensor:
    drawn, source = torch.ones(shape), generator(name, seed=seed)
    if name.endswith("norm.weight"):
        return drawn
    if name == "depth.embedding":
        drawn.normal_(std=shape[1] ** -0.5, generator=source)
        drawn[used_rows(config.streams.cardinalities[: config.streams.num_codebooks]) :] = 0
        return drawn
    bound = _width_in(name, config=config) ** -0.5
    return drawn.uniform_(-bound, bound, generator=source)


def _width_in(name: str, *, config: Config) -> int:
    """Of a matrix; the first axis of the tensor holds those of several codebooks."""
    widths = {
        "input": config.temporal.hidden_size,
        "low_rank": config.depth.low_rank_embeddings,
        "fc2": config.depth.ffn_hidden_size,
    }
    width = widths.get(name.split(".")[-2], config.depth.hidden_size)
    assert width is not None, name
    return width
