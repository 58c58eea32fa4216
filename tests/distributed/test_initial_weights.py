"""Pipeline stages draw weights of their own: no two layers of a model begin as one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import train, write_tiny_run

from megaspeech.checkpoint.state import load_whole_model
from megaspeech.codecs import SpectralCodec, SpectralConfig
from megaspeech.model.initialisation import initialise_from_codebooks
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


def test_all_stages_start_from_the_codec_that_one_rank_opens(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    codec = SpectralCodec.fit(
        np.random.default_rng(0).normal(0, 0.1, (2, 64_000)).astype(np.float32),
        config=SpectralConfig(num_codebooks=4, cardinality=32, latent_dim=24),
    )
    codec.save(tmp_path / "codec")
    config = write_tiny_run(tmp_path)
    for path in (tmp_path / "shards").rglob("*.json"):
        mine = f'"codec_fingerprint": "{codec.fingerprint}"'
        path.write_text(path.read_text().replace('"codec_fingerprint": "none"', mine))
    run = (f"run.directory={tmp_path}/run", "checkpoint.save_seed=true", "training.exit_step=1")
    data = (f"codec.path={tmp_path}/codec", f"data.directory={tmp_path}/shards")
    finished = train(config, *data, *run, "parallel.pipeline_model_parallel_size=2", ranks=2)
    assert finished.returncode == 0, finished.stderr
    model, trained = load_whole_model(tmp_path / "run/checkpoints/step_00000000")
    tables = {"embedding": model.embedding.weight, "depth": model.depth.embedding}
    found = {name: table.clone() for name, table in tables.items()}
    vectors = codec.codebook_vectors()
    initialise_from_codebooks(model, vectors, streams=trained.streams, seed=trained.run.seed)
    audio = trained.streams.text_cardinality + 1  # the first row that is no text
    for name, table in tables.items():
        assert torch.equal(found[name][audio:], table[audio:]), name
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
