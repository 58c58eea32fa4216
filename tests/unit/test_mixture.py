"""The mixture: by weight, a function of the step alone, the same global batch on any number of ranks; loss weights."""

from __future__ import annotations

import os
import resource
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from one_rank import make_config

from megaspeech.config import Config
from megaspeech.data import mixture
from megaspeech.data.batch import Batch, depth_frames
from megaspeech.data.mixture import TrainBatches, valid_batches
from megaspeech.data.samples import ShardSamples
from megaspeech.data.shard_set import write_catalogue, write_shard_set
from megaspeech.data.shards import ShardHeader, write_shard
from megaspeech.data.synthetic import synthetic_header
from megaspeech.data.tasks import ZERO_TOKEN
from megaspeech.data.weights import loss_weights

SILENCE = (7, 8, 9, 10)
SIZES = {"asr-en": 12, "tts-en": 10}  # samples
BATCHING = ["training.micro_batch_size=2", "training.global_batch_size=16", "training.train_steps=200"]
MIXTURE = "data.mixture={asr-en = 1.0, tts-en = 3.0}"


def header_of(config: Config, task: str) -> ShardHeader:
    return replace(synthetic_header(task, streams=config.streams), silence=SILENCE)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose samples carry their number in the last stream and their shard's in the one before."""
    directory = tmp_path_factory.mktemp("mixture")
    config = make_config(directory)
    for place, (name, count) in enumerate(SIZES.items()):
        for split, size in (("train", count), ("valid", 5)):
            generator = np.random.default_rng(place)
            samples = []
            for number in range(size):
                codes = generator.integers(0, 32, (config.streams.num_streams, int(generator.integers(6, 21))))
                codes[-1], codes[-2] = number, place
                samples.append(codes)
            write_shard_set(directory / "shards" / split / name, samples, header=header_of(config, name))
    return directory


def config_of(home: Path, *overrides: str) -> Config:
    # Later overrides win over earlier ones.
    return make_config(home, f"data.directory={home}/shards", MIXTURE, *BATCHING, *overrides)


def samples_of(batches: list[Batch]) -> list[tuple[int, int]]:
    """(shard, number) of every sample, filled up rows left out."""
    rows = torch.cat([batch.codes_BST[:, -2:, 0] for batch in batches]).tolist()
    return [(place, number) for place, number in rows if number != ZERO_TOKEN]


def test_proportions_follow_the_weights(home: Path) -> None:
    batches = TrainBatches(config_of(home), dp_rank=0, dp_size=1)
    drawn = Counter(place for step in range(50) for place, _ in samples_of(batches(step)))
    assert sum(drawn.values()) == 800
    assert drawn[1] / 800 == pytest.approx(0.75, abs=0.01)


def test_weights_need_not_sum_to_one(home: Path) -> None:
    few, many = (
        TrainBatches(config_of(home, f"data.mixture={{asr-en = {a}, tts-en = {b}}}"), dp_rank=0, dp_size=1)
        for a, b in ((1.0, 3.0), (10.0, 30.0))
    )
    assert [samples_of(few(step)) for step in range(5)] == [samples_of(many(step)) for step in range(5)]


def as_rows(batches: list[Batch]) -> list[tuple]:
    """Every row of codes and weights as something hashable, padding cut off."""
    rows = []
    for batch in batches:
        for codes_ST, weights_PT in zip(batch.codes_BST, batch.weights_BPT, strict=True):
            frames = int((codes_ST[-1] != ZERO_TOKEN).sum())
            rows.append(
                (tuple(codes_ST[:, :frames].flatten().tolist()), tuple(weights_PT[:, :frames].flatten().tolist()))
            )
    return rows


def test_batches_are_a_function_of_the_step(home: Path) -> None:
    config = config_of(home, "loss.silence_fraction=0.5", "loss.speech_fraction=0.5")
    straight = TrainBatches(config, dp_rank=0, dp_size=1)
    forward = [as_rows(straight(step)) for step in range(12)]
    resumed = TrainBatches(config, dp_rank=0, dp_size=1)
    for step in (11, 3, 7, 0, 3):  # from the middle, and back, over epochs
        assert as_rows(resumed(step)) == forward[step]
    assert len({tuple(rows) for rows in forward}) == len(forward)
    other = TrainBatches(config_of(home, "run.seed=2"), dp_rank=0, dp_size=1)
    assert samples_of(other(0)) != samples_of(straight(0))


