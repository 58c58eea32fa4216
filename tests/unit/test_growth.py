"""Streams that are added change nothing until they are heard, and are copies by the stated rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from native_folders import logits
from one_rank import make_config, one_rank  # noqa: F401
from torch import Tensor

from megaspeech.config import Config
from megaspeech.conversion.growth import grow_streams
from megaspeech.conversion.native import check_native
from megaspeech.conversion.random_model import random_model
from megaspeech.conversion.stored import StoredModel
from megaspeech.model.embedding import table_offsets

pytestmark = pytest.mark.usefixtures("one_rank")

SHARED = ["depth.weights_per_step_schedule=[0, 1, 2, 2]", "depth.low_rank_embeddings=24"]
ONE_WAY = ["streams.num_given_codebooks=0", "streams.delays=[0, 0, 1, 2, 3]"]
HEARS = ["streams.num_codebooks=0", "streams.delays=[2, 0, 0, 0, 0]"]
KINDS = {
    "duplex": [],
    "one-way": ONE_WAY,
    "shared weights": SHARED,
    "one input for all": ["depth.multi_linear=false", *SHARED],
    "hears alone": HEARS,
}
CASES = [
    ("one-way", 4, 4),
    ("one-way", 7, 9),
    ("duplex", 8, 8),
    ("duplex", 4, 6),
    ("duplex", 6, 4),
    ("shared weights", 8, 6),
    ("one input for all", 6, 5),
    ("hears alone", 0, 7),
]


def config_of(kind: str, directory: Path) -> Config:
    return make_config(directory, *KINDS[kind])


def drawn_codes(config: Config) -> Tensor:
    """Zero tokens among them."""
    source = torch.Generator().manual_seed(2)
    rows = [torch.randint(-1, size, (2, 20), generator=source) for size in config.streams.cardinalities]
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("kind, own, given", CASES)
def test_logits_stay_while_new_streams_are_silent(kind: str, own: int, given: int, tmp_path: Path) -> None:
    old = random_model(config_of(kind, tmp_path), seed=5)
    grown = grow_streams(old, num_codebooks=own, num_given_codebooks=given)
    codes, streams = drawn_codes(old.config), old.config.streams
    wider = torch.full((2, 1 + own + given, 20), -1)
    wider[:, : 1 + streams.num_codebooks] = codes[:, : 1 + streams.num_codebooks]
    wider[:, 1 + own : 1 + own + streams.num_given_codebooks] = codes[:, 1 + streams.num_codebooks :]
    (text, audio), (new_text, new_audio) = logits(old, codes), logits(grown, wider)
    torch.testing.assert_close(new_text, text, rtol=0, atol=1e-5)
    torch.testing.assert_close(new_audio[:, : streams.num_codebooks], audio, rtol=0, atol=1e-5)
    if given:  # and do not stay when they are not
        wider[:, -1] = 3
        assert (logits(grown, wider)[0] - text).abs().max() > 1e-2
    assert grown.notes[-1].startswith(f"streams: {streams.num_codebooks} own and {streams.num_given_codebooks} given")


@pytest.mark.parametrize("kind, own, given", CASES)
def test_back_again_every_bit_is_the_same(kind: str, own: int, given: int, tmp_path: Path) -> None:
    old = random_model(config_of(kind, tmp_path), seed=5)
    streams, grown = old.config.streams, grow_streams(old, num_codebooks=own, num_given_codebooks=given)
    back = grow_streams(grown, num_codebooks=streams.num_codebooks, num_given_codebooks=streams.num_given_codebooks)
    assert back.config == old.config and back.weights.keys() == old.weights.keys()
    check_native(back)
    used = sum(streams.cardinalities) + len(streams.cardinalities)
    read = streams.cardinalities[: streams.num_codebooks]
    for name, one in old.weights.items():
        rows = {"embedding.weight": used, "depth.embedding": sum(read) + len(read)}.get(name, one.shape[0])
        assert torch.equal(back.weights[name].read()[:rows], one.read()[:rows]), name


def tables_of(model: StoredModel) -> list[Tensor]:
    cards = model.config.streams.cardinalities
    table = model.weights["embedding.weight"].read()
    return [table[first : first + size] for first, size in zip(table_offsets(cards), cards, strict=True)]


def test_new_streams_are_copies(tmp_path: Path) -> None:
    old = random_model(config_of("one-way", tmp_path), seed=5)
    grown = grow_streams(old, num_codebooks=6, num_given_codebooks=5)
    before, after = tables_of(old), tables_of(grown)
    origins = [0, 1, 2, 3, 4, 4, 4, 1, 2, 3, 4, 4]
    assert all(torch.equal(after[stream], before[origin]) for stream, origin in enumerate(origins))
    assert grown.config.streams.delays == (0, 0, 1, 2, 3, 3, 3, 0, 1, 2, 3, 3)
    heads = grown.weights["depth.heads.weight"].read().unflatten(0, (6, -1))
    assert torch.equal(heads[3], heads[5]) and not torch.equal(heads[2], heads[3])


def test_a_schedule_goes_on_with_its_last_set(tmp_path: Path) -> None:
    old = random_model(config_of("shared weights", tmp_path))
    grown = grow_streams(old, num_codebooks=6)
    assert grown.config.depth.weights_per_step_schedule == (0, 1, 2, 2, 2, 2)
    assert grown.weights["depth.layers.0.fc1.weight"].shape == old.weights["depth.layers.0.fc1.weight"].shape


@pytest.mark.parametrize(
    "overrides, own, given, words",
    [
        (["streams.num_codebooks=1", "streams.delays=[0, 0, 0, 0, 0, 0]"], 4, 4, "1 cannot become 4"),
        (HEARS, 4, 4, "0 cannot become 4"),
        ([], 0, 4, "keep at least one of the model's own"),
        ([], 4, -1, "keep at least one of the model's own"),
    ],
)
def test_what_nothing_can_be_made_of_is_refused(
    overrides: list[str], own: int, given: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        grow_streams(random_model(make_config(tmp_path, *overrides)), num_codebooks=own, num_given_codebooks=given)


def test_nothing_asked_is_nothing_changed(tmp_path: Path) -> None:
    model = random_model(make_config(tmp_path))
    assert grow_streams(model) is model and grow_streams(model, num_codebooks=4) is model
