"""Frames of packed rows, and which frames of a sample a context parallel rank holds.

megatron-core cuts the frames into 2 * cp pieces and gives rank r the pieces r and 2 * cp - 1 - r: early frames see
little and late ones much, so every rank gets like work under a causal mask.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def on_context_rank(x: Tensor, *, dim: int = -1) -> Tensor:
    """The frames of `x` along `dim` that this rank holds; `x` itself without context parallelism."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return x
    rank, pieces = parallel_state.get_context_parallel_rank(), x.chunk(2 * size, dim)
    return torch.cat([pieces[rank], pieces[-1 - rank]], dim)


def from_context_ranks(x_T: Tensor) -> Tensor:
    """What `on_context_rank(..., dim=0)` split, whole again; its gradient is summed over the ranks."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return x_T
    gathered = gather_from_sequence_parallel_region(x_T, group=parallel_state.get_context_parallel_group())
    pieces = gathered.chunk(2 * size)
    return torch.cat([*pieces[0::2], *reversed(pieces[1::2])])


def sample_starts(bounds_D: Tensor, *, num_frames: int) -> Tensor:
    """The first frame of the sample that each frame of a packed row is of `[T]`; `bounds_D` is `Batch.bounds_D`."""
    frames = torch.arange(num_frames, device=bounds_D.device, dtype=bounds_D.dtype)
    return bounds_D[torch.searchsorted(bounds_D, frames, right=True) - 1]
