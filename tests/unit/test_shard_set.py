"""Sets of shards: one catalogue, epochs in windows, few shards open, and what is missing or mixed named."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from one_rank import make_config

from megaspeech.data.shard_set import CATALOGUE, Catalogue, ShardSet, write_catalogue
from megaspeech.data.shards import ShardHeader, write_shard
from megaspeech.data.synthetic import synthetic_header

SIZES = (4, 1, 6, 3, 0, 5, 2)  # samples of each shard


@pytest.fixture
def header(tmp_path: Path) -> ShardHeader:
    return synthetic_header("asr-en", streams=make_config(tmp_path).streams)


@pytest.fixture
def directory(tmp_path: Path, header: ShardHeader) -> Path:
    """Seven shards, one of them empty, whose samples hold their number over all of them."""
    number = 0
    for shard, size in enumerate(SIZES):
        samples = [np.full((len(header.cardinalities), 3 + place), number + place) for place in range(size)]
        number += size
        write_shard(tmp_path / "set" / f"{shard:06d}", samples, header=header)
    write_catalogue(tmp_path / "set")
    return tmp_path / "set"


def test_samples_are_numbered_over_all_shards(directory: Path) -> None:
    shards = ShardSet(directory)
    assert len(shards) == sum(SIZES) == shards.header.num_samples
    assert [int(shards[index][0, 0]) for index in range(len(shards))] == list(range(len(shards)))
    assert shards.lengths(np.array([0, 3, 4, 20, 5])).tolist() == [3, 6, 3, 4, 3]
    assert [shards.name(index) for index in (3, 4, 14, 20)] == ["000000:3", "000001:0", "000005:0", "000006:1"]
    assert shards.header.num_frames == sum(shards[index].shape[1] for index in range(len(shards)))


@pytest.mark.parametrize("shuffle_shards", [1, 2, 3, 7, 50])
def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(directory: Path, shuffle_shards: int) -> None:
    shards, size = ShardSet(directory, shuffle_shards=shuffle_shards), sum(SIZES)
    epochs = [shards.places(np.arange(epoch * size, (epoch + 1) * size)).tolist() for epoch in range(3)]
    assert all(Counter(epoch) == Counter(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = ShardSet(directory, shuffle_shards=shuffle_shards)
    drawn = (50, 7, 22, 0)
    assert again.places(np.array(drawn)).tolist() == [epochs[one // size][one % size] for one in drawn]


def test_a_window_is_a_few_shards(directory: Path) -> None:
    """So an epoch opens every shard once, and few at a time."""
    shards = ShardSet(directory, shuffle_shards=2)
    places = shards.places(np.arange(sum(SIZES))).tolist()
    drawn = [shards._find(place)[0] for place in places]
    last, first = {}, {}
    for number, shard in enumerate(drawn):
        last[shard] = number
        first.setdefault(shard, number)
    assert all(len([s for s in first if first[s] <= number <= last[s]]) <= 2 for number in range(len(drawn)))
    for place in places:
        shards[place]
    assert len(shards._open) <= 4


def test_the_catalogue_is_the_same_whoever_writes_it(directory: Path) -> None:
    before = (directory / CATALOGUE).read_bytes()
    assert write_catalogue(directory).num_samples.tolist() == list(SIZES)
    assert (directory / CATALOGUE).read_bytes() == before and not list(directory.glob("*.part"))


def test_a_set_without_catalogue_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no set of shards .*nowhere .*run tools/prepare_data.py"):
        Catalogue.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no shard in it"):
        write_catalogue(tmp_path / "empty")


@pytest.mark.parametrize("content", ["{", "{}", '{"shards": {"names": []}, "header": {}}'])
def test_a_catalogue_that_is_not_whole_is_named(directory: Path, content: str) -> None:
    (directory / CATALOGUE).write_text(content)
    with pytest.raises(ValueError, match=rf"set of shards .*{CATALOGUE}.*again"):
        Catalogue.read(directory)


def test_shards_of_two_preparations_are_not_mixed(directory: Path, header: ShardHeader) -> None:
    other = replace(header, codec_fingerprint="another")
    write_shard(directory / "000002", [np.zeros((len(header.cardinalities), 3), dtype=int)], header=other)
    with pytest.raises(ValueError, match="the codec_fingerprint of 000002 is another, that of 000000 none"):
        write_catalogue(directory)


def test_a_shard_that_is_missing_is_named_when_it_is_read(directory: Path) -> None:
    (directory / "000005.json").unlink()
    shards = ShardSet(directory)
    assert int(shards[0][0, 0]) == 0
    with pytest.raises(ValueError, match="there is no shard .*000005"):
        shards[15]


def test_an_empty_set_is_refused(tmp_path: Path, header: ShardHeader) -> None:
    write_shard(tmp_path / "none" / "000000", [], header=header)
    write_catalogue(tmp_path / "none")
    assert json.loads((tmp_path / "none" / CATALOGUE).read_text())["header"]["num_samples"] == 0
    with pytest.raises(ValueError, match="holds no samples"):
        ShardSet(tmp_path / "none")
