"""Native checkpoints, a tensor at a time: what is written loads as a run's own; what a run wrote is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from native_folders import put, write_random
from one_rank import make_config, one_rank  # noqa: F401  a fixture

from megaspeech.checkpoint.checksums import find_damage
from megaspeech.checkpoint.inspection import read_contents
from megaspeech.checkpoint.origin import StreamManifest, check_origin
from megaspeech.checkpoint.state import load_whole_model, metadata
from megaspeech.checkpoint.store import CheckpointStore
from megaspeech.conversion import native_writing
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.native import native_shapes, open_native, whole_model
from megaspeech.conversion.random_model import random_model
from megaspeech.data.synthetic import synthetic_header

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("preset, overrides", [("tiny", []), ("tiny-moe", []), ("tiny", ["precision.recipe=bf16"])])
def test_what_is_written_loads_as_a_checkpoint_of_ours(
    preset: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_writing, "FILE_BYTES", 200_000)  # several files
    model = write_random(tmp_path / "step_00000000", *overrides, preset=preset)
    loaded, config = load_whole_model(tmp_path / "step_00000000")
    state = {name: tensor for name, tensor in loaded.state_dict().items() if tensor is not None}
    assert config == model.config and state.keys() == model.weights.keys()
    assert all(torch.equal(state[name], one.read()) for name, one in model.weights.items())
    read = open_native(tmp_path / "step_00000000").weights
    assert {name: (one.shape, one.dtype) for name, one in read.items()} == native_shapes(config)
    assert all(torch.equal(state[name], one.read()) for name, one in read.items())
    files = [file.stat().st_size for file in (tmp_path / "step_00000000").glob("*.distcp")]
    assert len(files) > 3
    num_bytes = sum(one.num_bytes for one in model.weights.values())
    assert sum(files) < num_bytes + 3000 * len(state) * 2  # views are saved without what lies behind them


def test_what_a_run_saves_is_read_without_building_the_model(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    model, header = whole_model(config), synthetic_header("asr-en", streams=config.streams)
    store = CheckpointStore(tmp_path / "run", config=config, manifest=StreamManifest.of(header, config))
    store.save({"model": {"chunk0": model.sharded_state_dict(metadata=metadata())}}, step=7)
    path = store.finish(blocking=True).path
    opened = open_native(path)
    for name, tensor in model.named_parameters():
        assert torch.equal(opened.weights[name].read(), tensor), name
    assert opened.weights.keys() == dict(model.named_parameters()).keys()


def test_inspection_and_origin(tmp_path: Path) -> None:
    """A converted checkpoint is one of one rank; what a conversion cannot know is not held against a run."""
    path = tmp_path / "converted"
    model = write_random(path, "parallel.tensor_model_parallel_size=2")
    contents = read_contents(path)
    assert (contents.step, contents.layout, contents.manifest.codec) == (0, "data 1; 1 rank", None)
    assert find_damage(path) is None
    mine = StreamManifest.of(synthetic_header("asr-en", streams=model.config.streams), model.config)
    check_origin(path, config=model.config, manifest=mine, going_on=False)
    with pytest.raises(ValueError, match="text_pad_id is 3 there and 9 in this run"):
        check_origin(path, config=model.config, manifest=dataclasses.replace(mine, text_pad_id=9), going_on=False)


def test_equal_models_make_equal_files(tmp_path: Path) -> None:
    write_random(tmp_path / "a" / "step")
    model = random_model(make_config(tmp_path))
    put(dataclasses.replace(model, weights=dict(reversed(model.weights.items()))), tmp_path / "b" / "step")
    first, second = (json.loads((tmp_path / name / "step/checksums.json").read_text()) for name in "ab")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == [".metadata"]  # which holds the folder's name


@pytest.mark.parametrize(
    "name, change, words",
    [
        (
            "temporal.block.layers.2.mlp.linear_fc1.weight",
            lambda x: x[:350],
            r"linear_fc1.weight has shape \[350, 64\], and the config makes it \[352, 64\] by temporal.ffn_hidden_size",
        ),
        ("depth.heads.weight", lambda x: None, r"depth.heads.weight \[128, 32\] is missing"),
        ("text_head.weight", lambda x: x.half(), "text_head.weight is in torch.float16, and precision.recipe = fp32"),
        ("text_head.weight", lambda x: x.index_fill(0, torch.tensor(3), float("nan")), "text_head.weight holds nan"),
        ("depth.embedding", lambda x: x / 0, "tensor depth.embedding holds (nan|inf|-inf)"),
    ],
)
def test_what_is_not_the_model_is_refused(name: str, change: object, words: str, tmp_path: Path) -> None:
    model = random_model(make_config(tmp_path))
    changed = change(model.weights[name].read())
    weights = {**model.weights, name: None if changed is None else Deferred.of(changed)}
    weights = {key: one for key, one in weights.items() if one is not None}
    with pytest.raises(ValueError, match=words):
        put(dataclasses.replace(model, weights=weights), tmp_path / "step")
    assert not list(tmp_path.glob("step*"))


def test_a_tensor_too_many(tmp_path: Path) -> None:
    model = random_model(make_config(tmp_path))
    odd = {**model.weights, "odd.weight": Deferred.of(torch.zeros(1))}
    with pytest.raises(ValueError, match="tensor odd.weight is none of the config's model"):
        put(dataclasses.replace(model, weights=odd), tmp_path / "step")


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step"
    write_random(path)
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(content)
    with pytest.raises(ValueError, match=r"__0_0.distcp is corrupt"):
        open_native(path)


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    """The index tells what the folder holds, the config what it should."""
    path = tmp_path / "step"
    write_random(path)
    (path / "checksums.json").write_text("{}")
    text = (path / "config.toml").read_text()
    (path / "config.toml").write_text(text.replace("ffn_hidden_size = 176", "ffn_hidden_size = 180", 1))
    with pytest.raises(ValueError, match=r"tensor .*linear_fc1.weight .* 352.*360"):
        open_native(path)
