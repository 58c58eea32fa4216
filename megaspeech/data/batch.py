"""Microbatches: samples side by side, or one after the other in a row of their own."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaspeech.config import Config
from megaspeech.config.schema import StreamsSection
from megaspeech.data.tasks import ZERO_TOKEN


@dataclass(frozen=True)
class Batch:
    """One microbatch: codes `[B, S, T]` int64 and loss weights `[B, P, T]` float32.

    `rejected` names the samples that could not be read, with the reason: zero tokens without weight stand for them.
    `depth_frames_BT` bool tells which frames have a codebook that weighs, delays applied: those that enter the depth
    transformer. It stays on the host, so that nobody has to ask the device how many they are.
    `bounds_D` int32, of a packed row (B is 1): the frame at which each sample begins, that of the padding behind them,
    and T. None where each row is one sample.
    """

    codes_BST: Tensor
    weights_BPT: Tensor
    rejected: tuple[tuple[str, str], ...] = ()
    depth_frames_BT: Tensor | None = None
    bounds_D: Tensor | None = None

    def to(self, device: torch.device | str | int) -> Batch:
        """The batch on the device that computes; from pinned memory this does not wait for what the device does."""
        return self._with(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU copies from by itself."""
        return self._with(lambda x: x.pin_memory())

    def _with(self, move: Any) -> Batch:
        bounds = None if self.bounds_D is None else move(self.bounds_D)
        return replace(self, codes_BST=move(self.codes_BST), weights_BPT=move(self.weights_BPT), bounds_D=bounds)

    @property
    def num_frames(self) -> int:
        """T."""
        return self.codes_BST.shape[-1]

    def totals(self) -> Tensor:
        """Sums of the text and of the audio weights, the frames that are not padding, and all frames `[4]` float64."""
        text, audio, first = self.weights_BPT[:, 0], self.weights_BPT[:, 1:], self.codes_BST[:, 0]
        frames = torch.full((), first.numel(), dtype=torch.float64)
        return torch.stack([text.double().sum(), audio.double().sum(), (first >= 0).double().sum(), frames])


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


def pack_rows(lengths: Sequence[int], *, longest: int, multiple: int) -> list[list[int]]:
    """Put samples into the fewest rows of at most `longest` frames, all of them about as long.

    Rows alike cost least: every rank computes as many, and each is padded to the longest. So samples are dealt from the
    longest to the shortest, each to the row that has least (Graham's LPT rule, SIAM J. Appl. Math. 17, 1969).

    Args:
        lengths: of the samples in frames, none above `longest`.
        longest: frames of a row.
        multiple: the number of rows is one of it.

    Returns:
        Numbers of the samples of each row, the fullest row first; a row may be empty.
    """
    assert not lengths or max(lengths) <= longest
    order = sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))
    count = max(1, -(-sum(lengths) // (longest * multiple))) * multiple
    while True:
        heap = [(0, row) for row in range(count)]
        rows: list[list[int]] = [[] for _ in range(count)]
        for sample in order:
            frames, row = heap[0]
            rows[row].append(sample)
            heapq.heapreplace(heap, (frames + lengths[sample], row))
        if max(frames for frames, _ in heap) <= longest:
            return [rows[row] for _, row in sorted(heap, key=lambda entry: (-entry[0], entry[1]))]
        count += multiple


def collate_step(groups: list[list[dict[str, Any]]], *, config: Config) -> list[Batch]:
    """A data parallel rank's microbatches of one step, from the samples of each. Pipeline stages exchange tensors of
    one shape: with a pipeline all of them get the length of the longest."""
    measure = sum if config.data.pack else max
    lengths = [measure([item["codes"].shape[1] for item in group] or [1]) for group in groups]
    if config.parallel.pipeline_model_parallel_size > 1:
        lengths = [max(lengths)] * len(groups)
    return [collate(group, length=length, config=config) for group, length in zip(groups, lengths, strict=True)]


def collate(items: list[dict[str, Any]], *, length: int, config: Config) -> Batch:
    """Samples of one microbatch, one a row or, with `data.pack`, one after the other in a row; filled up with zero
    tokens to `micro_batch_size` rows and the next multiple of `frame_multiple` from `length` on."""
    size, streams = config.training.micro_batch_size, config.streams
    num_frames = length + -length % frame_multiple(config)
    codes = np.full((size, streams.num_streams, num_frames), ZERO_TOKEN, dtype=np.int64)
    weights = np.zeros((size, 1 + streams.num_codebooks, num_frames), dtype=np.float32)
    depth = np.zeros((size, num_frames), dtype=bool)
    row, start, bounds = 0, 0, [0]
    for item in items:
        end = start + item["codes"].shape[1]
        codes[row, :, start:end], weights[row, :, start:end] = item["codes"], item["weights"]
        depth[row, start:end] = depth_frames(item["weights"], streams=streams)
        if config.data.pack:
            start = end
            bounds.append(end)
        else:
            row += 1
    rejected = tuple(name_and_reason for item in items for name_and_reason in item["rejected"])
    if bounds[-1] < num_frames:
        bounds.append(num_frames)
    return Batch(
        *map(torch.from_numpy, (codes, weights)),
        rejected,
        torch.from_numpy(depth),
        torch.tensor(bounds, dtype=torch.int32) if config.data.pack else None,
    )


def depth_frames(weights_PT: np.ndarray, *, streams: StreamsSection) -> np.ndarray:
    """`[..., T]` bool: frames of a sample, or of several `[..., P, T]`, in which a codebook's delayed token weighs."""
    weighs = weights_PT > 0
    frames_T = np.zeros_like(weighs[..., 0, :])
    for stream in range(1, 1 + streams.num_codebooks):
        delay = streams.delays[stream]
        frames_T[..., delay:] |= weighs[..., stream, : max(0, weighs.shape[-1] - delay)]
    return frames_T
