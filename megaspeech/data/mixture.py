"""From shards to the batches of a step: by weight, deterministic by step, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor

from megaspeech.config import Config
from megaspeech.config.schema import StreamsSection
from megaspeech.data.shards import Shard
from megaspeech.data.tasks import ZERO_TOKEN
from megaspeech.data.weights import loss_weights


@dataclass(frozen=True)
class Batch:
    """One microbatch: codes `[B, S, T]` int64 and loss weights `[B, P, T]` float32."""

    codes_BST: Tensor
    weights_BPT: Tensor

    def to(self, device: torch.device | str | int) -> Batch:
        """The batch on another device."""
        return Batch(self.codes_BST.to(device), self.weights_BPT.to(device))

    @property
    def num_frames(self) -> int:
        """T."""
        return self.codes_BST.shape[-1]

    def totals(self) -> Tensor:
        """Sums of the text and of the audio weights, and the frames that are not padding `[3]` float64."""
        text, audio = self.weights_BPT[:, 0], self.weights_BPT[:, 1:]
        return torch.stack([text.double().sum(), audio.double().sum(), (self.codes_BST[:, 0] >= 0).double().sum()])


class ShardSamples(torch.utils.data.Dataset):
    """A shard without end: epoch after epoch, each in an order of its own. What BlendedDataset mixes."""

    index_split = Split.train

    def __init__(self, prefix: str | Path, *, config: Config) -> None:
        self.shard = Shard(prefix)
        self.shard.header.check_run(config, prefix=prefix)
        self.config = config
        self.unique_identifiers = {"shard": str(prefix), "seed": config.run.seed}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return np.iinfo(np.int64).max

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(int(index), len(self.shard))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.config.run.seed, epoch]).permutation(len(self.shard)))
        # Drawn from the sample's own number, not from a running generator: the same after a resume, on any rank.
        generator = np.random.default_rng([self.config.run.seed, int(index)])
        item = self.sample(int(self._order[1][place]), generator=generator)
        item["id"] = f"{Path(self.unique_identifiers['shard']).name}:{self._order[1][place]}"
        if generator.random() < self.config.data.codebook_dropout:
            drop_codebooks(item["codes"], streams=self.config.streams, generator=generator)
        return item

    def sample(self, index: int, *, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Sample `index` of the shard and its loss weights."""
        codes_ST = self.shard[index]
        weights_PT = loss_weights(
            codes_ST,
            header=self.shard.header,
            streams=self.config.streams,
            loss=self.config.loss,
            generator=generator,
        )
        return {"codes": codes_ST, "weights": weights_PT}


def drop_codebooks(codes_ST: np.ndarray, *, streams: StreamsSection, generator: np.random.Generator) -> None:
    """Turn the last of the given codebooks into zero tokens, in place; a quarter of them at least is kept."""
    least, count = -(-streams.num_given_codebooks // 4), streams.num_given_codebooks
    kept = int(generator.integers(least, count + 1))
    codes_ST[1 + streams.num_codebooks + kept :] = ZERO_TOKEN


class TrainBatches:
    """The microbatches of any step for one data parallel rank."""

    def __init__(self, config: Config, *, dp_rank: int, dp_size: int) -> None:
        if not config.data.mixture:
            raise ValueError(
                "data.mixture: no shards are named; give each a weight, for example mixture = {asr-en = 1.0}"
            )
        directory, training = Path(config.data.directory) / "train", config.training
        self.config, self.dp_rank, self.dp_size = config, dp_rank, dp_size
        self.samples = BlendedDataset(
            [ShardSamples(directory / name, config=config) for name in config.data.mixture],
            list(map(float, config.data.mixture.values())),
            training.train_steps * training.global_batch_size,
            SimpleNamespace(path_to_cache=None, defer_npy_index_mmap=False, fast_cache_load=False),
        )

    def __call__(self, step: int) -> list[Batch]:
        """This rank's microbatches of step `step`, counted from 0, from short samples to long ones.

        The global batch is sorted by length, so that a microbatch holds samples alike and little padding, and dealt out
        to and fro, so that the ranks have like amounts.
        """
        return collate_step(self._mine(step), config=self.config)

    def sample_ids(self, step: int) -> list[list[str]]:
        """Names, shard:index, of the samples of each of this rank's microbatches of step `step`."""
        return [[item["id"] for item in microbatch] for microbatch in self._mine(step)]

    def all_sample_ids(self, step: int) -> list[str]:
        """The same of all ranks' samples."""
        return [item["id"] for item in self._items(step)]

    def _items(self, step: int) -> list[dict]:
        first = step * self.config.training.global_batch_size
        items = [self.samples[index] for index in range(first, first + self.config.training.global_batch_size)]
        return sorted(items, key=lambda item: item["codes"].shape[1])

    def _mine(self, step: int) -> list[list[dict]]:
        items, size = self._items(step), self.config.training.micro_batch_size
        return [
            items[start : start + size]
            for place, start in enumerate(range(0, len(items), size))
            if _dealt_to(place, self.dp_size) == self.dp_rank
        ]


def _dealt_to(place: int, ranks: int) -> int:
    """0 1 2 2 1 0 0 1 2 ...: dealing to and fro."""
    turn, rank = divmod(place, ranks)
    return ranks - 1 - rank if turn % 2 else rank


def valid_batches(config: Config, *, dp_rank: int, dp_size: int) -> Mapping[str, list[Batch]]:
    """All validation samples by shard name, as this rank's microbatches; every frame is counted."""
    whole = config.loss.model_copy(update={"silence_fraction": 1.0, "speech_fraction": 1.0})
    config = config.model_copy(update={"loss": whole})
    size, batches = config.training.micro_batch_size, {}
    for name in config.data.mixture:
        samples = ShardSamples(Path(config.data.directory) / "valid" / name, config=config)
        count = len(samples.shard)
        # Every rank runs the same number of microbatches, the last ones perhaps empty.
        rounds = -(-count // (size * dp_size))
        starts = range(dp_rank * size, rounds * dp_size * size, dp_size * size)
        groups = [
            [
                samples.sample(index, generator=np.random.default_rng(0))
                for index in range(start, min(start + size, count))
            ]
            for start in starts
        ]
        batches[name] = collate_step(groups, config=config)
    return batches


def collate_step(groups: list[list[dict[str, np.ndarray]]], *, config: Config) -> list[Batch]:
    """A data parallel rank's microbatches of one step. Pipeline stages exchange tensors of one shape: with a pipeline
    all of them get the length of the longest."""
    lengths = [max((item["codes"].shape[1] for item in group), default=1) for group in groups]
    if config.parallel.pipeline_model_parallel_size > 1:
        lengths = [max(lengths)] * len(groups)
    return [collate(group, length=length, config=config) for group, length in zip(groups, lengths, strict=True)]


def collate(items: list[dict[str, np.ndarray]], *, length: int, config: Config) -> Batch:
    """Samples side by side, filled up with zero tokens to `micro_batch_size` samples and the multiple of
    `data.length_multiple` from `length` on."""
    size, streams = config.training.micro_batch_size, config.streams
    num_frames = length + -length % config.data.length_multiple
    codes = np.full((size, streams.num_streams, num_frames), ZERO_TOKEN, dtype=np.int64)
    weights = np.zeros((size, 1 + streams.num_codebooks, num_frames), dtype=np.float32)
    for row, item in enumerate(items):
        codes[row, :, : item["codes"].shape[1]] = item["codes"]
        weights[row, :, : item["codes"].shape[1]] = item["weights"]
    return Batch(torch.from_numpy(codes), torch.from_numpy(weights))
