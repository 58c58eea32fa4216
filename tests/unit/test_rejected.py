"""Damaged samples while training: an empty row of the same shape, said once, and the end of the run when many."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from one_rank import make_config

from megaspeech.config import Config
from megaspeech.data.batch import Batch
from megaspeech.data.mixture import TrainBatches, valid_batches
from megaspeech.data.rejected import ALWAYS_BORNE, RejectedSamples
from megaspeech.data.synthetic import write_synthetic_shards
from megaspeech.data.tasks import ZERO_TOKEN


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = make_config(
        tmp_path, f"data.directory={tmp_path}", "data.mixture={asr-en = 1.0}", "data.codebook_dropout=0.5"
    )
    write_synthetic_shards(tmp_path, streams=config.streams, names=("asr-en",))
    return config


def damage(path: Path, *, first: int = 0, count: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(first)
        file.write(os.urandom(count))


def test_damaged_sample_is_an_empty_row_and_all_else_as_it_was(config: Config) -> None:
    """Steps long enough for every sample to come up, on two data parallel ranks."""
    whole = [TrainBatches(config, dp_rank=rank, dp_size=2) for rank in range(2)]
    expected = [[ranks(step) for step in range(4)] for ranks in whole]
    path = Path(config.data.directory) / "train" / "asr-en" / "000000.bin"
    damage(path, count=path.stat().st_size // 4)
    torn = [TrainBatches(config, dp_rank=rank, dp_size=2) for rank in range(2)]
    seen: set[str] = set()
    for ranks, before in zip(torn, expected, strict=True):
        for step in range(4):
            after, names = ranks(step), ranks.sample_ids(step)
            for one, other, ids in zip(before[step], after, names, strict=True):
                assert one.codes_BST.shape == other.codes_BST.shape
                rejected = dict(other.rejected)
                assert rejected.keys() <= set(ids)
                for row, name in enumerate(ids):
                    if name in rejected:
                        assert (other.codes_BST[row] == ZERO_TOKEN).all() and (other.weights_BPT[row] == 0).all()
                    else:
                        assert torch.equal(one.codes_BST[row], other.codes_BST[row])
                        assert torch.equal(one.weights_BPT[row], other.weights_BPT[row])
                seen |= rejected.keys()
    assert {f"asr-en/000000:{index}" for index in range(9)} <= seen and len(seen) < 20


def test_damaged_validation_sample_is_left_out(config: Config) -> None:
    damage(Path(config.data.directory) / "valid" / "asr-en" / "000000.bin")
    ((batches,),) = valid_batches(config, dp_rank=0, dp_size=1).values()
    ((name, reason),) = [entry for batch in batches for entry in batch.rejected]
    assert name == "asr-en/000000:0" and "valid/asr-en/000000: its checksum" in reason


def batches_of(*rejected: int, size: int = 8) -> list[Batch]:
    codes = torch.zeros(size, 1, 1, dtype=torch.int64)
    return [
        Batch(codes, codes.float(), tuple((f"x:{index}", f"sample {index} of shard y/x: torn") for index in rejected))
    ]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_said_once_by_all_ranks_epochs_and_starts_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run" / "rejected_samples.jsonl"
    ranks = [RejectedSamples(path) for _ in range(3)]
    for rank in ranks:
        rank.take(4, batches_of())
    assert not path.exists()
    for rank in [*ranks, RejectedSamples(path)]:
        for step in (5, 9):
            rank.take(step, batches_of(1, 11))
    assert lines(path) == [
        {"step": 5, "sample": f"x:{index}", "reason": f"sample {index} of shard y/x: torn"} for index in (1, 11)
    ]
    shown = capsys.readouterr().out
    assert shown.count("left out") == 2 and "step      5  left out x:1: sample 1 of shard y/x: torn\n" in shown


def test_a_line_that_a_kill_cut_short_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "rejected_samples.jsonl"
    path.write_text('{"step": 1, "sam')
    RejectedSamples(path).take(5, batches_of(1))
    assert '"sample": "x:1"' in path.read_text()


def test_many_damaged_samples_end_the_run(tmp_path: Path) -> None:
    """A handful is borne at any time; later, one in a hundred."""
    path = tmp_path / "rejected_samples.jsonl"
    early = RejectedSamples(path)
    early.take(0, batches_of(*range(ALWAYS_BORNE), size=20))
    with pytest.raises(ValueError, match=r"11 of the 40 samples read on this rank.*x: torn; all are in .*prepare them"):
        early.take(1, batches_of(99, size=20))
    late = RejectedSamples(path)
    late.take(0, batches_of(size=1970))
    late.take(1, batches_of(*range(20), size=30))  # 20 of 2,000
    with pytest.raises(ValueError, match=r"21 of the 2,001 samples"):
        late.take(2, batches_of(99, size=1))


def test_record_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    RejectedSamples(tmp_path / "file" / "rejected_samples.jsonl").take(5, batches_of(1))
    shown = capsys.readouterr().out
    assert "x:1" in shown and "could not be written" in shown
