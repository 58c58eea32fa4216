"""Shards: samples and headers come back as they were written, and what does not fit is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megaspeech.config import Config
from megaspeech.config.schema import DataSection, StreamsSection
from megaspeech.data.shards import FORMAT, DamagedSampleError, Shard, ShardHeader, check_origins, write_shard

STREAMS = {
    "text_cardinality": 48,
    "num_codebooks": 2,
    "num_given_codebooks": 1,
    "cardinality": 32,
    "delays": (0, 0, 1, 0),
}
HEADER = ShardHeader(
    format=FORMAT,
    task="st-ja-en",
    codec="spectral",
    codec_fingerprint="abc",
    tokenizer_fingerprint="def",
    frame_rate=12.5,
    cardinalities=(48, 32, 32, 32),
    num_codebooks=2,
    silence=(5, 6),
    task_delay=3,
    speech_lead=1,
)


def config_of(*, streams: dict | None = None, data: dict | None = None) -> Config:
    """The two sections that shards are held against."""
    return Config.model_construct(
        streams=StreamsSection(**{**STREAMS, **(streams or {})}), data=DataSection(**(data or {}))
    )


def samples(*lengths: int, high: int = 32) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(-1, high, (4, length)) for length in lengths]


def test_samples_and_header_come_back(tmp_path: Path) -> None:
    written = samples(5, 1, 9)
    header = write_shard(tmp_path / "deep" / "st-ja-en", written, header=HEADER)
    assert header == replace(
        HEADER, num_samples=3, num_frames=15, num_bytes=header.num_bytes, checksums=header.checksums
    )
    assert header.num_bytes["bin"] == 15 * 4 * 2 and header.num_bytes["xxh64"] == 3 * 8
    shard = Shard(tmp_path / "deep" / "st-ja-en")
    assert shard.header == header == ShardHeader.read(tmp_path / "deep" / "st-ja-en")
    assert (len(shard), shard.name) == (3, "st-ja-en")
    for index, sample in enumerate(written):
        assert np.array_equal(shard[index], sample) and shard.lengths(np.array([index])) == sample.shape[1]
    assert sorted(path.suffix for path in (tmp_path / "deep").iterdir()) == [".bin", ".idx", ".json", ".xxh64"]


def test_tuples_stay_tuples(tmp_path: Path) -> None:
    """JSON makes lists of them, and a list would not equal the config's tuple."""
    write_shard(tmp_path / "x", samples(2), header=HEADER)
    header = ShardHeader.read(tmp_path / "x")
    assert header.cardinalities == HEADER.cardinalities and header.silence == (5, 6)
    header.check_run(config_of(), prefix=tmp_path / "x")


@pytest.mark.parametrize("cardinality, num_bytes", [(32_766, 2), (32_767, 2), (65_534, 2), (65_535, 4), (100_000, 4)])
def test_tokens_are_as_wide_as_the_largest_needs(tmp_path: Path, cardinality: int, num_bytes: int) -> None:
    header = replace(HEADER, cardinalities=(cardinality, 32, 32, 32))
    written = np.full((4, 3), -1)
    written[0] = cardinality  # the initial token, the largest there is
    write_shard(tmp_path / "x", [written], header=header)
    assert (tmp_path / "x.bin").stat().st_size == 4 * 3 * num_bytes
    shard = Shard(tmp_path / "x")
    assert np.array_equal(shard[0], written)


def test_a_sample_outlives_its_shard(tmp_path: Path) -> None:
    (written,) = samples(5)
    write_shard(tmp_path / "x", [written], header=HEADER)
    assert np.array_equal(Shard(tmp_path / "x")[0], written)


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    (whole,) = samples(12)
    write_shard(tmp_path / "x", [whole[:, ::2], whole[:, ::-1]], header=HEADER)
    shard = Shard(tmp_path / "x")
    assert np.array_equal(shard[0], whole[:, ::2]) and np.array_equal(shard[1], whole[:, ::-1])


@pytest.mark.parametrize(
    "streams, data, words",
    [
        ({"cardinality": 64}, {}, "cardinalities is (48, 32, 32, 32), that of [streams] (48, 64, 64, 64)"),
        ({"text_cardinality": 64}, {}, "cardinalities"),
        ({"num_given_codebooks": 2, "delays": (0, 0, 1, 0, 1)}, {}, "cardinalities"),
        ({"num_codebooks": 1, "num_given_codebooks": 2}, {}, "num_codebooks is 2, that of [streams] 1"),
        ({}, {"task_delay": 4}, "task_delay is 3, that of [data] 4"),
        ({}, {"speech_lead": 0}, "speech_lead is 1, that of [data] 0"),
    ],
)
def test_shards_of_another_run_are_refused(streams: dict, data: dict, words: str) -> None:
    HEADER.check_run(config_of(), prefix="x")
    with pytest.raises(ValueError) as caught:
        HEADER.check_run(config_of(streams=streams, data=data), prefix="here/x")
    assert "here/x" in str(caught.value) and words in str(caught.value) and "prepare the shards" in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"codec_fingerprint": "xyz"}, "codec_fingerprint is xyz, that of shards a is abc"),
        ({"tokenizer_fingerprint": "xyz"}, "tokenizer_fingerprint is xyz, that of shards a is def"),
        ({"frame_rate": 25.0}, "frame_rate is 25.0, that of shards a is 12.5"),
    ],
)
def test_shards_of_one_mixture_have_one_origin(change: dict, words: str) -> None:
    check_origins({"a": HEADER, "b": HEADER}, codec=None, tokenizer=None)
    check_origins({"a": HEADER}, codec=("codec.path = c", "abc"), tokenizer=("data.tokenizer = t", "def"))
    with pytest.raises(ValueError) as caught:
        check_origins({"a": HEADER, "b": replace(HEADER, **change)}, codec=None, tokenizer=None)
    assert f"shards b: their {words}" in str(caught.value) and "prepare the shards again" in str(caught.value)


