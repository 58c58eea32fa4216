"""The measure of tests/gpu/test_recipes_on_a_gpu.py, on the CPU: it passes what is equal and finds what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from one_rank import make_config, one_rank  # noqa: F401
from spec_agreement import (
    Batch,
    assert_as_exact,
    build,
    by_checkpoint_name,
    draw_batch,
    outcome,
    relative_error,
    tensor_float_32,
)

from megaspeech.config import Config
from megaspeech.parallel.wrap import Wrapped

LAYERS = ("temporal.num_layers=2",)


@pytest.fixture(scope="module")
def exact(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Wrapped, Batch]:  # noqa: F811
    config = make_config(tmp_path_factory.mktemp("exact"), *LAYERS)
    model = build(config)
    return model, draw_batch(config, samples=2, frames=32, device=model.device)


@pytest.fixture(params=["fp32", "bf16"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    return make_config(tmp_path, *LAYERS, f"precision.recipe={request.param}")


def test_a_spec_agrees_with_itself(exact: tuple[Wrapped, Batch], config: Config) -> None:
    model, batch = exact
    truth = outcome(model, batch)
    with tensor_float_32():
        own, other = (outcome(build(config, like=model), batch) for _ in range(2))
    assert_as_exact(other, own, truth, slack=0.0)
    if config.precision.recipe == "bf16":  # then the truth is another, and the measure not empty
        assert 1e-4 < relative_error(own["text logits"], truth["text logits"]) < 0.05
    assert len(truth) == 2 + len(list(model.models[0].parameters()))
    assert all(x.any() for x in truth.values())


@pytest.mark.parametrize(
    "name",
    ["layer 1: temporal.block.layers.mlp.linear_fc1.layer_norm_weight", "text_head.weight", "depth.heads.weight"],
)
def test_a_weight_that_is_off_is_found(name: str, exact: tuple[Wrapped, Batch], config: Config) -> None:
    model, batch = exact
    truth, broken = outcome(model, batch), build(config, like=model)
    own = outcome(build(config, like=model), batch)
    with torch.no_grad():
        by_checkpoint_name(broken.models[0])[name].mul_(1.1)
    with pytest.raises(AssertionError, match="logits: off by"):
        assert_as_exact(outcome(broken, batch), own, truth, slack=2**-8)


def test_a_window_that_is_off_is_found(exact: tuple[Wrapped, Batch], tmp_path: Path) -> None:
    """One frame more than the twelve that `tiny` sees."""
    model, batch = exact
    truth = outcome(model, batch)
    own, wider = (
        outcome(build(make_config(tmp_path, *LAYERS, "precision.recipe=bf16", *own), like=model), batch)
        for own in ((), ("temporal.context=13",))
    )
    with pytest.raises(AssertionError, match="off by"):
        assert_as_exact(wider, own, truth, slack=2**-8)
