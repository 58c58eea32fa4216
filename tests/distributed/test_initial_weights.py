"""Pipeline stages draw weights of their own: no two layers of a model begin as one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import train, write_tiny_run

from megaspeech.checkpoint.state import load_whole_model
from megaspeech.parallel import groups


@pytest.fixture
def seed_checkpoint(tmp_path: Path) -> Iterator[Path]:
    """Of four stages, a layer each."""
    run = (f"run.directory={tmp_path}/run", "checkpoint.save_seed=true", "training.exit_step=1")
    layout = "parallel.pipeline_model_parallel_size=4"
    finished = train(write_tiny_run(tmp_path), f"data.directory={tmp_path}/shards", *run, layout, ranks=4)
    assert finished.returncode == 0, finished.stderr
    yield tmp_path / "run/checkpoints/step_00000000"
    groups.shut_down()


def test_no_two_layers_are_the_same(seed_checkpoint: Path) -> None:
    model, _ = load_whole_model(seed_checkpoint)
    layers = model.temporal.block.layers
    drawn = [name for name, parameter in layers[0].named_parameters() if parameter.ndim > 1]
    assert len(drawn) == 4
    for name in drawn:
        for place, layer in enumerate(layers):
            for other in layers[:place]:
                assert not torch.equal(layer.get_parameter(name), other.get_parameter(name)), f"{name}, layer {place}"
