"""What transformers' models cannot hold, or a folder of theirs has wrong, is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import make_config, one_rank  # noqa: F401
from transformers_folders import companions, native_model, stored, write_transformers

from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.stored import StoredModel
from megaspeech.conversion.transformers_folders import open_transformers, transformers_files

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers_refusals")


@pytest.fixture(scope="module")
def tiny(room: Path, one_rank: None) -> tuple[StoredModel, Path]:  # noqa: F811
    """(a model, transformers' folder of it)."""
    config = make_config(room)
    model = stored(native_model(config), config=config, beside=companions(room))
    return model, write_transformers(model, room / "tiny")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["streams.num_codebooks=1", "streams.num_given_codebooks=1", "streams.delays=[0,0,0]"], "num_codebooks: 1"),
        (["streams.num_given_codebooks=0", "streams.delays=[0,0,1,1,1]"], "num_given_codebooks: 0"),
        (["streams.delays=[0,0,2,2,2,0,2,2,2]"], "streams.delays"),
        (["streams.delays=[1,0,1,1,1,0,1,1,1]"], "streams.delays"),
        (["depth.low_rank_embeddings=8"], "low_rank_embeddings: 8"),
        (["streams.cardinality=64"], "streams.cardinality: 64"),
        (
            ["streams.num_codebooks=8", "streams.num_given_codebooks=8",
             f"streams.delays={[0, *[0, *[1] * 7] * 2]}"],
            "8 codebooks a speaker, but the Mimi has 6",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused(overrides: list[str], message: str, room: Path) -> None:
    config = make_config(room, *overrides)
    weights = {"text_head.weight": Deferred.of(torch.zeros(48, 64))}
    with pytest.raises(ValueError, match=f"{message}.*convert it to moshi instead".replace("[", r"\[")):
        transformers_files(StoredModel(config, weights, companions(room)))


@pytest.mark.parametrize(
    "override, message",
    [
        ("temporal.num_moe_experts=4", "num_moe_experts: 4.* has experts"),
        ("temporal.add_qkv_bias=true", "add_qkv_bias: True.* has biases"),
        ("temporal.qk_layernorm=true", "qk_layernorm: True.* has norms"),
    ],
)
@pytest.mark.parametrize("num_codebooks", [4, 0])
def test_layers_that_no_moshi_has_are_refused(override: str, message: str, num_codebooks: int, room: Path) -> None:
    config = make_config(room, override, f"streams.num_codebooks={num_codebooks}",
                         f"streams.delays={[0] * (5 + num_codebooks)}")  # fmt: skip
    weights = {"text_head.weight": Deferred.of(torch.zeros(48, 64))}
    with pytest.raises(ValueError, match=message):
        transformers_files(StoredModel(config, weights, companions(room)))


def test_extra_heads_are_left_out_and_said(room: Path) -> None:
    config = make_config(room, "temporal.num_extra_heads=2")
    files = transformers_files(stored(native_model(config), config=config, beside=companions(room)))
    assert "extra heads" in files.notes[0] and not [name for name in files.weights if "extra" in name]


@pytest.mark.parametrize("lacking", ["tokenizer", "codec"])
def test_companions_are_asked_for(lacking: str, tiny: Any) -> None:
    model = tiny[0]
    with pytest.raises(ValueError, match=f"--{lacking}"):
        transformers_files(replace(model, companions=replace(model.companions, **{lacking: None})))


def damaged(folder: Path, source: Path, **changes: Any) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2'.*--from llama"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "rope_parameters"),
        ({"num_hidden_layers": 3}, "layers.3.* is none of the model"),
        ({"num_hidden_layers": 5}, "layers.4.* is missing"),
        ({"vocab_size": 47}, "needs 48 rows, not 49"),
    ],
)
def test_a_config_that_is_not_of_its_weights_is_named(
    changes: dict[str, Any], message: str, tiny: Any, tmp_path: Path
) -> None:
    folder = damaged(tmp_path / "damaged", tiny[-1], **changes)
    with pytest.raises(ValueError, match=message):
        open_transformers(folder)


def test_no_config_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no config.json"):
        open_transformers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="transformers cannot read it"):
        open_transformers(tmp_path)
