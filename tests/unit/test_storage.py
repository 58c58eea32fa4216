"""Shards in S3, by moto's S3: the same batches as from disk, indexes fetched once, and what goes wrong in one line."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from one_rank import make_config

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto")

from megaspeech.config import Config  # noqa: E402
from megaspeech.data.loading import StepBatches  # noqa: E402
from megaspeech.data.mixture import TrainBatches, valid_batches  # noqa: E402
from megaspeech.data.shard_set import ShardSet  # noqa: E402
from megaspeech.data.shards import DamagedSampleError  # noqa: E402
from megaspeech.data.storage import shards_directory  # noqa: E402
from megaspeech.data.synthetic import write_synthetic_shards  # noqa: E402


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A bucket with two sets of shards under corpus/v1, which lie in `tmp_path`/shards too."""
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    write_synthetic_shards(tmp_path / "shards", streams=make_config(tmp_path).streams)
    with moto.mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="speech")
        for path in (tmp_path / "shards").rglob("*.*"):
            client.upload_file(str(path), "speech", f"corpus/v1/{path.relative_to(tmp_path / 'shards')}")
        yield client


def config_of(tmp_path: Path, directory: str, *overrides: str) -> Config:
    return make_config(
        tmp_path,
        f"data.directory={directory}",
        "data.mixture={asr-en = 1.0, tts-en = 2.0}",
        "training.train_steps=20",
        "training.global_batch_size=8",
        "training.micro_batch_size=2",
        "optimizer.lr_warmup_steps=5",
        *overrides,
    )


def remote(tmp_path: Path) -> Config:
    return config_of(tmp_path, "s3://speech/corpus/v1", f"data.index_cache={tmp_path}/cache")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_from_disk(tmp_path: Path, bucket: object, num_workers: int) -> None:
    ours = TrainBatches(remote(tmp_path), dp_rank=0, dp_size=1)
    theirs = TrainBatches(config_of(tmp_path, f"{tmp_path}/shards"), dp_rank=0, dp_size=1)
    assert ours.sample_ids(3) == theirs.sample_ids(3)
    for step, batches in enumerate(StepBatches(ours, steps=range(4), num_workers=num_workers)):
        for batch, expected in zip(batches, theirs(step), strict=True):
            assert torch.equal(batch.codes_BST, expected.codes_BST) and not batch.rejected
    assert list(valid_batches(remote(tmp_path), dp_rank=0, dp_size=1)) == ["asr-en", "tts-en"]


def test_indexes_alone_are_fetched_and_once(tmp_path: Path, bucket: object) -> None:
    directory = shards_directory(remote(tmp_path).data, "train", names=["asr-en"])
    fetched = sorted(path.name for path in (directory / "asr-en").iterdir())
    assert fetched == ["000000.idx", "000000.json", "000000.xxh64", "catalogue.json", "origin"]
    assert not (directory / "tts-en").exists()
    before = os.stat(directory / "asr-en" / "000000.idx").st_mtime_ns
    shards_directory(remote(tmp_path).data, "train", names=["asr-en"])
    assert os.stat(directory / "asr-en" / "000000.idx").st_mtime_ns == before


def test_what_is_prepared_anew_is_fetched_anew(tmp_path: Path, bucket: object) -> None:
    """Files of the same size, with other checksums in them."""
    streams = make_config(tmp_path).streams
    for names in (("asr-en", "tts-en"), ("tts-en", "asr-en")):
        time.sleep(1.1)  # S3 counts in seconds
        write_synthetic_shards(tmp_path / names[0], streams=streams, names=names, shorter=0)
        anew = tmp_path / names[0] / "train" / "asr-en"
        for path in anew.iterdir():
            bucket.upload_file(str(path), "speech", f"corpus/v1/train/asr-en/{path.name}")
        shards = ShardSet(shards_directory(remote(tmp_path).data, "train", names=["asr-en"]) / "asr-en")
        assert np.array_equal(shards[0], ShardSet(anew)[0])


def test_a_sample_that_cannot_be_read_is_a_damaged_one(
    tmp_path: Path, bucket: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaspeech.data.storage.REQUEST_BYTES", 1)  # else the whole small shard is read at once
    directory = shards_directory(remote(tmp_path).data, "train", names=["asr-en"])
    content = bytearray(bucket.get_object(Bucket="speech", Key="corpus/v1/train/asr-en/000000.bin")["Body"].read())
    content[3] ^= 1
    bucket.put_object(Bucket="speech", Key="corpus/v1/train/asr-en/000000.bin", Body=bytes(content))
    shards = ShardSet(directory / "asr-en")
    with pytest.raises(DamagedSampleError, match="its checksum"):
        shards[0]
    assert np.array_equal(shards[1], ShardSet(tmp_path / "shards" / "train" / "asr-en")[1])
    bucket.delete_object(Bucket="speech", Key="corpus/v1/train/asr-en/000000.bin")
    with pytest.raises(DamagedSampleError, match="unreadable: S3: .*NoSuchKey"):
        shards[39]


def test_faults_are_one_line(tmp_path: Path, bucket: object) -> None:
    with pytest.raises(ValueError, match=r"data.index_cache: is empty, but data.directory = s3://speech/corpus/v1"):
        TrainBatches(config_of(tmp_path, "s3://speech/corpus/v1"), dp_rank=0, dp_size=1)
    cache = f"data.index_cache={tmp_path}/cache"
    with pytest.raises(ValueError, match=r"s3://nowhere/x/train cannot be read \(.*NoSuchBucket.*\); check its name"):
        TrainBatches(config_of(tmp_path, "s3://nowhere/x", cache), dp_rank=0, dp_size=1)
    with pytest.raises(ValueError, match="there is no set of shards"):
        TrainBatches(config_of(tmp_path, "s3://speech/corpus/v2", cache), dp_rank=0, dp_size=1)
