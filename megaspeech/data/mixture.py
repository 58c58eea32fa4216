"""From shards to the batches of a step: by weight, deterministic by step, the same on any number of ranks.

Which samples a step has, and which rank they go to, follows from the shards' indexes alone, so that a rank reads only
its own samples, and a sample that cannot be read changes the shape of nothing.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megaspeech.config import Config
from megaspeech.data.batch import Batch, collate_step, pack_rows
from megaspeech.data.blending import Blend, find_sets, mixture_of, shares_of
from megaspeech.data.samples import ShardSamples
from megaspeech.data.storage import shards_directory

AT_ONCE = 64
"""Microbatches of a validation that a rank reads and runs together; rounded up to whole turns of a pipeline."""


class _Draw(NamedTuple):
    """The `number`-th draw from a set of shards, which is its sample `index`."""

    samples: ShardSamples
    number: int
    index: int

    @property
    def name(self) -> str:
        return self.samples.sample_id(self.index)


class TrainBatches:
    """The microbatches of any step for one data parallel rank.

    A step is `global_batch_size` samples. They stand side by side, `micro_batch_size` at a time; or, with `data.pack`,
    one after the other in rows of at most `num_frames`, as few as the layout can share out. So the samples of a step
    are the same on every layout, whatever rows they come to stand in.
    """

    def __init__(self, config: Config, *, dp_rank: int, dp_size: int) -> None:
        training = config.training
        directory = shards_directory(config.data, "train", names=mixture_of(config))
        self.config, self.dp_rank, self.dp_size = config, dp_rank, dp_size
        self.shares = shares_of(config, directory)
        _allow_open_shards(2 * config.data.shuffle_shards * len(self.shares))
        self.samples = {name: ShardSamples(directory, name=name, config=config) for name in self.shares}
        self.num_draws = training.train_steps * training.global_batch_size
        self._blend = Blend(self.samples, shares=self.shares, num_draws=self.num_draws)
        self._by_number = list(self.samples.values())

    def __call__(self, step: int) -> list[Batch]:
        """This rank's microbatches of step `step`, counted from 0."""
        groups = [[draw.samples.draw(draw.number, index=draw.index) for draw in group] for group in self._own(step)]
        return collate_step(groups, config=self.config)

    def sample_ids(self, step: int) -> list[list[str]]:
        """The samples of this rank's microbatches of step `step`, as "set/shard:index"; in the order of the batches."""
        return [[draw.name for draw in group] for group in self._own(step)]

    def all_sample_ids(self, step: int) -> list[str]:
        """The samples of the whole global batch of step `step`, as "set/shard:index"; the same on every rank."""
        return [draw.name for group in self._groups(step) for draw in group]

    def epochs(self) -> dict[str, float]:
        """How often the run draws each sample of a set, by the set's name."""
        drawn = self._blend.draws(self.num_draws)
        return {
            name: count / len(samples.shards)
            for (name, samples), count in zip(self.samples.items(), drawn, strict=True)
        }

    def _own(self, step: int) -> list[list[_Draw]]:
        """Dealt out to and fro, so that the ranks have like amounts."""
        groups = enumerate(self._groups(step))
        return [group for place, group in groups if _dealt_to(place, self.dp_size) == self.dp_rank]

    def _groups(self, step: int) -> list[list[_Draw]]:
        """The global batch in microbatches, each of samples alike, with little padding."""
        size = self.config.training.global_batch_size
        datasets, numbers = self._blend(np.arange(step * size, (step + 1) * size))
        indexes, lengths = np.empty_like(numbers), np.empty_like(numbers)
        for dataset in np.unique(datasets).tolist():
            mine, shards = datasets == dataset, self._by_number[dataset].shards
            indexes[mine] = shards.places(numbers[mine])
            lengths[mine] = shards.lengths(indexes[mine])
        draws = list(zip(datasets.tolist(), numbers.tolist(), indexes.tolist(), strict=True))
        groups = _group(lengths.tolist(), config=self.config, dp_size=self.dp_size)
        return [[_Draw(self._by_number[draws[place][0]], *draws[place][1:]) for place in group] for group in groups]


