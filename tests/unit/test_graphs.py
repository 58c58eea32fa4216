"""What a graph is given and what becomes of what it gives: shapes filled up, memory overwritten. Graphs themselves take
a GPU (`tests/gpu`); here a stand-in keeps their rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from one_rank import make_config, one_rank  # noqa: F401
from torch import Tensor

from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.parallel.graphs import GraphedLayers, install_graphs

pytestmark = pytest.mark.usefixtures("one_rank")
FRAMES, MULTIPLE = 21, 16


def graphed(layers: torch.nn.Module, samples: tuple[Tensor]) -> Callable[[Tensor], Tensor]:
    """As torch makes them: of one shape, and every output lies where the one before did."""
    (sample,) = samples
    assert sample.requires_grad and not any(module._forward_hooks for module in layers.modules())
    place = torch.empty_like(sample)

    def replay(x: Tensor) -> Tensor:
        assert x.shape == sample.shape, "a graph has one shape"
        made = layers(x)
        place.copy_(made.detach())
        return made + (place - made).detach()

    captured.append(tuple(sample.shape))
    return replay


captured: list[tuple[int, ...]] = []


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpeechTextModel:
    captured.clear()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    return SpeechTextModel(make_config(tmp_path), pre_process=True, post_process=True)


def draw(frames: int) -> Tensor:
    return torch.randn(4, frames, 32, generator=torch.Generator().manual_seed(frames), requires_grad=True)


def test_the_same_as_layer_by_layer(model: SpeechTextModel) -> None:
    plain, graphs = model.depth.run_layers, GraphedLayers(model.depth.layers, multiple=MULTIPLE)
    for frames in (FRAMES, 5, FRAMES, 32):
        x = draw(frames)
        results = []
        for run in (plain, graphs):
            out = run(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.depth.layers.parameters()])])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert captured == [(4, 32, 32), (4, 16, 32)]


def test_without_gradients_nothing_is_captured(model: SpeechTextModel) -> None:
    graphs = GraphedLayers(model.depth.layers, multiple=MULTIPLE)
    with torch.no_grad():
        torch.testing.assert_close(graphs(draw(FRAMES)), model.depth.run_layers(draw(FRAMES)))
    assert not captured


def test_a_model_takes_it_and_keeps_its_layers(model: SpeechTextModel) -> None:
    names = [name for name, _ in model.named_parameters()]
    install_graphs(model, multiple=MULTIPLE)
    assert [name for name, _ in model.named_parameters()] == names
    out_QND = model.depth.hidden(torch.randn(FRAMES, 64), torch.zeros(4, FRAMES, dtype=torch.int64))
    assert out_QND.shape == (4, FRAMES, 32) and captured == [(4, 32, 32)]
