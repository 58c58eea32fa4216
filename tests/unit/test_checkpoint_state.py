"""What is asked of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from one_rank import one_rank  # noqa: F401
from small_store import make_store
from spec_agreement import build

from megaspeech.checkpoint import state
from megaspeech.checkpoint.store import load

pytestmark = pytest.mark.usefixtures("one_rank")


def test_weights_are_loaded_where_what_layers_keep_beside_them_is_missing(tmp_path: Path) -> None:
    """TransformerEngine's norms and experts keep an `_extra_state` that converted and local layers have not."""
    store = make_store(tmp_path)
    wrapped = build(store.config)
    (model,) = wrapped.models
    places = model.sharded_state_dict(metadata=state.metadata())
    weights = {key: place for key, place in places.items() if "_extra_state" not in key}
    assert len(weights) < len(places)
    store.save({"model": {"chunk0": weights}}, step=0)
    path, expected = store.finish(blocking=True).path, [each.clone() for each in model.parameters()]

    loaded, _ = state.load_whole_model(path)
    assert all(map(torch.equal, loaded.parameters(), expected))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state.load_model_state(wrapped, load(path, state.model_state(wrapped), config=store.config))
    assert all(map(torch.equal, model.parameters(), expected))
    wrapped.release()
