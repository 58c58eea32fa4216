"""From shards to the batches of a step: by weight, deterministic by step, the same on any number of ranks.

Which samples a step has, and which rank they go to, follows from the shards' indexes alone, so that a rank reads only
its own samples, and a sample that cannot be read changes the shape of nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor

from megaspeech.config import Config
from megaspeech.config.schema import StreamsSection
from megaspeech.data.shards import DamagedSampleError, Shard
from megaspeech.data.tasks import ZERO_TOKEN
from megaspeech.data.weights import loss_weights


@dataclass(frozen=True)
class Batch:
    """One microbatch: codes `[B, S, T]` int64 and loss weights `[B, P, T]` float32.

    `rejected` names the samples that could not be read, with the reason: zero tokens without weight stand for them.
    `depth_frames_BT` bool tells which frames have a codebook that weighs, delays applied: those that enter the depth
    transformer. It stays on the host, so that nobody has to ask the device how many they are.
    """

    codes_BST: Tensor
    weights_BPT: Tensor
    rejected: tuple[tuple[str, str], ...] = ()
    depth_frames_BT: Tensor | None = None

    def to(self, device: torch.device | str | int) -> Batch:
        """The batch on the device that computes; from pinned memory this does not wait for what the device does."""
        return replace(
            self,
            codes_BST=self.codes_BST.to(device, non_blocking=True),
            weights_BPT=self.weights_BPT.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU copies from by itself."""
        return replace(self, codes_BST=self.codes_BST.pin_memory(), weights_BPT=self.weights_BPT.pin_memory())

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

    def place(self, number: int) -> int:
        """Which sample of the shard is the `number`-th that is drawn, counted over all epochs."""
        epoch, place = divmod(int(number), len(self.shard))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.config.run.seed, epoch]).permutation(len(self.shard)))
        return int(self._order[1][place])

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.draw(number, index=self.place(number))

    def draw(self, number: int, *, index: int) -> dict[str, Any]:
        """The `number`-th draw, which is sample `index`, with what chance adds to it."""
        # Drawn from the sample's own number, not from a running generator: the same after a resume, on any rank.
        generator = np.random.default_rng([self.config.run.seed, int(number)])
        item = self.sample(index, generator=generator)
        if generator.random() < self.config.data.codebook_dropout:
            drop_codebooks(item["codes"], streams=self.config.streams, generator=generator)
        return item

    def sample(self, index: int, *, generator: np.random.Generator) -> dict[str, Any]:
        """Sample `index` of the shard, its loss weights, and its name and reason if it is rejected.

        One that is damaged is as long as it was, so that every rank of a pipeline gives its batch the same shape, and
        holds zero tokens only, which weigh nothing.
        """
        rejected = ()
        try:
            codes_ST = self.shard[index]
        except DamagedSampleError as error:
            codes_ST = np.full((self.config.streams.num_streams, self.shard.length(index)), ZERO_TOKEN)
            rejected = ((f"{self.shard.name}:{index}", str(error)),)
        weights_PT = loss_weights(
            codes_ST,
            header=self.shard.header,
            streams=self.config.streams,
            loss=self.config.loss,
            generator=generator,
        )
        return {"codes": codes_ST, "weights": weights_PT, "rejected": rejected}


