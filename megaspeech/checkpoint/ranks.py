"""Ranks that do a thing together: what fails on one fails on all, so that none waits for one that has given up."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

PATIENCE = timedelta(hours=1)
"""How long ranks wait for the slowest one's disk."""
Result = TypeVar("Result")


class RankFailure(ValueError):
    """What failed, in words, on which ranks. Every rank raises an equal one."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(dict(reasons))
        self.reasons = dict(reasons)

    def __str__(self) -> str:
        """Equal reasons are said once."""
        by_reason: dict[str, list[str]] = {}
        for rank, reason in sorted(self.reasons.items()):
            by_reason.setdefault(reason, []).append(str(rank))
        return "; ".join(
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}: {reason}" for reason, ranks in by_reason.items()
        )


class Ranks:
    """The ranks of a process group; without one, this process alone.

    Args:
        group: None means the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1

    @classmethod
    def apart(cls) -> Ranks:
        """All ranks, on a line of their own, so that a thread may talk while the training does; all ranks call this."""
        return cls(dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None)

    def each(self, action: Callable[[], Result]) -> list[Result]:
        """What `action()` gives on every rank, by rank.

        Raises:
            RankFailure: it failed on one, or several.
        """
        try:
            mine = (action(), None)
        except Exception as error:
            mine = (None, reason(error))
        outcomes = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(outcomes, mine, group=self.group)
        failed = {rank: why for rank, (_, why) in enumerate(outcomes) if why is not None}
        if failed:
            raise RankFailure(failed)
        return [result for result, _ in outcomes]

    def first(self, action: Callable[[], Result]) -> Result:
        """What `action()` gives on the first rank, which alone does it; raises `RankFailure` as `each` does."""
        return self.each(lambda: action() if self.rank == 0 else None)[0]


def reason(error: BaseException) -> str:
    """An error in words: the system's where it lies at the root, the message where it is meant for users."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()
