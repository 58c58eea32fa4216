"""What one rank knows and all must act upon."""

from __future__ import annotations

import torch
import torch.distributed as dist


def true_on_any_rank(*flags: bool) -> list[bool]:
    """Each flag, true where any rank's is; all ranks call this and get the same."""
    values = torch.tensor(flags, dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def union_over_ranks(items: list[str]) -> list[str]:
    """All ranks' items, sorted, each once; all ranks call this. Slow: for what is rare."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return sorted({item for share in gathered for item in share})
