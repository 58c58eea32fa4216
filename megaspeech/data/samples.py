"""The samples of one set as they are trained on: their loss weights, and what chance adds to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.utils import Split

from megaspeech.config import Config
from megaspeech.config.schema import StreamsSection
from megaspeech.data.shard_set import ShardSet
from megaspeech.data.shards import DamagedSampleError
from megaspeech.data.tasks import ZERO_TOKEN
from megaspeech.data.weights import loss_weights


class ShardSamples(torch.utils.data.Dataset):
    """A set of shards without end: epoch after epoch, each in an order of its own. What BlendedDataset mixes.

    Args:
        directory: of the split.
        name: of the set in it.
        config: the run.
    """

    index_split = Split.train

    def __init__(self, directory: str | Path, *, name: str, config: Config) -> None:
        prefix = Path(directory) / name
        self.shards = ShardSet(prefix, seed=config.run.seed, shuffle_shards=config.data.shuffle_shards)
        self.shards.header.check_run(config, prefix=prefix)
        self.name, self.config = name, config
        self.unique_identifiers = {"shards": str(prefix), "seed": config.run.seed}

    def __len__(self) -> int:
        return np.iinfo(np.int64).max

    def sample_id(self, index: int) -> str:
        """Of sample `index`, as "set/shard:index"."""
        return f"{self.name}/{self.shards.name(index)}"

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.draw(number, index=int(self.shards.places(np.array([number]))[0]))

    def draw(self, number: int, *, index: int) -> dict[str, Any]:
        """The `number`-th draw, which is sample `index`, with what chance adds to it."""
        # Drawn from the sample's own number, not from a running generator: the same after a resume, on any rank.
        generator = np.random.default_rng([self.config.run.seed, int(number)])
        item = self.sample(index, generator=generator)
        if generator.random() < self.config.data.codebook_dropout:
            drop_codebooks(item["codes"], streams=self.config.streams, generator=generator)
        return item

    def sample(self, index: int, *, generator: np.random.Generator) -> dict[str, Any]:
        """Sample `index` of the set, its loss weights, and its name and reason if it is rejected.

        One that is damaged is as long as it was, so that every rank of a pipeline gives its batch the same shape, and
        holds zero tokens only, which weigh nothing.
        """
        rejected = ()
        try:
            codes_ST = self.shards[index]
        except DamagedSampleError as error:
            num_frames = int(self.shards.lengths(np.array([index]))[0])
            codes_ST = np.full((self.config.streams.num_streams, num_frames), ZERO_TOKEN)
            rejected = ((self.sample_id(index), str(error)),)
        weights_PT = loss_weights(
            codes_ST,
            header=self.shards.header,
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
