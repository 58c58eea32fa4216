"""A model of any size whose weights are drawn when they are read: to try conversions without training one first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megaspeech.config import Config, read_config
from megaspeech.conversion.companions import named
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.native import native_shapes
from megaspeech.conversion.new_weights import generator
from megaspeech.conversion.stored import StoredModel
from megaspeech.model.counting import used_rows


def open_random(path: str | Path) -> StoredModel:
    """The model of a run's config file, untrained.

    Raises:
        ConfigError: the file is none.
    """
    model = random_model(read_config(path))
    return replace(model, companions=named(model.config))


def random_model(config: Config, *, seed: int = 0) -> StoredModel:
    """Matrices are drawn from a normal of standard deviation 1 / sqrt(columns), norms from one around 1.

    A tensor's numbers follow from the seed and its name alone. Rows that only pad a table are zero, as in a new model.
    """
    shapes = native_shapes(config).items()
    read = config.streams.cardinalities[: config.streams.num_codebooks]
    rows = {"embedding.weight": used_rows(config.streams.cardinalities), "depth.embedding": used_rows(read)}
    return StoredModel(
        config,
        {
            name: Deferred(shape, dtype, _drawing(name, shape, dtype, rows=rows.get(name), seed=seed))
            for name, (shape, dtype) in shapes
        },
    )


def _drawing(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, *, rows: int | None, seed: int
) -> Callable[[], Tensor]:
    def draw() -> Tensor:
        source, drawn = generator(name, seed=seed), torch.zeros(shape, dtype=dtype)
        if len(shape) == 1:
            return drawn.normal_(1, 0.1, generator=source)
        drawn[:rows].normal_(std=shape[-1] ** -0.5, generator=source)
        return drawn

    return draw
