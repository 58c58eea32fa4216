"""Which sets of shards a run draws from, in which shares, and which set the n-th draw comes from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset

from megaspeech.config import Config
from megaspeech.data.shard_set import CATALOGUE, Catalogue

# It warns wherever nobody wants its index on disk.
logging.getLogger("megatron.core.datasets.blended_dataset").setLevel(logging.ERROR)

PERIOD = 1 << 20
"""Draws after which the order of the sets repeats (never that of their samples): a run of 10^9 draws needs no index of
them, and a share is exact to a millionth."""


def mixture_of(config: Config) -> dict[str, float]:
    """Weights by name: `data.mixture`, or where it names none those of `[[sources]]`."""
    mixture = config.data.mixture or {source.name: source.weight for source in config.sources}
    if not mixture:
        raise ValueError("data.mixture: no shards are named; give each a weight, for example mixture = {asr-en = 1.0}")
    return dict(mixture)


def find_sets(directory: Path, name: str) -> dict[str, Catalogue]:
    """The set of shards `directory/name`, or all sets one level below it, by name.

    Raises:
        ValueError: there is none.
    """
    if (directory / name / CATALOGUE).is_file():
        below = [directory / name]
    else:
        below = sorted(path.parent for path in (directory / name).glob(f"*/{CATALOGUE}")) or [directory / name]
    return {path.relative_to(directory).as_posix(): Catalogue.read(path) for path in below}


def shares_of(config: Config, directory: Path) -> dict[str, float]:
    """Shares of the draws by set, summing to 1; a name that stands for several sets gives them shares by size.

    With temperature T a share p becomes p^(1/T), and all are scaled to sum to 1 (arXiv 2010.11934, section 3.1).

    Raises:
        ValueError: a set is missing.
    """
    by, shares = config.data.mixture_by, {}
    for name, weight in mixture_of(config).items():
        sets = find_sets(directory, name)
        samples = {key: catalogue.header.num_samples for key, catalogue in sets.items()}
        frames = {key: catalogue.header.num_frames for key, catalogue in sets.items()}
        for key in sets:
            if by == "epochs":
                shares[key] = weight * samples[key]
            elif by == "samples":
                shares[key] = weight * samples[key] / sum(samples.values())
            else:  # a share of the audio: as many more draws as samples are shorter
                shares[key] = weight * frames[key] / sum(frames.values()) * samples[key] / frames[key]
    tempered = np.asarray(list(shares.values())) / sum(shares.values())
    tempered **= 1 / config.data.mixture_temperature
    return dict(zip(shares, (tempered / tempered.sum()).tolist(), strict=True))


class Blend:
    """The draws of a run: the n-th is the how-many-eth of which set. megatron-core's BlendedDataset mixes a period.

    Args:
        datasets: what BlendedDataset takes, by name.
        shares: of the draws, by name.
        num_draws: of the whole run.
    """

    def __init__(self, datasets: Mapping[str, Any], *, shares: Mapping[str, float], num_draws: int) -> None:
        self.size = min(num_draws, PERIOD)
        blended = BlendedDataset(
            list(datasets.values()),
            [shares[name] for name in datasets],
            self.size,
            SimpleNamespace(path_to_cache=None, defer_npy_index_mmap=False, fast_cache_load=False),
        )
        self._dataset, self._number = blended.dataset_index, blended.dataset_sample_index
        self._counts = np.bincount(self._dataset, minlength=len(datasets))

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the sets, numbers of the draws within each) of draws `places`, int64."""
        periods, within = np.divmod(places, self.size)
        datasets = self._dataset[within].astype(np.int64)
        return datasets, periods * self._counts[datasets] + self._number[within]

    def draws(self, num_draws: int) -> Sequence[int]:
        """How many of the first `num_draws` draws each set has, by its number."""
        periods, rest = divmod(num_draws, self.size)
        return (periods * self._counts + np.bincount(self._dataset[:rest], minlength=len(self._counts))).tolist()
