"""State of the distributed optimizer, parameter by parameter: whole on the one rank that writes or reads it.

Each data parallel rank keeps a range of the numbers of all parameters in a row, which cuts through parameters. Here the
rank that holds a parameter's first number gets the rest of it from those that follow, so every rank writes about its
own share, and a GPU holds one parameter more at a time. megatron-core 0.16.1 gathers whole buckets, without overlap all
of them in one, on every GPU, and keeps 12 bytes a parameter in every rank's host memory, to load too
(distrib_optimizer.py, `get_parameter_state_dp_zero`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

STATES = ("param", "exp_avg", "exp_avg_sq")
"""megatron-core's names of what the optimizer keeps of a parameter."""


@dataclass(frozen=True)
class CutParameter:
    """A model's parameter and how many of its numbers each data parallel rank holds, in the order of the ranks."""

    parameter: Tensor
    counts: tuple[int, ...]
    group: dist.ProcessGroup

    @property
    def num_mine(self) -> int:
        """Numbers that this rank holds."""
        return self.counts[self.group.rank()]

    @property
    def owner(self) -> int:
        """The rank that holds the first number."""
        return next(rank for rank, count in enumerate(self.counts) if count)

    @property
    def is_mine(self) -> bool:
        """Whether this rank writes and reads it."""
        return self.owner == self.group.rank()

    @property
    def is_whole(self) -> bool:
        """Whether its owner holds all of it."""
        return max(self.counts) == sum(self.counts)

    def join(self, mine: Tensor) -> Tensor | None:
        """All numbers, in the parameter's shape, on its owner, None elsewhere; all ranks of the group call this.

        `mine`: those of this rank, of which the result is a view where the owner holds all; else it is on the host.
        """
        if not self.is_whole:
            joined = mine.new_empty(sum(self._if_mine()))
            dist.all_to_all_single(joined, mine, self._if_mine(), self._to_owner(), group=self.group)
            mine = joined.cpu()
        return mine.view(self.parameter.shape) if self.is_mine else None

    def cut(self, values: Tensor | None) -> Tensor:
        """This rank's numbers of the owner's `values`, on the parameter's device; all ranks of the group call this."""
        device = self.parameter.device
        values = torch.empty(0, device=device) if values is None else values.flatten().to(device)
        if self.is_whole:
            return values
        mine = values.new_empty(self.num_mine)
        dist.all_to_all_single(mine, values, self._to_owner(), self._if_mine(), group=self.group)
        return mine

    def _if_mine(self) -> list[int]:
        """What the owner exchanges with every rank."""
        return [count if self.is_mine else 0 for count in self.counts]

    def _to_owner(self) -> list[int]:
        """What this rank exchanges with every rank: with the owner alone."""
        return [self.num_mine if rank == self.owner else 0 for rank in range(len(self.counts))]


def cut_parameters(part: DistributedOptimizer) -> Iterator[CutParameter]:
    """The parameters of an optimizer, in the same order on all ranks of its group."""
    group = part.data_parallel_group
    for buffer in part.buffers:
        for parameter, (first, end, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            size = bucket.grad_data.numel() // group.size()
            starts = range(bucket.offset, bucket.offset + size * group.size(), size)
            counts = tuple(max(0, min(end, start + size) - max(first, start)) for start in starts)
            yield CutParameter(parameter, counts, group)


def joined_states(part: DistributedOptimizer) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
    """(parameter, its "param", "exp_avg" and "exp_avg_sq", FP32) of those that this rank writes; all ranks of the
    optimizer's group call this. Where the optimizer keeps them so they are its own tensors, else on the host."""
    is_converted = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    for cut in cut_parameters(part):
        own = part._get_main_param_and_optimizer_states(cut.parameter) if cut.num_mine else {}
        nothing = torch.empty(0, device=cut.parameter.device)
        joined = {name: cut.join(own.get(name, nothing).detach().float()) for name in STATES}
        if cut.is_mine:
            yield cut.parameter, {name: x.cpu() if is_converted else x for name, x in joined.items()}


def empty_states(part: DistributedOptimizer) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
    """As `joined_states`, on the host, to be filled by a load."""
    for cut in cut_parameters(part):
        if cut.is_mine:
            yield cut.parameter, {name: torch.empty(cut.parameter.shape, dtype=torch.float32) for name in STATES}


def take_states(part: DistributedOptimizer, loaded: Iterator[Mapping[str, Tensor]]) -> None:
    """Put what `empty_states` gave, loaded, into place; all ranks of the optimizer's group call this."""
    for cut in cut_parameters(part):
        values = next(loaded) if cut.is_mine else {}
        mine = {name: cut.cut(values.get(name)) for name in STATES}
        if cut.num_mine:
            part._set_main_param_and_optimizer_states(cut.parameter, mine)
