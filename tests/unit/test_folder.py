"""Converted folders are opened: ours, and those of others; what is wrong with one is said in a line."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from served_folder import make_served_folder

from megaspeech.config import read_config
from megaspeech.config.schema import CodecSection
from megaspeech.data.tasks import Task
from megaspeech.preparation.compose import timing_of
from megaspeech.streaming.folder import ServedFolder, open_folder
from megaspeech.streaming.session import Request, answer

pytestmark = pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")

DELAYS = "streams.delays=[0, 0, 1, 1, 1, 0, 1, 1, 1]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_folder(tmp_path_factory.mktemp("served") / "model", DELAYS, "data.task_delay=5")


@pytest.fixture(scope="module")
def served(folder: Path) -> ServedFolder:
    return open_folder(folder)


def test_our_folder_has_all_that_a_session_needs(served: ServedFolder, folder: Path) -> None:
    assert served.knows_tasks
    assert served.config.data.task_delay == 5
    assert served.config.codec.path == str(folder / "codec")
    assert served.config.data.tokenizer == str(folder / "tokenizer.model")
    request = Request(Task("asr", "en", "en"), num_frames=12, heard=served.codec.silence_codes[:, None].numpy())
    (got,) = answer(
        served.lm,
        [request],
        tokenizer=served.tokenizer,
        streams=served.config.streams,
        timing=timing_of(served.config),
        silence=served.codec.silence_codes.numpy(),
    )
    assert len(set(got.codes[0].tolist())) > 3


def test_a_model_that_is_done_with_makes_room_for_the_next(folder: Path) -> None:
    """Else two of them would have to fit, as checkpoint after checkpoint is evaluated."""
    gc.disable()  # which may come late
    try:
        first = open_folder(folder)
        with first.lm.streaming(1):
            done = weakref.ref(first.lm)
        del first
        assert done() is not None, "the runtime holds nothing in circles any more: load_runtime need not collect them"
        open_folder(folder)
        assert done() is None
    finally:
        gc.enable()


def test_a_folder_of_others_is_known_by_its_model_alone(tmp_path: Path) -> None:
    folder = make_served_folder(tmp_path / "model", DELAYS, "streams.cardinality=2048", is_ours=False)
    _mimi_in_place_of_spectral(folder)
    other = open_folder(folder)
    expected = read_config(_written(tmp_path / "expected.toml", '[model]\npreset = "tiny"'), [DELAYS])
    assert not other.knows_tasks
    assert other.config.streams == expected.streams.model_copy(update={"cardinality": 2048})
    assert other.config.temporal == expected.temporal
    assert other.config.depth == expected.depth
    assert other.config.codec == CodecSection(name="mimi", path=str(folder / "mimi.safetensors"))
    assert (other.codec.frame_rate, other.codec.num_codebooks, other.codec.cardinality) == (12.5, 4, 2048)


def test_files_that_no_config_names_are_found_by_moshis_names(tmp_path: Path) -> None:
    folder = make_served_folder(tmp_path / "model", "streams.cardinality=2048", is_ours=False)
    _mimi_in_place_of_spectral(folder)
    (folder / "mimi.safetensors").rename(folder / "tokenizer-e351c8d8-checkpoint125.safetensors")
    (folder / "tokenizer.model").rename(folder / "tokenizer_spm_32k_3.model")
    _edit(folder, mimi_name=None, tokenizer_name=None)
    other = open_folder(folder)
    assert other.config.data.tokenizer.endswith("tokenizer_spm_32k_3.model") and other.codec.cardinality == 2048


def test_a_codec_of_other_codebooks_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "megaspeech.toml").unlink()
    _mimi_in_place_of_spectral(copy)
    with pytest.raises(ValueError, match="its codebooks have 2048 entries, those of the model 32; convert with"):
        open_folder(copy)


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _mimi_in_place_of_spectral(folder: Path) -> None:
    """Kyutai's file of a Mimi with random weights, which `mimi_name` names."""
    from safetensors.torch import save_file

    from megaspeech.streaming.runtime import import_moshi

    shutil.rmtree(folder / "codec")
    torch.manual_seed(0)
    mimi = import_moshi().loaders.get_mimi(None, num_codebooks=32)
    save_file(mimi.state_dict(), folder / "mimi.safetensors")
    _edit(folder, mimi_name="mimi.safetensors")


def _edit(folder: Path, **values: object) -> None:
    """Keys of config.json; None takes one away."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def _cut(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), r"there is no file .*config\.json"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), r"there is no file .*model\.safetensors"),
    "cut weights": (lambda path: _cut(path, "model.safetensors"), r"model\.safetensors do not make a model .* export"),
    "no tokenizer": (lambda path: (path / "tokenizer.model").unlink(), r"tokenizer\.model: there is no such file"),
    "another name": (lambda path: _edit(path, tokenizer_name="x.model"), r"x\.model: there is no such file; convert"),
    "no codec": (lambda path: shutil.rmtree(path / "codec"), r"codec: there is no codec; convert with .* --codec"),
    "no mimi": (
        lambda path: (shutil.rmtree(path / "codec"), _edit(path, mimi_name="m.safetensors")),
        r"m\.safetensors: there is no codec",
    ),
    "damaged codec": (lambda path: _cut(path / "codec", "codec.safetensors"), r"codec\.safetensors: cannot be read"),
    "other streams": (
        lambda path: (path / "megaspeech.toml").write_text('[model]\npreset = "tiny"\n[streams]\ntext_pad_id = 2\n'),
        r"streams.text_pad_id = 2, but the model was exported with 3",
    ),
    "no TOML": (lambda path: (path / "megaspeech.toml").write_text("["), r"megaspeech\.toml: 1 fault"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    damage, message = FAULTS[name]
    copy = shutil.copytree(folder, tmp_path / "model")
    damage(copy)
    with pytest.raises(ValueError, match=message) as caught:
        open_folder(copy)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="nowhere: there is no such folder; make it with tools/convert_checkpoint.py"):
        open_folder("nowhere")
