"""A set of shards of any size whose index is real and whose samples are holes: what opening a million hours costs.

`PREFIX.bin` is a sparse file, so that 3 TB of codes take no disk; its samples are zeros, with the checksums of zeros.
Index, checksums, headers and catalogue are as `data.shards` writes them, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megaspeech.config import Config
from megaspeech.data.shard_set import Catalogue, write_catalogue
from megaspeech.data.shards import ShardHeader, finish_shard
from megaspeech.data.synthetic import synthetic_header

MEDIAN_SECONDS, SPREAD = 9.0, 0.7
"""Of a log-normal: utterances of read and spontaneous speech, 11.5 s in the mean."""
SHORTEST, LONGEST = 1.0, 40.0  # seconds

Progress = Callable[[Iterable, int], Iterable]


def draw_lengths(generator: np.random.Generator, *, count: int, frame_rate: float) -> np.ndarray:
    """Frames of `count` utterances `[count]` int64."""
    seconds = generator.lognormal(np.log(MEDIAN_SECONDS), SPREAD, size=count).clip(SHORTEST, LONGEST)
    return np.ceil(seconds * frame_rate).astype(np.int64)


def simulate_shards(
    directory: Path, *, config: Config, hours: float, samples_per_shard: int, progress: Progress
) -> Catalogue:
    """Write a set of at least `hours` of utterances; one that is there already is kept.

    Args:
        directory: of the set.
        config: names the streams.
        hours: of audio.
        samples_per_shard: as `preparation.lines_per_shard` has them.
        progress: wraps the iteration over so many shards.
    """
    header = synthetic_header("asr-en", streams=config.streams)
    wanted = hours * 3600 * header.frame_rate
    mean = draw_lengths(np.random.default_rng(0), count=100_000, frame_rate=header.frame_rate).mean()
    count = max(1, round(wanted / (mean * samples_per_shard)))
    checksums: dict[int, int] = {}
    for shard in progress(range(count), count):
        prefix = directory / f"{shard:06d}"
        if not prefix.with_suffix(".json").is_file():
            lengths = draw_lengths(np.random.default_rng(shard), count=samples_per_shard, frame_rate=header.frame_rate)
            _write(prefix, lengths, header=header, checksums=checksums)
    return write_catalogue(directory)


def _write(prefix: Path, lengths: np.ndarray, *, header: ShardHeader, checksums: dict[int, int]) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = lengths * len(header.cardinalities)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=header.token_type)
    builder.sequence_lengths = tokens.tolist()
    builder.document_indices = list(range(len(tokens) + 1))
    builder.finalize(f"{prefix}.idx")
    size = np.dtype(header.token_type).itemsize
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(int(tokens.sum()) * size)
    for count in set(tokens.tolist()) - checksums.keys():
        checksums[count] = xxhash.xxh64_intdigest(bytes(count * size))
    finish_shard(
        prefix,
        header=replace(header, num_samples=len(lengths), num_frames=int(lengths.sum())),
        checksums=[checksums[count] for count in tokens.tolist()],
    )
