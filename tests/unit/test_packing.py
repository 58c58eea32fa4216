"""Packed rows: no sample lost or twice, little padding, the same samples on every layout, and none sees another."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_rank import make_config, one_rank  # noqa: F401

from megaspeech.config import Config
from megaspeech.data.batch import Batch, collate, pack_rows
from megaspeech.data.mixture import TrainBatches, valid_batches
from megaspeech.data.synthetic import write_synthetic_shards
from megaspeech.model.frames import sample_starts
from megaspeech.model.speech_text_model import SpeechTextModel

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@settings(deadline=None)
@given(lengths=LENGTHS, longest=st.integers(40, 90), multiple=st.integers(1, 5))
def test_rows_hold_every_sample_once_and_are_not_too_long(lengths: list[int], longest: int, multiple: int) -> None:
    rows = pack_rows(lengths, longest=longest, multiple=multiple)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    frames = [sum(lengths[sample] for sample in row) for row in rows]
    assert max(frames) <= longest and frames == sorted(frames, reverse=True)
    assert len(rows) % multiple == 0 and len(rows) > 0


def test_padding_of_utterances_in_long_rows_is_below_three_percent() -> None:
    """Lengths as of read and spontaneous speech (log-normal, 9 s in the median), rows of 4,096 frames, 64 ranks."""
    generator = np.random.default_rng(0)
    for _ in range(3):
        lengths = np.clip(12.5 * generator.lognormal(np.log(9), 0.7, size=8000), 10, 400).astype(int).tolist()
        rows = pack_rows(lengths, longest=4096, multiple=64)
        longest = max(sum(lengths[sample] for sample in row) for row in rows)
        assert 1 - sum(lengths) / (len(rows) * longest) < 0.01


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packing")
    write_synthetic_shards(directory, streams=make_config(directory).streams, num_frames=20, shorter=12)
    return directory


def config_of(home: Path, *overrides: str) -> Config:
    return make_config(
        home,
        f"data.directory={home}",
        "data.mixture={asr-en = 1.0, tts-en = 2.0}",
        "training.train_steps=20",
        "training.global_batch_size=12",
        "training.micro_batch_size=1",
        "data.length_multiple=4",
        "optimizer.lr_warmup_steps=5",
        *overrides,
    )


PACKED = ("data.pack=true", "data.num_frames=50")


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
def test_a_step_has_the_samples_it_has_without_packing(home: Path, dp_size: int) -> None:
    plain = TrainBatches(config_of(home), dp_rank=0, dp_size=1)
    ranks = [TrainBatches(config_of(home, *PACKED), dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for step in (0, 7, 19):
        ids = [sample for rank in ranks for row in rank.sample_ids(step) for sample in row]
        assert Counter(ids) == Counter(plain.all_sample_ids(step))
        batches = [rank(step) for rank in ranks]
        assert len({len(one) for one in batches}) == 1  # as many microbatches on every rank
        frames = sum(int(batch.totals()[2]) for one in batches for batch in one)
        assert frames == sum(int(batch.totals()[2]) for batch in plain(step))
        assert all(batch.num_frames <= 52 and len(batch.codes_BST) == 1 for one in batches for batch in one)


def test_rows_say_where_their_samples_begin(home: Path) -> None:
    batches = TrainBatches(config_of(home, *PACKED), dp_rank=0, dp_size=1)
    for batch, ids in zip(batches(3), batches.sample_ids(3), strict=True):
        bounds = batch.bounds_D.tolist()
        assert bounds[0] == 0 and bounds[-1] == batch.num_frames and batch.bounds_D.dtype is torch.int32
        for (first, end), name in zip(zip(bounds, bounds[1:], strict=False), ids, strict=False):
            task, _, place = name.partition("/000000:")
            sample = batches.samples[task].shards[int(place)]
            assert np.array_equal(batch.codes_BST[0, :, first:end].numpy(), sample)
        assert (batch.codes_BST[0, :, bounds[len(ids)] :] == -1).all()


def test_an_interleaved_pipeline_gets_microbatches_by_its_stages(home: Path) -> None:
    layout = ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2")
    batches = TrainBatches(config_of(home, *PACKED, *layout), dp_rank=0, dp_size=1)
    assert all(len(batches(step)) % 2 == 0 for step in range(5))
    assert len({batch.num_frames for batch in batches(0)}) == 1


def test_validation_is_packed_too_and_whole(home: Path) -> None:
    plain = valid_batches(config_of(home), dp_rank=0, dp_size=1)
    packed = [valid_batches(config_of(home, *PACKED), dp_rank=rank, dp_size=2) for rank in range(2)]
    for name, portions in plain.items():
        expected = torch.stack([batch.totals()[:3] for batches in portions for batch in batches]).sum(0)
        read = [batch for rank in packed for batches in rank[name] for batch in batches]
        total = torch.stack([batch.totals()[:3] for batch in read]).sum(0)
        assert torch.allclose(expected, total)


def draw_samples(config: Config, *lengths: int) -> list[dict]:
    """Random samples of so many frames as `collate` takes them; a third of their tokens weighs nothing."""
    generator, streams = np.random.default_rng(1), config.streams
    return [
        {
            "codes": generator.integers(0, streams.cardinality, (streams.num_streams, frames)),
            "weights": generator.integers(0, 3, (1 + streams.num_codebooks, frames)).astype(np.float32),
            "rejected": (),
        }
        for frames in lengths
    ]


@pytest.mark.usefixtures("one_rank")
def test_no_sample_sees_another(tmp_path: Path) -> None:
    """Logits of a packed row are those of each sample alone, delays and a window shorter than a sample included."""
    config = make_config(tmp_path, *PACKED, "training.micro_batch_size=1", "data.length_multiple=1")
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    items = draw_samples(config, 17, 1, 20, 5)
    row = collate(items, length=46, config=config)
    assert row.bounds_D.tolist() == [0, 17, 18, 38, 43, 46]
    text, audio = model(row.codes_BST, bounds_D=row.bounds_D)
    first = 0
    for item in items:
        end = first + item["codes"].shape[1]
        alone_text, alone_audio = model(torch.from_numpy(item["codes"])[None])
        assert torch.allclose(text[:, first:end], alone_text, atol=1e-5)
        assert torch.allclose(audio[:, :, first:end], alone_audio, atol=1e-5)
        first = end
    # The check can fail: without the bounds it does.
    assert not torch.allclose(model(row.codes_BST)[0][:, 17:43], text[:, 17:43], atol=1e-2)


@pytest.mark.usefixtures("one_rank")
def test_losses_and_gradients_are_those_of_the_samples(tmp_path: Path) -> None:
    config = make_config(tmp_path, *PACKED, "training.micro_batch_size=1", "data.length_multiple=1")
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    items = draw_samples(config, 13, 20, 6)

    def run(batches: list[Batch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        total = torch.zeros(2)
        for batch in batches:
            depth = batch.depth_frames_BT
            weighted, _ = model(batch.codes_BST, batch.weights_BPT, depth, bounds_D=batch.bounds_D)
            weighted.sum().backward()
            total += weighted.detach()
        return total, [parameter.grad.clone() for parameter in model.parameters()]

    packed, packed_gradients = run([collate(items, length=42, config=config)])
    alone = [replace(collate([item], length=item["codes"].shape[1], config=config), bounds_D=None) for item in items]
    expected, gradients = run(alone)
    assert torch.allclose(packed, expected, rtol=1e-5)
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_starts_of_samples() -> None:
    assert sample_starts(torch.tensor([0, 3, 4, 6]), num_frames=6).tolist() == [0, 0, 0, 3, 4, 4]
