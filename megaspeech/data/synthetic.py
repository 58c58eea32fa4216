"""Shards of learnable noise: no audio, no codec, no tokenizer. For tests, and to try a layout on a cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megaspeech.config.schema import StreamsSection
from megaspeech.data.shard_set import write_shard_set
from megaspeech.data.shards import FORMAT, ShardHeader

SILENCE = 7
"""The code of silence in every codebook of a synthetic shard."""


def write_synthetic_shards(
    directory: Path,
    *,
    streams: StreamsSection,
    names: tuple[str, ...] = ("asr-en", "tts-en"),
    num_frames: int = 16,
    shorter: int = 4,
) -> None:
    """`train/` and `valid/` sets of shards whose own codebooks follow from the heard ones, so that a loss can fall.

    The same arguments give the same shards, on any machine.

    Args:
        directory: what `data.directory` names; made if missing.
        streams: which rows a sample has, and how many tokens each.
        names: task keys, one set each of 40 samples for training and 6 for validation.
        num_frames: length of the longest sample.
        shorter: by how many frames the shortest is; with 0 all have `num_frames`.
    """
    for split, count in (("train", 40), ("valid", 6)):
        for place, name in enumerate(names):
            generator = np.random.default_rng([place, count])
            samples = [
                _sample(generator, streams=streams, num_frames=num_frames, shorter=shorter) for _ in range(count)
            ]
            write_shard_set(directory / split / name, samples, header=synthetic_header(name, streams=streams))


def synthetic_header(name: str, *, streams: StreamsSection) -> ShardHeader:
    """Of a shard of task key `name`; every codebook is silent at `SILENCE`, and no codec or tokenizer made it."""
    return ShardHeader(
        format=FORMAT,
        task=name,
        codec="synthetic",
        codec_fingerprint="none",
        tokenizer_fingerprint="none",
        frame_rate=12.5,
        cardinalities=streams.cardinalities,
        num_codebooks=streams.num_codebooks,
        silence=(SILENCE,) * streams.num_codec_codebooks,
        task_delay=3,
        speech_lead=1,
    )


def _sample(generator: np.random.Generator, *, streams: StreamsSection, num_frames: int, shorter: int) -> np.ndarray:
    codes = generator.integers(0, streams.cardinality, (streams.num_streams, num_frames))
    own = slice(1, 1 + streams.num_codebooks)
    codes[own, 1:] = (codes[-1, :-1] + np.arange(streams.num_codebooks)[:, None]) % streams.cardinality
    codes[own, num_frames // 2] = SILENCE
    codes[0] = np.where(generator.random(num_frames) < 0.6, streams.text_pad_id, codes[0] % streams.text_cardinality)
    codes[-1, -3:] = -1
    return codes[:, : int(generator.integers(num_frames - shorter, num_frames + 1))]
