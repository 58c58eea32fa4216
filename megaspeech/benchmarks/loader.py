"""How fast batches come off a set of shards, what opening it costs, and whether memory stays as it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from megaspeech.config import Config
from megaspeech.data.loading import StepBatches
from megaspeech.data.mixture import TrainBatches
from megaspeech.data.shard_set import ShardSet
from megaspeech.model.counting import count_flops
from megaspeech.planning.gpus import Gpu

UTILISATION = 0.55
"""Share of the data sheet's BF16 rate that the model is aimed to reach (docs/measurements/README.md)."""


@dataclass(frozen=True)
class IndexFigures:
    """Of one set. Times of reading one sample are [median, 99th percentile] in microseconds.

    Attributes:
        hours, num_samples, num_shards, index_bytes, code_bytes: its size.
        open_seconds: to open it, from nothing.
        in_epoch_us: samples in the order of an epoch.
        anywhere_us: samples drawn from all of it, most of which open a shard.
        num_drawn: of each kind.
        resident_bytes: of the process, opened, and after every quarter of the samples in the order of an epoch.
    """

    hours: float
    num_samples: int
    num_shards: int
    index_bytes: int
    code_bytes: int
    open_seconds: float
    in_epoch_us: tuple[float, float]
    anywhere_us: tuple[float, float]
    num_drawn: int
    resident_bytes: tuple[int, ...]


@dataclass(frozen=True)
class LoaderFigures:
    """Frames a second of one process that loads batches for rank 0 of `dp_size`.

    Attributes:
        dp_size, global_batch_size: of the step.
        alone, worker: in this process; in one worker, whose batches come through a pipe.
        padding: share of the frames.
        eaten: frames a second that the model takes on one of `gpu`, at `UTILISATION` of its BF16 rate.
    """

    dp_size: int
    global_batch_size: int
    alone: float
    worker: float
    padding: float
    eaten: float
    gpu: str


def measure_index(directory: Path, *, num_drawn: int, shuffle_shards: int, say: Callable[[str], None]) -> IndexFigures:
    """Open the set in `directory` and read `num_drawn` samples of it in order, and as many from anywhere."""
    say("opening")
    started = time.perf_counter()
    shards = ShardSet(directory, seed=1, shuffle_shards=shuffle_shards)
    open_seconds = time.perf_counter() - started
    say("samples in the order of an epoch")
    resident, in_order = [_resident_bytes()], []
    for quarter in np.array_split(np.arange(num_drawn), 4):
        in_order += [_microseconds(shards, index) for index in shards.places(quarter).tolist()]
        resident.append(_resident_bytes())
    say("samples from anywhere")
    anywhere = np.random.default_rng(0).integers(0, len(shards), num_drawn)
    from_anywhere = [_microseconds(shards, index) for index in anywhere.tolist()]
    header = shards.header
    return IndexFigures(
        hours=header.num_frames / header.frame_rate / 3600,
        num_samples=len(shards),
        num_shards=len(shards.catalogue.names),
        index_bytes=28 * len(shards),
        code_bytes=header.num_frames * len(header.cardinalities) * np.dtype(header.token_type).itemsize,
        open_seconds=open_seconds,
        in_epoch_us=_median_and_p99(in_order),
        anywhere_us=_median_and_p99(from_anywhere),
        num_drawn=num_drawn,
        resident_bytes=tuple(resident),
    )


def measure_loader(
    config: Config, *, dp_size: int, num_steps: int, gpu: Gpu, say: Callable[[str], None]
) -> LoaderFigures:
    """Batches of `num_steps` steps, for rank 0 of `dp_size`, in this process and in a worker."""
    batches = TrainBatches(config, dp_rank=0, dp_size=dp_size)
    batches(0)  # opens its shards
    rates, padding = [], 0.0
    for num_workers in (0, 1):
        say(f"{num_workers} workers")
        totals, started = np.zeros(4), time.perf_counter()
        for step in StepBatches(batches, steps=range(1, 1 + num_steps), num_workers=num_workers):
            totals += sum(batch.totals().numpy() for batch in step)
        rates.append(totals[2] / (time.perf_counter() - started))
        padding = 1 - totals[2] / totals[3]
    flops = 3 * sum(count_flops(config, num_frames=config.data.num_frames).values())
    return LoaderFigures(
        dp_size=dp_size,
        global_batch_size=config.training.global_batch_size,
        alone=rates[0],
        worker=rates[1],
        padding=padding,
        eaten=UTILISATION * gpu.bf16_tflops * 1e12 / flops,
        gpu=gpu.name,
    )


def _microseconds(shards: ShardSet, index: int) -> float:
    started = time.perf_counter()
    shards[index]
    return 1e6 * (time.perf_counter() - started)


def _median_and_p99(values: list[float]) -> tuple[float, float]:
    return float(np.median(values)), float(np.percentile(values, 99))


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss
