"""A model as it lies on a disk, whatever its format: its config, its weights by native names, what goes with it.

Every reader (`native`, `moshi`, `transformers_moshi`, ...) opens a folder as a `StoredModel`; changes of vocabulary or
streams make one of another; every writer takes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megaspeech.config import Config, config_of
from megaspeech.config.computation import PrecisionSection
from megaspeech.conversion.deferred import Weights


@dataclass(frozen=True)
class Companions:
    """Files that a model is no use without, where they are known.

    Attributes:
        tokenizer: the sentencepiece model.
        codec: folder of the codec, or a Mimi in Kyutai's one file.
        model_with_mimi: folder of transformers whose model has a Mimi inside, which goes where no codec is known.
    """

    tokenizer: Path | None = None
    codec: Path | None = None
    model_with_mimi: Path | None = None


@dataclass(frozen=True)
class StoredModel:
    """A model, unread.

    Attributes:
        config: its sections `model`, `streams`, `temporal`, `depth`, `codec`, `data` and `precision` (the weights')
            are of this model; the others are as they come, or those of the run that trained it.
        weights: by native name (`temporal.block.layers.3.mlp.linear_fc1.weight`), those of a whole model on one rank
            with megatron-core's own layers.
        companions: tokenizer and codec.
        notes: a line for each thing that the user should know: what was dropped, folded in, drawn anew.
    """

    config: Config
    weights: Weights
    companions: Companions = field(default_factory=Companions)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForeignFiles:
    """A model in a foreign format, unwritten.

    Attributes:
        weights: by foreign name, for the safetensors file.
        small_files: the content of the others by name, such as config.json.
        weights_beside: those of a codec, by the name of the safetensors file that they have for themselves.
        copies: files and folders that go along as they are, by the names that they get.
        notes: a line for each thing that is left out.
    """

    weights: Weights
    small_files: dict[str, bytes] = field(default_factory=dict)
    weights_beside: dict[str, Weights] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def overlaid(run: Config | None, sections: Mapping[str, Mapping[str, Any]], *, source: Path) -> Config:
    """The config of a foreign model: what its `config.json` tells, and beside it what the run's own config does.

    Args:
        run: the config in a folder that we wrote; None takes defaults.
        sections: of the model, by name and key.
        source: the `config.json`, for messages.

    Raises:
        ValueError: the model cannot be held; names the key.
    """
    tables = {} if run is None else run.model_dump(mode="json", exclude_none=True)
    for name, section in sections.items():
        tables[name] = {**tables.get(name, {}), **section}
    return config_of(tables, source=str(source))


def kept_in(config: Config, dtype: torch.dtype) -> Config:
    """The config of a model whose weights are in a precision; FP16 is read as FP32, see `Deferred.held`."""
    recipe = "bf16" if dtype is torch.bfloat16 else "fp32"
    if recipe == config.precision.params_dtype:
        return config
    return config.model_copy(update={"precision": PrecisionSection(recipe=recipe)})
