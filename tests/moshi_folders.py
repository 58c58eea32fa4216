"""Folders of the moshi runtime, written from models in memory, native ones and moshi's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megaspeech.config import Config
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.moshi import WEIGHTS_FILE, moshi_files, rules
from megaspeech.conversion.rules import forget, to_foreign
from megaspeech.conversion.stored import StoredModel
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.streaming.runtime import import_moshi

TINY: dict[str, Any] = {
    "dim": 32,
    "num_heads": 4,
    "num_layers": 2,
    "hidden_scale": 4.125,
    "n_q": 8,
    "dep_q": 4,
    "card": 16,
    "text_card": 24,
    "context": 12,
    "delays": [0, 0, 1, 1, 1, 0, 1, 1, 1],
    "norm": "rms_norm_f32",
    "gating": "silu",
    "positional_embedding": "rope",
    "depformer_dim": 16,
    "depformer_num_heads": 2,
    "depformer_num_layers": 2,
    "depformer_dim_feedforward": 66,
    "depformer_multi_linear": True,
    "depformer_weights_per_step": True,
    "depformer_pos_emb": "none",
}
"""A small model of every mechanism, as a config.json describes it."""


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


def make(values: Mapping[str, Any], *, seed: int = 1) -> Any:
    """An `LMModel` whose norms are no ones."""
    torch.manual_seed(seed)
    lm = import_moshi().loaders.get_moshi_lm(None, dict(values), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return lm.eval()


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As released: all sets of an attention's weights in one tensor."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        stem, projections, rest = name.partition("_projs.")
        stem += {"in": "_proj_weight", "ut": "_proj.weight"}[stem[-2:]] if projections else ""
        found.setdefault(stem if projections else name, []).append(tensor)
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in found.items()}


def save(folder: Path, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """A folder that moshi opens."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def native(model: StoredModel) -> SpeechTextModel:
    """With the weights, all of them and no others."""
    built = SpeechTextModel(model.config, pre_process=True, post_process=True)
    state = {name: tensor for name, tensor in built.state_dict().items() if isinstance(tensor, Tensor)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: one.shape for name, one in model.weights.items()
    }
    with torch.no_grad():
        for name, one in model.weights.items():
            state[name].copy_(one.read())
    return built
