"""What one rank knows and all must act upon."""

from __future__ import annotations

from typing import Any

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


def shared_by(has_it: bool, value: Any) -> Any:
    """What one rank has, on all of them; all ranks call this.

    Args:
        has_it: true on that rank alone.
        value: anything that can be pickled; that of the others is not looked at.
    """
    source = torch.tensor(dist.get_rank() if has_it else 0, device=torch.cuda.current_device())
    dist.all_reduce(source, op=dist.ReduceOp.MAX)
    box = [value]
    dist.broadcast_object_list(box, src=int(source))
    return box[0]
