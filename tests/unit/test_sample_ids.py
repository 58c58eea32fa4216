"""No sample twice, none skipped: over ranks, steps, epochs, and changes of the number of ranks between steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_rank import make_config

from megaspeech.config import Config
from megaspeech.data.batch import Batch, frame_multiple
from megaspeech.data.mixture import TrainBatches, valid_batches
from megaspeech.data.shard_set import write_shard_set
from megaspeech.data.synthetic import synthetic_header

SIZES = {"asr-en": 23, "tts-en": 10}  # samples
WEIGHTS = {"asr-en": 1.0, "tts-en": 3.0}
STEPS = 60
GLOBAL = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose samples carry their number in the last stream and their shard's in the one before."""
    directory = tmp_path_factory.mktemp("ids")
    config = make_config(directory)
    generator = np.random.default_rng(0)
    for split in ("train", "valid"):
        for place, (name, count) in enumerate(SIZES.items()):
            samples = []
            for number in range(count):
                codes = generator.integers(0, 32, (config.streams.num_streams, int(generator.integers(6, 21))))
                codes[-1], codes[-2] = number, place
                samples.append(codes)
            header = synthetic_header(name, streams=config.streams)
            write_shard_set(directory / split / name, samples, header=header)
    return directory


def config_of(home: Path, *overrides: str) -> Config:
    mixture = ", ".join(f"{name} = {weight}" for name, weight in WEIGHTS.items())
    return make_config(
        home,
        f"data.directory={home}",
        f"data.mixture={{{mixture}}}",
        "training.micro_batch_size=2",
        f"training.global_batch_size={GLOBAL}",
        f"training.train_steps={STEPS}",
        "optimizer.lr_warmup_steps=5",
        *overrides,
    )


def ids_of(batch: Batch) -> list[str]:
    """What the rows of a batch really hold."""
    names = list(SIZES)
    return [f"{names[int(row[-2, 0])]}/000000:{int(row[-1, 0])}" for row in batch.codes_BST]


def sized(config: Config, dp_size: int) -> list[TrainBatches]:
    return [TrainBatches(config, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]


Sizes = st.sampled_from([1, 2, 3, 4, 6, 12])


@settings(max_examples=25, deadline=None)
@given(before=Sizes, after=Sizes, first=st.integers(0, STEPS - 6), seed=st.integers(0, 99))
def test_union_over_ranks_is_the_global_batch_across_a_change_of_ranks(
    home: Path, before: int, after: int, first: int, seed: int
) -> None:
    config = config_of(home, f"run.seed={seed}")
    (whole,) = sized(config, 1)
    for dp_size, steps in ((before, range(first, first + 3)), (after, range(first + 3, first + 6))):
        ranks = sized(config, dp_size)
        for step in steps:
            shares = [rank.sample_ids(step) for rank in ranks]
            assert {len(share) for share in shares} == {GLOBAL // 2 // dp_size}
            union = Counter(name for share in shares for group in share for name in group)
            assert union == Counter(whole.all_sample_ids(step)) and union.total() == GLOBAL
            assert all(rank.all_sample_ids(step) == whole.all_sample_ids(step) for rank in ranks)
            for rank, share in zip(ranks, shares, strict=True):
                assert [ids_of(batch) for batch in rank(step)] == share


def draws(config: Config) -> Iterator[str]:
    """All samples of a run in the order of its steps, on ranks whose number changes at every step."""
    runs = {dp_size: sized(config, dp_size) for dp_size in (1, 2, 4)}
    for step in range(STEPS):
        for rank in runs[(1, 2, 4)[step % 3]]:
            for group in rank.sample_ids(step):
                yield from group


def test_epochs_are_whole_and_the_mixture_is_kept(home: Path) -> None:
    """Of every shard, the sample drawn least often is at most one epoch behind the one drawn most often."""
    drawn = Counter(draws(config_of(home)))
    assert drawn.total() == STEPS * GLOBAL
    for name, count in SIZES.items():
        times = [drawn[f"{name}/000000:{index}"] for index in range(count)]
        assert min(times) > 10 and max(times) - min(times) <= 1
        share = WEIGHTS[name] / sum(WEIGHTS.values())
        assert abs(sum(times) - share * drawn.total()) <= 1


FP8 = ["model.transformer_impl=transformer_engine"]


@pytest.mark.parametrize(
    "overrides, multiple",
    [
        (["data.length_multiple=1"], 1),
        (["data.length_multiple=16"], 16),
        (["data.length_multiple=6", "tensor=4"], 6),  # whole frames on every rank
        (["data.length_multiple=6", "tensor=4", "parallel.sequence_parallel=true"], 12),
        (["data.length_multiple=1", "context=2"], 4),
        (["data.length_multiple=16", "context=2"], 16),
        (["data.length_multiple=3", "context=2", "tensor=2", "parallel.sequence_parallel=true"], 24),
        (["data.length_multiple=1", "precision.recipe=bf16"], 1),
        (["data.length_multiple=1", *FP8, "precision.recipe=fp8-delayed"], 16),
        (["data.length_multiple=24", *FP8, "precision.recipe=mxfp8"], 96),
        (["data.length_multiple=1", *FP8, "precision.recipe=fp8-tensorwise", "context=2"], 32),
        (["data.length_multiple=1", *FP8, "precision.recipe=fp8-tensorwise", "tensor=2"], 16),
        (
            ["data.length_multiple=1", *FP8, "precision.recipe=fp8-blockwise"]
            + ["context=2", "tensor=2", "parallel.sequence_parallel=true"],
            512,
        ),
    ],
)
def test_lengths_are_what_the_layout_splits(home: Path, overrides: list[str], multiple: int) -> None:
    names = {"tensor": "parallel.tensor_model_parallel_size", "context": "parallel.context_parallel_size"}
    spelled = ["=".join([names.get(key, key), value]) for key, _, value in (line.partition("=") for line in overrides)]
    config = config_of(home, "temporal.num_query_groups=4", *spelled)
    assert frame_multiple(config) == multiple
    for batch in (
        *TrainBatches(config, dp_rank=0, dp_size=1)(0),
        *next(iter(valid_batches(config, dp_rank=0, dp_size=1)["asr-en"])),
    ):
        longest = max(int((row[-1] >= 0).sum()) for row in batch.codes_BST)
        assert batch.num_frames == -(-longest // multiple) * multiple


@pytest.mark.parametrize("dp_size, stages, rounds", [(1, 2, 12), (1, 4, 12), (2, 4, 8), (4, 2, 4)])
def test_interleaved_pipelines_validate_in_whole_turns(home: Path, dp_size: int, stages: int, rounds: int) -> None:
    """Of 23 samples in twos; the microbatches that fill up the last turn are empty."""
    overrides = [
        "temporal.num_layers=8",
        f"parallel.pipeline_model_parallel_size={stages}",
        "parallel.virtual_pipeline_model_parallel_size=2",
    ]
    ranks = [valid_batches(config_of(home, *overrides), dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    shares = [[batch for batches in rank["asr-en"] for batch in batches] for rank in ranks]
    assert [len(share) for share in shares] == [rounds] * dp_size
    rows = torch.cat([batch.codes_BST[:, -1, 0] for share in shares for batch in share]).tolist()
    assert sorted(row for row in rows if row >= 0) == list(range(23))
