"""Mimi in Kyutai's file and in transformers' folder: the same codes and the same sound, both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from one_rank import make_config, one_rank  # noqa: F401
from safetensors.torch import load_file, save_file
from small_codecs import save_small, small_model, sounds

from megaspeech.conversion import mimi_files
from megaspeech.conversion.companions import copy, named
from megaspeech.conversion.deferred import Deferred, Weights
from megaspeech.conversion.mimi_config import from_runtime_config, to_runtime_config
from megaspeech.conversion.mimi_files import (
    KYUTAI_FILE,
    Mimi,
    beside_the_runtime,
    first_codebooks,
    kyutai_weights,
    open_mimi,
    packed,
    rules,
)
from megaspeech.conversion.moshi import moshi_files
from megaspeech.conversion.random_model import random_model
from megaspeech.conversion.rules import to_foreign
from megaspeech.conversion.stored import Companions, StoredModel

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("moshi") is None, reason="transformers or moshi is not installed"
)


def save(weights: Weights, path: Path) -> Path:
    save_file({name: one.read().contiguous().clone() for name, one in weights.items()}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' `mimi/`, and Kyutai's `kyutai.safetensors` with `kyutai.json` made of it."""
    folder = tmp_path_factory.mktemp("mimi_files")
    mimi = open_mimi(save_small("mimi", folder / "mimi"))
    save(kyutai_weights(mimi), folder / "kyutai.safetensors")
    (folder / "kyutai.json").write_text(json.dumps(to_runtime_config(mimi.config)))
    return folder


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Any:
    from megaspeech.streaming.runtime import import_moshi

    values = json.loads((folder / "kyutai.json").read_text())
    return import_moshi().loaders.get_mimi(folder / "kyutai.safetensors", values, num_codebooks=6)


def test_same_codes_and_sound(runtime: Any) -> None:
    model, sound_B1N = small_model("mimi"), sounds(96 * 40)[:, None]
    with torch.no_grad():
        codes_BQT = model.encode(sound_B1N).audio_codes
        assert len(codes_BQT.unique()) > 20 and torch.equal(codes_BQT, runtime.encode(sound_B1N))
        theirs, ours = model.decode(codes_BQT).audio_values, runtime.decode(codes_BQT)
    assert (theirs - ours).abs().max() < 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("naming", ["packed", "as the runtime's own modules"])
def test_back_to_transformers(naming: str, folder: Path, runtime: Any, tmp_path: Path) -> None:
    """Every bit of the file that transformers wrote; and its config."""
    file = folder / "kyutai.safetensors"
    if naming != "packed":
        file = tmp_path / "split.safetensors"
        save_file({name: x.clone() for name, x in runtime.state_dict().items()}, file)
        assert "encoder_transformer.transformer.layers.1.self_attn.in_projs.0.weight" in load_file(file)
    back = open_mimi(file, runtime_config=folder / "kyutai.json")
    expected = load_file(folder / "mimi" / "model.safetensors")
    assert back.weights.keys() == expected.keys()
    assert [name for name, one in back.weights.items() if not torch.equal(one.read(), expected[name])] == []
    theirs, ours = open_mimi(folder / "mimi").config.to_dict(), back.config.to_dict()
    saved_only = {"architectures", "dtype", "_name_or_path", "transformers_version", "_frame_rate"}
    assert {key for key in theirs if theirs[key] != ours[key]} <= saved_only
    assert back.config.frame_rate == open_mimi(folder / "mimi").config.frame_rate


def test_published_mimi_on_no_memory() -> None:
    """Without a config it is the published Mimi: the names and shapes of the runtime's, of 318 tensors."""
    from megaspeech.streaming.runtime import import_moshi

    with torch.device("meta"):
        state = import_moshi().loaders.get_mimi(None, num_codebooks=32, device="meta").state_dict()
    config = from_runtime_config(None)
    names = {name for rule in rules(config) for name in rule.native}
    assert names == packed({name: Deferred.of(x) for name, x in state.items()}).keys() and len(names) == 318
    assert to_runtime_config(config)["seanet"]["ratios"] == [8, 6, 5, 4]


def test_beside_a_model_of_the_runtime(folder: Path) -> None:
    """Kyutai's file where the sizes are the published ones, else a folder of transformers, all of it."""
    from megaspeech.streaming.runtime import import_moshi

    state = import_moshi().loaders.get_mimi(None, num_codebooks=32, device="meta").state_dict()
    config = from_runtime_config(None)
    published = Mimi(config, to_foreign(packed({name: Deferred.of(x) for name, x in state.items()}), rules(config)))
    files = beside_the_runtime(published)
    (name,) = files.weights_beside
    assert name == KYUTAI_FILE and not files.small_files
    shapes = {name: one.shape for name, one in packed({k: Deferred.of(x) for k, x in state.items()}).items()}
    assert {name: one.shape for name, one in files.weights_beside[name].items()} == shapes

    small = open_mimi(folder / "mimi")
    files = beside_the_runtime(small)
    assert json.loads(files.small_files["codec/config.json"])["codebook_size"] == 32
    assert files.weights_beside["codec/model.safetensors"].keys() == small.weights.keys()


