"""Folders of the moshi runtime, written from models in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megaspeech.config import Config
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.moshi import WEIGHTS_FILE, moshi_files, rules
from megaspeech.conversion.rules import forget, to_foreign
from megaspeech.conversion.stored import StoredModel


def stored(state: Mapping[str, Tensor], *, config: Config) -> StoredModel:
    """A model's state dict, as a conversion reads it."""
    weights = {name: Deferred.of(tensor.detach()) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    return StoredModel(config, weights)


def moshi_state(state: Mapping[str, Tensor], *, config: Config) -> dict[str, Tensor]:
    """The runtime's state dict from that of the whole native model."""
    weights = to_foreign(stored(state, config=config).weights, rules(config))
    tensors = {name: one.read().contiguous().clone() for name, one in weights.items()}
    forget()
    return tensors


def write_moshi(state: Mapping[str, Tensor], directory: Path, *, config: Config) -> Path:
    """The folder that the runtime opens."""
    files = moshi_files(stored(state, config=config))
    directory.mkdir(parents=True, exist_ok=True)
    save_file(moshi_state(state, config=config), directory / WEIGHTS_FILE)
    for name, content in files.small_files.items():
        (directory / name).write_bytes(content)
    return directory
