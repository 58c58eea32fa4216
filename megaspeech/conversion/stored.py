"""A model as it lies on a disk, whatever its format: its config, its weights by native names, what goes with it.

Every reader (`native`, `moshi`, `transformers_moshi`, ...) opens a folder as a `StoredModel`; changes of vocabulary or
streams make one of another; every writer takes one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megaspeech.config import Config
from megaspeech.conversion.deferred import Weights

TOKENIZER_FILE = "tokenizer.model"
"""The name of the sentencepiece model beside a model's weights."""


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
        notes: a line for each thing that is left out.
    """

    weights: Weights
    small_files: dict[str, bytes] = field(default_factory=dict)
    weights_beside: dict[str, Weights] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