@pytest.mark.parametrize("dp_size", [2, 4, 8])
def test_ranks_share_the_global_batch(home: Path, dp_size: int) -> None:
    config = config_of(home, "loss.silence_fraction=0.5", "loss.speech_fraction=0.5")
    whole = TrainBatches(config, dp_rank=0, dp_size=1)
    parts = [TrainBatches(config, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for step in (0, 5):
        shares = [part(step) for part in parts]
        assert {len(share) for share in shares} == {16 // 2 // dp_size}
        together = [row for share in shares for row in as_rows(share)]
        assert Counter(together) == Counter(as_rows(whole(step))) and len(together) == 16


def test_ranks_have_like_amounts(home: Path) -> None:
    """Dealing to and fro: no rank gets all the long microbatches."""
    config = config_of(home, "data.length_multiple=1")
    amounts = [
        sum(batch.num_frames for step in range(8) for batch in TrainBatches(config, dp_rank=rank, dp_size=2)(step))
        for rank in range(2)
    ]
    assert max(amounts) < 1.05 * min(amounts)


def test_epochs_are_permutations_each_of_its_own(home: Path) -> None:
    overrides = ["data.mixture={asr-en = 1.0}", "training.global_batch_size=12"]
    batches = TrainBatches(config_of(home, *overrides), dp_rank=0, dp_size=1)
    everything = [(0, number) for number in range(12)]
    epochs = [
        [batches.samples["asr-en"][index]["codes"][-1, 0] for index in range(start, start + 12)]
        for start in (0, 12, 24)
    ]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(12))
    assert sorted(samples_of(batches(0))) == everything == sorted(samples_of(batches(7)))


def test_microbatches_are_sorted_and_padded_to_the_multiple(home: Path) -> None:
    batches = TrainBatches(config_of(home, "data.length_multiple=8"), dp_rank=0, dp_size=1)(0)
    lengths = [[int((row[-1] != ZERO_TOKEN).sum()) for row in batch.codes_BST] for batch in batches]
    flat = [length for pair in lengths for length in pair]
    assert flat == sorted(flat) and flat[0] < flat[-1]
    assert [batch.num_frames for batch in batches] == [-(-max(pair) // 8) * 8 for pair in lengths]
    for batch, pair in zip(batches, lengths, strict=True):
        for row, weights, length in zip(batch.codes_BST, batch.weights_BPT, pair, strict=True):
            assert (row[:, length:] == ZERO_TOKEN).all() and (weights[:, length:] == 0).all()
            assert (row[:, :length] >= 0).all()


def test_pipelines_get_microbatches_of_one_length(home: Path) -> None:
    overrides = ["data.length_multiple=2", "parallel.pipeline_model_parallel_size=2"]
    batches = TrainBatches(config_of(home, *overrides), dp_rank=0, dp_size=1)(0)
    alone = TrainBatches(config_of(home, *overrides[:1]), dp_rank=0, dp_size=1)(0)
    assert {batch.num_frames for batch in batches} == {max(batch.num_frames for batch in alone)}
    assert len({batch.num_frames for batch in alone}) > 1
    assert as_rows(batches) == as_rows(alone)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_validation_sees_every_sample_once_and_whole(home: Path, dp_size: int) -> None:
    config = config_of(home, "loss.silence_fraction=0", "loss.speech_fraction=0.01")
    ranks = [valid_batches(config, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for place, name in enumerate(SIZES):
        shares = [[batch for batches in rank[name] for batch in batches] for rank in ranks]
        assert len({len(share) for share in shares}) == 1  # all ranks take part in every microbatch
        seen = sorted(sample for share in shares for sample in samples_of(share))
        assert seen == [(place, number) for number in range(5)]
        weights = torch.cat([batch.weights_BPT[:, 2].flatten() for share in shares for batch in share])
        frames = sum(int((batch.codes_BST[:, -1] >= 0).sum()) for share in shares for batch in share)
        assert int((weights > 0).sum()) == frames - 5  # one frame a sample falls off, codebook 1 being delayed


def test_validation_samples_are_spread_over_the_set_alike_on_every_layout(home: Path) -> None:
    for dp_size, more in ((1, ()), (2, ()), (2, ("data.pack=true", "training.micro_batch_size=1"))):
        config = config_of(home, "data.valid_samples=3", "data.num_frames=40", *more)
        ranks = [valid_batches(config, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
        rows = torch.cat(
            [batch.codes_BST[:, -1].flatten() for rank in ranks for some in rank["asr-en"] for batch in some]
        )
        assert set(rows.tolist()) == {0, 1, 3, ZERO_TOKEN}  # of 0 to 4


def test_validation_is_read_as_it_is_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some microbatches at a time, and again for the next validation."""
    read, sample = [], ShardSamples.sample
    monkeypatch.setattr(
        ShardSamples, "sample", lambda self, index, **how: read.append(index) or sample(self, index, **how)
    )
    monkeypatch.setattr(mixture, "AT_ONCE", 1)
    batches = valid_batches(config_of(home), dp_rank=0, dp_size=1)["asr-en"]
    assert not read
    counts = [(len(portion), len(read)) for portion in batches]
    assert counts == [(1, 2), (1, 4), (1, 5)] and sorted(read) == list(range(5))
    assert sum(len(portion) for portion in batches) == 3 and len(read) == 10


@pytest.mark.parametrize("more", [(), ("data.pack=true", "training.micro_batch_size=1")])
def test_a_sample_that_is_longer_than_those_trained_on_is_refused(home: Path, more: tuple[str, ...]) -> None:
    config = config_of(home, "data.num_frames=12", *more)
    with pytest.raises(ValueError, match=r"data.num_frames = 12: there is a sample of \d+ frames; raise it"):
        TrainBatches(config, dp_rank=0, dp_size=1)(0)
    with pytest.raises(ValueError, match=r"data.num_frames = 12: there is a sample"):
        valid_batches(config, dp_rank=0, dp_size=1)


def test_as_many_files_may_be_open_as_windows_of_shards_take(tmp_path: Path) -> None:
    config = config_of(tmp_path, "data.mixture={a = 1, b = 1}", "data.shuffle_shards=10")
    codes = np.zeros((config.streams.num_streams, 8), dtype=int)
    for name in ("a", "b"):
        for number in range(20):
            prefix = tmp_path / "shards" / "train" / name / f"{number:06d}"
            write_shard(prefix, [codes], header=header_of(config, "asr-en"))
        write_catalogue(prefix.parent)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, before[1]))
    try:
        batches = TrainBatches(config, dp_rank=0, dp_size=1)
        for step in range(5):
            assert len(batches(step)) == 8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_totals_count_weights_and_frames_but_no_padding(home: Path) -> None:
    batch = TrainBatches(config_of(home, "data.length_multiple=32"), dp_rank=0, dp_size=1)(0)[0]
    text, audio, frames, all_frames = batch.totals().tolist()
    assert text == pytest.approx(float(batch.weights_BPT[:, 0].sum()))
    assert audio == pytest.approx(float(batch.weights_BPT[:, 1:].sum())) and batch.totals().dtype is torch.float64
    assert frames == int((batch.codes_BST[:, -1] >= 0).sum()) < all_frames == batch.codes_BST[:, 0].numel()


def test_mixture_without_shards_names_the_key(home: Path) -> None:
    with pytest.raises(ValueError, match="data.mixture: no shards are named"):
        TrainBatches(config_of(home, "data.mixture={}"), dp_rank=0, dp_size=1)


def test_shard_of_other_streams_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match=r"asr-en: their cardinalities"):
        TrainBatches(config_of(home, "streams.cardinality=64"), dp_rank=0, dp_size=1)


LOSS = ["loss.text=2", "loss.text_padding=0.25", "loss.semantic=50", "loss.acoustic=3"]


def weigh(config: Config, task: str, codes_ST: np.ndarray, *, seed: int = 0) -> np.ndarray:
    return loss_weights(
        codes_ST,
        header=header_of(config, task),
        streams=config.streams,
        loss=config.loss,
        generator=np.random.default_rng(seed),
    )


def example(*, num_frames: int = 8) -> np.ndarray:
    """Prompt, PAD, EPAD, a word of two pieces, PAD; speech in frames 4 and 5, silence elsewhere."""
    codes_ST = np.full((9, num_frames), 20)
    codes_ST[0] = 3
    codes_ST[0, :6] = [4, 8, 3, 0, 11, 12]
    codes_ST[1:5] = np.array(SILENCE)[:, None]
    codes_ST[1:5, 4:6] = 1
    return codes_ST


def test_weights_by_kind_of_token(tmp_path: Path) -> None:
    config = make_config(tmp_path, *LOSS)
    weights_PT = weigh(config, "asr-en", example())
    assert weights_PT.dtype == np.float32 and weights_PT.shape == (5, 8)
    assert weights_PT[0].tolist() == [0, 0, 0.25, 0.25, 2, 2, 0.25, 0.25]  # the prompt is given
    assert weights_PT[1].tolist() == [50] * 8
    assert weights_PT[2].tolist() == [3] * 7 + [0]  # delayed by one: its last token falls off the end


def test_words_that_tts_is_told_are_not_learned(tmp_path: Path) -> None:
    config = make_config(tmp_path, *LOSS)
    told, said = weigh(config, "tts-en", example()), weigh(config, "s2st-ja-en", example())
    assert told[0].tolist() == [0, 0, 0.25, 0.25, 0, 0, 0.25, 0.25]
    assert said[0].tolist() == [0, 0, 0.25, 0.25, 2, 2, 0.25, 0.25]
    assert np.array_equal(told[1:], said[1:])


def test_zero_tokens_weigh_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path, *LOSS)
    codes_ST = example()
    codes_ST[0, 4], codes_ST[3, 2], codes_ST[6, 3] = -1, -1, -1
    weights_PT = weigh(config, "asr-en", codes_ST)
    expected = weigh(config, "asr-en", example())
    expected[0, 4] = expected[3, 2] = 0  # and what is only given changes nothing
    assert np.array_equal(weights_PT, expected)


def test_delays_cut_each_stream_by_its_own(tmp_path: Path) -> None:
    config = make_config(tmp_path, "streams.delays=[1, 0, 2, 9, 0, 3, 3, 3, 3]")
    weights_PT = weigh(config, "asr-en", example())
    assert [int((row > 0).sum()) for row in weights_PT] == [8 - 2 - 1, 8, 6, 0, 8]


@pytest.mark.parametrize("num_frames", [6, 7, 10])
def test_a_delay_may_be_longer_than_a_sample(tmp_path: Path, num_frames: int) -> None:
    config = make_config(tmp_path, "streams.delays=[0, 0, 9, 9, 9, 0, 9, 9, 9]")
    weights = weigh(config, "asr-en", example(num_frames=num_frames))
    frames = depth_frames(weights, streams=config.streams)
    assert frames.tolist() == (weights[1] > 0).tolist()[:9] + [True] * (num_frames - 9)


def test_fractions_leave_out_whole_frames(tmp_path: Path) -> None:
    zero = [0] * 9
    config = make_config(tmp_path, "loss.silence_fraction=0.25", f"streams.delays={zero}")
    codes_ST = np.concatenate([example(num_frames=8)] * 500, axis=1)
    weights_PT = weigh(config, "asr-en", codes_ST)
    trained = weights_PT[1:] > 0
    assert (trained == trained[0]).all()  # a frame enters the depth transformer with all its codebooks or not at all
    speaks = (codes_ST[1] == 1)  # fmt: skip
    assert trained[0, speaks].all()
    assert trained[0, ~speaks].mean() == pytest.approx(0.25, abs=0.03)
    whole = make_config(tmp_path, f"streams.delays={zero}")
    assert np.array_equal(weights_PT[0], weigh(whole, "asr-en", codes_ST)[0])  # text is left alone
    none = make_config(tmp_path, "loss.silence_fraction=0", "loss.speech_fraction=0.5", f"streams.delays={zero}")
    rest = weigh(none, "asr-en", codes_ST)[1] > 0
    assert not rest[~speaks].any() and rest[speaks].mean() == pytest.approx(0.5, abs=0.05)
    assert not np.array_equal(weigh(none, "asr-en", codes_ST, seed=1)[1] > 0, rest)


def test_one_codebook_that_differs_is_no_silence(tmp_path: Path) -> None:
    config = make_config(tmp_path, "loss.silence_fraction=0")
    codes_ST = example()
    codes_ST[4, 2] = 30
    assert (weigh(config, "tts-en", codes_ST)[1] > 0).tolist() == [False, False, True, False, True, True, False, False]