@pytest.fixture
def small_is_published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small Mimi has the sizes that the runtime takes a file without config to have."""
    config = open_mimi(folder / "mimi").config
    monkeypatch.setattr(mimi_files, "from_runtime_config", lambda values, **_: config)


def with_codec(codec: Path, tmp_path: Path) -> StoredModel:
    """A model that goes with a codec."""
    config = make_config(tmp_path, "codec.name=mimi")
    return replace(random_model(config), companions=Companions(codec=codec))


@pytest.mark.usefixtures("small_is_published", "one_rank")
def test_the_runtime_is_given_what_it_opens(folder: Path, tmp_path: Path) -> None:
    """Whatever the codec comes as: a folder of transformers, Kyutai's file under any name, a folder with it."""
    expected = load_file(folder / "kyutai.safetensors")
    files = moshi_files(with_codec(folder / "mimi", tmp_path))
    assert json.loads(files.small_files["config.json"])["mimi_name"] == KYUTAI_FILE
    assert files.weights_beside[KYUTAI_FILE].keys() == expected.keys() and not files.copies
    odd = tmp_path / "model.safetensors"  # which would be that of the language model
    odd.write_bytes((folder / "kyutai.safetensors").read_bytes())
    kyutais = tmp_path / "kyutai" / "tokenizer-x.safetensors"
    kyutais.parent.mkdir()
    kyutais.write_bytes(odd.read_bytes())
    for given, name, file in (
        (odd, KYUTAI_FILE, odd),
        (kyutais, kyutais.name, kyutais),
        (kyutais.parent, kyutais.name, kyutais),
    ):
        files = moshi_files(with_codec(given, tmp_path))
        assert files.copies == {name: file} and not files.weights_beside
        assert json.loads(files.small_files["config.json"])["mimi_name"] == name


@pytest.mark.usefixtures("one_rank")
def test_a_codec_in_a_file_of_its_own_gets_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "large.ckpt"
    file.write_bytes(b"weights")
    model = replace(random_model(make_config(tmp_path, "codec.name=wavtokenizer")), companions=Companions(codec=file))
    copy(moshi_files(model).copies, tmp_path / "out")
    assert (tmp_path / "out" / "codec" / "large.ckpt").read_bytes() == b"weights"


@pytest.mark.usefixtures("one_rank")
def test_transformers_file_is_not_taken_for_kyutais(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mimi/model.safetensors: is not Kyutai's file of a Mimi; .* its folder"):
        moshi_files(with_codec(folder / "mimi" / "model.safetensors", tmp_path))


def test_a_codec_in_the_cache_is_found_by_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `codec.path` may name one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--kyutai--mimi", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(folder / "mimi")
    config = make_config(tmp_path, "codec.name=mimi", "codec.path=kyutai/mimi")
    assert named(config).codec == repository / "snapshots" / commit
    assert named(make_config(tmp_path, "codec.path=kyutai/momo")).codec is None


def test_first_codebooks_are_the_same_codes(folder: Path, tmp_path: Path) -> None:
    from transformers import MimiModel

    cut = first_codebooks(open_mimi(folder / "mimi"), 3)
    cut.config.save_pretrained(tmp_path)
    save(cut.weights, tmp_path / "model.safetensors")
    model, found = MimiModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    sound_B1N = sounds(96 * 20)[:, None]
    with torch.no_grad():
        expected_BQT = small_model("mimi").encode(sound_B1N).audio_codes[:, :3]
        assert torch.equal(model.encode(sound_B1N).audio_codes, expected_BQT)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_conv_shortcut": True}, "use_conv_shortcut = True"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        ({"upsample_groups": 4}, "upsample_groups = 4"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ],
)
def test_what_the_runtime_lacks_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    config = open_mimi(folder / "mimi").config
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=f"{message}, but the moshi runtime only has"):
        to_runtime_config(config)


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("transformer", "gating", "silu", "transformer.gating = 'silu'"),
        ("seanet", "true_skip", False, "seanet.true_skip = False"),
        ("quantizer", "q_dropout", True, "knows no quantizer.q_dropout"),
    ],
)
def test_what_transformers_lacks_is_refused(section: str, key: str, value: Any, message: str, folder: Path) -> None:
    values = json.loads((folder / "kyutai.json").read_text())
    values[section][key] = value
    with pytest.raises(ValueError, match=message):
        from_runtime_config(values)


def test_another_mimi_than_its_config_says_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks tensor .*is no Mimi of its config's sizes"):
        open_mimi(folder / "kyutai.safetensors")  # without its config it would be the published one
    weights = dict(open_mimi(folder / "mimi").weights)
    weights["more.weight"] = weights["downsample.conv.weight"]
    save(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "mimi" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="unknown tensor more.weight"):
        open_mimi(tmp_path)


def test_no_mimi_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no Mimi"):
        open_mimi(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "encodec"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="'encodec' is no Mimi"):
        open_mimi(tmp_path)


def test_a_mimi_inside_a_model(folder: Path, tmp_path: Path) -> None:
    """Of a Moshi that transformers has saved."""
    from transformers import MoshiConfig, MoshiForConditionalGeneration

    mimi = small_model("mimi")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    depth = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    config = MoshiConfig(
        **sizes, vocab_size=8, num_codebooks=2, audio_encoder_config=mimi.config.to_dict(), depth_decoder_config=depth
    )
    model = MoshiForConditionalGeneration(config)
    model.audio_encoder.load_state_dict(mimi.state_dict())
    model.save_pretrained(tmp_path)
    inside, beside = open_mimi(tmp_path), open_mimi(folder / "mimi")
    assert isinstance(inside, Mimi) and inside.config.num_quantizers == 6
    assert inside.weights.keys() == beside.weights.keys()
    for name, one in inside.weights.items():
        assert torch.equal(one.read(), beside.weights[name].read()), name
