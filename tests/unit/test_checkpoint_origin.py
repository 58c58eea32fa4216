"""What a checkpoint was made with is read back, shown, and refused where it is another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from one_rank import one_rank  # noqa: F401  a fixture
from small_store import make_store, two_steps  # noqa: F401  a fixture

from megaspeech.checkpoint.checksums import CHECKSUMS
from megaspeech.checkpoint.inspection import checkpoint_folders, grouped, look_at, read_contents
from megaspeech.checkpoint.store import CheckpointStore, load

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("codec", "mimi", "codec is synthetic there and mimi in this run"),
        ("codec_fingerprint", "f00d", "codec_fingerprint is none there and f00d in this run"),
        ("tokenizer_fingerprint", "f00d", "tokenizer_fingerprint is none there and f00d in this run"),
        ("frame_rate", 25.0, "frame_rate is 12.5 there and 25.0 in this run"),
    ],
)
def test_another_codec_or_tokenizer_is_refused(two: CheckpointStore, key: str, value: object, words: str) -> None:
    path = two.directory / "step_00000002"
    two.check(path, going_on=True)
    other = CheckpointStore(
        two.directory, config=two.config, manifest=dataclasses.replace(two.manifest, **{key: value})
    )
    for going_on in (False, True):
        with pytest.raises(ValueError, match=f"checkpoint {path}: {words}; train on shards"):
            other.check(path, going_on=going_on)


@pytest.mark.parametrize(
    "override, words",
    [
        ("temporal.ffn_hidden_size=88", "temporal.ffn_hidden_size is 176 there and 88 in this run"),
        ("streams.text_pad_id=5", "streams.text_pad_id is 3 there and 5 in this run"),
        ("streams.delays=[0,0,1,2,2,0,1,1,1]", r"streams.delays is \(0, 0, 1, 1,.* and \(0, 0, 1, 2, 2,"),
    ],
)
def test_another_model_or_stream_layout_is_refused(
    two: CheckpointStore, tmp_path: Path, override: str, words: str
) -> None:
    other = make_store(tmp_path, override)
    with pytest.raises(ValueError, match=words):
        other.check(two.directory / "step_00000002", going_on=False)
    with pytest.raises(ValueError, match=words):
        load(two.directory / "step_00000002", {}, config=other.config)


def test_another_precision_may_start_from_the_weights_but_not_go_on(two: CheckpointStore, tmp_path: Path) -> None:
    other, path = make_store(tmp_path, "precision.recipe=bf16"), two.directory / "step_00000002"
    other.check(path, going_on=False)
    with pytest.raises(ValueError, match=r"\(precision.recipe\) is fp32 there and bf16 in this run; go on in its"):
        other.check(path, going_on=True)


def test_what_may_change_is_not_refused(two: CheckpointStore, tmp_path: Path) -> None:
    changed = ["temporal.moe_aux_loss_coeff=0.5", "optimizer.lr=1", "parallel.tensor_model_parallel_size=2"]
    make_store(tmp_path, *changed).check(two.directory / "step_00000002", going_on=True)


def test_inspection(two: CheckpointStore) -> None:
    path = two.directory / "step_00000002"
    assert checkpoint_folders(two.directory.parent) == checkpoint_folders(two.directory)
    assert checkpoint_folders(path) == [path]
    contents = read_contents(path)
    assert (contents.step, contents.num_ranks, contents.manifest) == (2, 1, two.manifest)
    assert contents.layout == "data 1; 1 rank"
    entries = {entry.name: (entry.shape, entry.dtype, entry.num_bytes) for entry in contents.tensors}
    assert entries == {name: ((3, 4), "float32", 48) for name in ("w", "optimizer.state.exp_avg.w")}
    found = look_at(path, verify=True)
    assert found.damage is None and found.is_latest and found.is_finished
    assert sum(contents.sizes.values()) == found.num_bytes == sum(file.stat().st_size for file in path.iterdir())
    listed = json.loads((path / CHECKSUMS).read_text()).keys()
    assert listed == {file.name for file in path.iterdir()} - {CHECKSUMS}


def test_layers_are_grouped(two: CheckpointStore) -> None:
    (entry, _) = read_contents(two.directory / "step_00000002").tensors
    names = ["depth.layers.0.fc1", "depth.layers.11.fc1", "depth.heads", "optimizer.state.m.depth.heads"]
    tensors = tuple(dataclasses.replace(entry, name=name) for name in names)
    shown = [(group.name, group.count, group.num_bytes) for group in grouped(tensors)]
    assert shown == [("depth.layers.*.fc1", 2, 96), ("depth.heads", 1, 48), ("optimizer.state.m.depth.*", 1, 48)]
