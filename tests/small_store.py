"""Stores of checkpoints of two small tensors, for tests of everything about them but the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from one_rank import make_config

from megaspeech.checkpoint.origin import StreamManifest
from megaspeech.checkpoint.store import CheckpointStore, load
from megaspeech.data.synthetic import synthetic_header


def make_store(directory: Path, *overrides: str) -> CheckpointStore:
    directory.mkdir(parents=True, exist_ok=True)
    config = make_config(directory, *overrides)
    manifest = StreamManifest.of(synthetic_header("asr-en", streams=config.streams), config)
    return CheckpointStore(directory / "checkpoints", config=config, manifest=manifest)


def make_state(weights: torch.Tensor, *, step: int = 0) -> dict:
    moments = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.w", weights / 2)
    return {"w": ShardedTensor.from_rank_offsets("w", weights), "optimizer": {"m": moments}, "step": step}


def save(store: CheckpointStore, step: int) -> tuple[Path, tuple[str, ...]]:
    store.save(make_state(torch.full((3, 4), float(step)), step=step), step=step)
    saved = store.finish(blocking=True)
    return saved.path, saved.notes


def steps(store: CheckpointStore) -> list[int]:
    return sorted(int(path.name[5:]) for path in store.directory.glob("step_*"))


def loaded(store: CheckpointStore, path: Path, *, like: torch.Tensor) -> dict:
    return load(path, make_state(torch.zeros_like(like)), config=store.config)


@pytest.fixture(name="two", scope="module")
def two_steps(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    """A store of steps 1 and 2; tests copy it."""
    store = make_store(tmp_path_factory.mktemp("two"))
    for step in (1, 2):
        save(store, step)
    return store