def test_shards_have_the_origin_of_the_run() -> None:
    with pytest.raises(ValueError, match=r"codec_fingerprint is abc, that of codec.path = c is xyz"):
        check_origins({"a": HEADER}, codec=("codec.path = c", "xyz"), tokenizer=None)
    with pytest.raises(ValueError, match=r"tokenizer_fingerprint is def, that of data.tokenizer = t is xyz"):
        check_origins({"a": HEADER}, codec=None, tokenizer=("data.tokenizer = t", "xyz"))


def test_missing_shard_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.mixture: .*asr-xx.json is missing.*prepare_data"):
        Shard(tmp_path / "asr-xx")


def test_shard_without_its_header_is_not_whole(tmp_path: Path) -> None:
    write_shard(tmp_path / "x", samples(2), header=HEADER)
    (tmp_path / "x.json").rename(tmp_path / "x.json.part")
    with pytest.raises(ValueError, match="missing"):
        Shard(tmp_path / "x")


@pytest.mark.parametrize("change", [{"format": 1}, {"silence": None}, {"checksums": None}])
def test_header_of_another_format_is_refused(tmp_path: Path, change: dict) -> None:
    write_shard(tmp_path / "x", samples(2), header=HEADER)
    values = {**json.loads((tmp_path / "x.json").read_text()), **change}
    (tmp_path / "x.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(
        ValueError,
        match=rf"x\.json: not a shard header of format {FORMAT}; remove {tmp_path} and prepare the shards again",
    ):
        Shard(tmp_path / "x")


def test_empty_shard_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "x", [], header=HEADER)
    with pytest.raises(ValueError, match=r"x holds no samples; look into rejected\.jsonl"):
        Shard(tmp_path / "x")


def flip(path: Path, place: int, *, bit: int = 0) -> None:
    """One bit of one byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("place, bit, index", [(0, 0, 0), (5 * 8 - 1, 7, 0), (5 * 8, 3, 1), (15 * 8 - 1, 0, 2)])
def test_a_flipped_bit_is_found_and_the_sample_named(tmp_path: Path, place: int, bit: int, index: int) -> None:
    written = samples(5, 1, 9)
    write_shard(tmp_path / "x", written, header=HEADER)
    flip(tmp_path / "x.bin", place, bit=bit)
    shard = Shard(tmp_path / "x")
    for other in {0, 1, 2} - {index}:
        assert np.array_equal(shard[other], written[other])
    with pytest.raises(
        DamagedSampleError, match=rf"^sample {index} of shard {tmp_path}/x: its checksum is not the one"
    ):
        shard[index]
    assert shard.lengths(np.array([index])) == written[index].shape[1]


def test_what_is_cut_off_under_an_open_shard_is_named(tmp_path: Path) -> None:
    """A memory map would end the process here."""
    written = samples(5, 1, 9)
    write_shard(tmp_path / "x", written, header=HEADER)
    shard = Shard(tmp_path / "x")
    os.truncate(tmp_path / "x.bin", 7 * 8)
    assert np.array_equal(shard[1], written[1])
    with pytest.raises(DamagedSampleError, match=rf"^sample 2 of shard {tmp_path}/x: 8 of its 72 bytes are left"):
        shard[2]


@pytest.mark.parametrize("suffix", ["bin", "idx", "xxh64"])
def test_truncated_and_missing_files_are_refused_at_the_start(tmp_path: Path, suffix: str) -> None:
    write_shard(tmp_path / "x", samples(5, 1, 9), header=HEADER)
    path = tmp_path / f"x.{suffix}"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ValueError, match=rf"x\.{suffix} has {size - 1} bytes instead of the {size} .*; copy the shard"):
        Shard(tmp_path / "x")
    path.unlink()
    with pytest.raises(ValueError, match=rf"x\.{suffix} is missing; copy the shard again.* or remove"):
        Shard(tmp_path / "x")


@pytest.mark.parametrize("suffix", ["idx", "xxh64"])
def test_a_flipped_bit_beside_the_samples_is_refused_at_the_start(tmp_path: Path, suffix: str) -> None:
    write_shard(tmp_path / "x", samples(5, 1, 9), header=HEADER)
    path = tmp_path / f"x.{suffix}"
    for place in range(path.stat().st_size):
        flip(path, place)
        with pytest.raises(ValueError, match=rf"shard .*/x: the bytes of .*x\.{suffix} are not those written; copy"):
            Shard(tmp_path / "x")
        flip(path, place)
    Shard(tmp_path / "x")


def test_header_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "x", samples(5), header=HEADER)
    os.truncate(tmp_path / "x.json", 100)
    with pytest.raises(ValueError, match=r"x\.json is not JSON any more .*; copy the shard again"):
        Shard(tmp_path / "x")


def test_shard_that_is_being_written_again_is_not_whole(tmp_path: Path) -> None:
    """Killed in between, the header of the first shard would vouch for files of the second."""
    write_shard(tmp_path / "x", samples(5, 1, 9), header=HEADER)

    def killed() -> Iterator[np.ndarray]:
        yield from samples(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x", killed(), header=HEADER)
    with pytest.raises(ValueError, match="missing"):
        Shard(tmp_path / "x")
    write_shard(tmp_path / "x", samples(4), header=HEADER)
    assert len(Shard(tmp_path / "x")) == 1