def _allow_open_shards(count: int) -> None:
    """Shells allow a process 1,024 files unless it asks for more, which it may up to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + 2 * count  # its samples, and its index, whose memory map holds a file too
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _group(lengths: Sequence[int], *, config: Config, dp_size: int) -> list[list[int]]:
    """Numbers of the samples of each microbatch of all ranks, from samples of `lengths` frames."""
    if max(lengths) > config.data.num_frames:
        raise ValueError(
            f"data.num_frames = {config.data.num_frames}: there is a sample of {max(lengths)} frames; raise it to what "
            f"the shards were prepared with, or prepare them again"
        )
    if config.data.pack:
        return pack_rows(lengths, longest=config.data.num_frames, multiple=dp_size * _rounds(config))
    size = config.training.micro_batch_size
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _rounds(config: Config) -> int:
    """Microbatches of a rank come in multiples of this: an interleaved pipeline takes them in turns of one a stage."""
    return config.parallel.pipeline_model_parallel_size if config.parallel.num_chunks > 1 else 1


def _dealt_to(place: int, ranks: int) -> int:
    """0 1 2 2 1 0 0 1 2 ...: dealing to and fro."""
    turn, rank = divmod(place, ranks)
    return ranks - 1 - rank if turn % 2 else rank


@dataclass(frozen=True)
class ValidBatches:
    """One data parallel rank's microbatches of a validation set, read anew whenever they are run.

    Iterating gives some `AT_ONCE` of them at a time, on every rank as many, the last ones perhaps empty: what is in
    memory does not grow with the set.

    Attributes:
        samples: the set.
        groups: the samples of each microbatch.
        at_once: microbatches that are read and run together.
    """

    samples: ShardSamples
    groups: Sequence[Sequence[int]]
    at_once: int

    def __iter__(self) -> Iterator[list[Batch]]:
        for first in range(0, len(self.groups), self.at_once):
            groups = self.groups[first : first + self.at_once]
            items = [[self._sample(index) for index in group] for group in groups]
            yield collate_step(items, config=self.samples.config)

    def _sample(self, index: int) -> dict[str, Any]:
        return self.samples.sample(index, generator=np.random.default_rng(0))


def valid_batches(config: Config, *, dp_rank: int, dp_size: int) -> dict[str, ValidBatches]:
    """Validation samples by the name of their set: `data.valid_samples` of each; every frame of them is counted.

    Raises:
        ValueError: no name of the mixture has any.
    """
    whole = config.loss.model_copy(update={"silence_fraction": 1.0, "speech_fraction": 1.0})
    config = config.model_copy(update={"loss": whole})
    directory, batches = shards_directory(config.data, "valid", names=mixture_of(config)), {}
    names, rounds = _valid_sets(config, directory), _rounds(config)
    _allow_open_shards(2 * config.data.shuffle_shards * len(names))
    for name in names:
        samples = ShardSamples(directory, name=name, config=config)
        chosen = _evenly_spread(len(samples.shards), most=config.data.valid_samples)
        groups = _group(samples.shards.lengths(chosen).tolist(), config=config, dp_size=dp_size)
        groups = [chosen[group].tolist() for group in groups]
        # Every rank runs the same number of microbatches, the last ones perhaps empty.
        groups += [[]] * (-len(groups) % (dp_size * rounds))
        batches[name] = ValidBatches(samples, groups[dp_rank::dp_size], at_once=AT_ONCE + -AT_ONCE % rounds)
    return batches


def _evenly_spread(size: int, *, most: int) -> np.ndarray:
    """`most` of `size` places, or all of them where there are not so many or `most` is 0 `[D]` int64."""
    count = min(size, most or size)
    return np.arange(count) * size // count


def _valid_sets(config: Config, directory: Path) -> list[str]:
    """Names of the sets that are validated on: those of the mixture that have validation samples, one at least."""
    given = [name for name in mixture_of(config) if (directory / name).is_dir()]
    if not given:
        raise ValueError(
            f"data.directory: {directory} has no shards of {', '.join(mixture_of(config))} to validate on; give a "
            f"source a `valid` manifest, or `held_out`, a share of its training lines, and run tools/prepare_data.py"
        )
    return [name for one in given for name in find_sets(directory, one)]
