"""Native checkpoints of random models, as a conversion writes them, and the logits of stored ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from one_rank import make_config
from torch import Tensor

from megaspeech.conversion.companions import manifest, named
from megaspeech.conversion.native import check_native, load_weights, whole_model
from megaspeech.conversion.native_writing import write_native
from megaspeech.conversion.random_model import random_model
from megaspeech.conversion.stored import StoredModel
from megaspeech.conversion.writing import aside


def write_random(path: Path, *overrides: str, preset: str = "tiny") -> StoredModel:
    """The model of a preset, whose checkpoint is now at `path`, with the tokenizer and codec that its config names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = random_model(make_config(path.parent, *overrides, preset=preset))
    model = replace(model, companions=named(model.config))
    put(model, path)
    return model


def put(model: StoredModel, path: Path) -> None:
    """Write a checkpoint."""
    with aside(path, request={}, num_bytes=sum(one.num_bytes for one in model.weights.values())) as folder:
        write_native(model, folder, manifest=manifest(model))
        folder.finish(path)


@torch.no_grad()
def logits(model: StoredModel, codes_BST: Tensor) -> tuple[Tensor, Tensor]:
    """Those of text and of audio, by the native model that holds its weights."""
    check_native(model)
    native = whole_model(model.config).eval()
    load_weights(native, model.weights)
    return native(codes_BST)