def drop_codebooks(codes_ST: np.ndarray, *, streams: StreamsSection, generator: np.random.Generator) -> None:
    """Turn the last of the given codebooks into zero tokens, in place; a quarter of them at least is kept."""
    least, count = -(-streams.num_given_codebooks // 4), streams.num_given_codebooks
    kept = int(generator.integers(least, count + 1))
    codes_ST[1 + streams.num_codebooks + kept :] = ZERO_TOKEN


class _Draw(NamedTuple):
    """The `number`-th draw from a shard, which is its sample `index`."""

    samples: ShardSamples
    number: int
    index: int


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
        """This rank's microbatches of step `step`, counted from 0, from short samples to long ones."""
        groups = [[draw.samples.draw(draw.number, index=draw.index) for draw in group] for group in self._own(step)]
        return collate_step(groups, config=self.config)

    def sample_ids(self, step: int) -> list[list[str]]:
        """The samples of this rank's microbatches of step `step`, as "shard:index"; row by row as in the batches."""
        return [[_name(draw) for draw in group] for group in self._own(step)]

    def all_sample_ids(self, step: int) -> list[str]:
        """The samples of the whole global batch of step `step`, as "shard:index"; the same on every rank."""
        return [_name(draw) for group in self._groups(step) for draw in group]

    def _own(self, step: int) -> list[list[_Draw]]:
        """Dealt out to and fro, so that the ranks have like amounts."""
        groups = enumerate(self._groups(step))
        return [group for place, group in groups if _dealt_to(place, self.dp_size) == self.dp_rank]

    def _groups(self, step: int) -> list[list[_Draw]]:
        """The global batch in microbatches, sorted by length, so that one holds samples alike and little padding."""
        training = self.config.training
        size, first = training.micro_batch_size, step * training.global_batch_size
        draws = [self._draw(place) for place in range(first, first + training.global_batch_size)]
        draws.sort(key=lambda draw: draw.samples.shard.length(draw.index))
        return [draws[start : start + size] for start in range(0, len(draws), size)]

    def _draw(self, place: int) -> _Draw:
        samples = self.samples.datasets[self.samples.dataset_index[place]]
        number = int(self.samples.dataset_sample_index[place])
        return _Draw(samples, number, samples.place(number))


def _name(draw: _Draw) -> str:
    return f"{draw.samples.shard.name}:{draw.index}"


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
        # Every rank runs the same number of microbatches, the last ones perhaps empty. An interleaved pipeline takes
        # them in turns of one a stage.
        rounds = -(-count // (size * dp_size))
        if config.parallel.num_chunks > 1:
            rounds += -rounds % config.parallel.pipeline_model_parallel_size
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


def collate_step(groups: list[list[dict[str, Any]]], *, config: Config) -> list[Batch]:
    """A data parallel rank's microbatches of one step. Pipeline stages exchange tensors of one shape: with a pipeline
    all of them get the length of the longest."""
    lengths = [max((item["codes"].shape[1] for item in group), default=1) for group in groups]
    if config.parallel.pipeline_model_parallel_size > 1:
        lengths = [max(lengths)] * len(groups)
    return [collate(group, length=length, config=config) for group, length in zip(groups, lengths, strict=True)]


def frame_multiple(config: Config) -> int:
    """The least multiple of `data.length_multiple` that the layout can split frames by, and the recipe multiply.

    Context parallelism cuts a sequence into two chunks a rank, an early and a late one (megatron-core's
    `get_batch_on_this_cp_rank`), and sequence parallelism each rank's part into one for every tensor parallel rank.
    FP8 wants whole blocks of frames on every rank.
    """
    parallel, context = config.parallel, config.parallel.context_parallel_size
    tensor = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    chunks = 2 * context if context > 1 else 1
    on_a_rank = context * tensor * config.precision.frame_multiple
    return math.lcm(config.data.length_multiple, chunks * tensor, on_a_rank)


def collate(items: list[dict[str, Any]], *, length: int, config: Config) -> Batch:
    """Samples side by side, filled up with zero tokens to `micro_batch_size` samples and the next multiple of
    `frame_multiple` from `length` on."""
    size, streams = config.training.micro_batch_size, config.streams
    num_frames = length + -length % frame_multiple(config)
    codes = np.full((size, streams.num_streams, num_frames), ZERO_TOKEN, dtype=np.int64)
    weights = np.zeros((size, 1 + streams.num_codebooks, num_frames), dtype=np.float32)
    for row, item in enumerate(items):
        codes[row, :, : item["codes"].shape[1]] = item["codes"]
        weights[row, :, : item["codes"].shape[1]] = item["weights"]
    rejected = tuple(name_and_reason for item in items for name_and_reason in item["rejected"])
    frames = torch.from_numpy(depth_frames(weights, streams=streams))
    return Batch(torch.from_numpy(codes), torch.from_numpy(weights), rejected, frames)


def depth_frames(weights_BPT: np.ndarray, *, streams: StreamsSection) -> np.ndarray:
    """`[B, T]` bool: frames in which some codebook's delayed token weighs."""
    frames_BT = np.zeros(weights_BPT[:, 0].shape, dtype=bool)
    for stream in range(1, 1 + streams.num_codebooks):
        delay = streams.delays[stream]
        frames_BT[:, delay:] |= weights_BPT[:, stream, : weights_BPT.shape[-1] - delay] > 0
    return frames_BT
