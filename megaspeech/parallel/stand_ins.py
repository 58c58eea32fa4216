"""Sharded state dicts of modules whose parameters fully sharded data parallelism has replaced.

megatron-core describes where a plain parameter lies in the whole tensor; it knows DTensors of one kind only, cut along
the first axis. So for the time of its description every module sees plain tensors in their place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed.tensor import DTensor


def sharded_state_dict(
    module: MegatronModule,
    *,
    metadata: dict[str, Any],
    stand_in: Callable[[DTensor], Tensor],
    place: Callable[[ShardedBase, DTensor], ShardedBase] = lambda described, _: described,
) -> tuple[dict[str, Any], dict[int, ShardedBase]]:
    """(the sharded state dict, whose data are the stand-ins; each parameter's place in it, by the parameter's `id`).

    Args:
        module: whose parameters are DTensors.
        metadata: megatron-core's.
        stand_in: what is saved of a parameter.
        place: makes of the stand-in's description that of the parameter's part.
    """
    parameters: dict[int, DTensor] = {}
    with _replaced(module, parameters, stand_in):
        state = module.sharded_state_dict(metadata=metadata)
    places: dict[int, ShardedBase] = {}

    def described(leaf: Any) -> Any:
        if not isinstance(leaf, ShardedBase) or id(leaf.data) not in parameters:
            return leaf
        parameter = parameters[id(leaf.data)]
        places[id(parameter)] = place(leaf, parameter)
        return places[id(parameter)]

    return dict_list_map_outplace(described, state), places


@contextlib.contextmanager
def _replaced(
    module: torch.nn.Module, parameters: dict[int, DTensor], stand_in: Callable[[DTensor], Tensor]
) -> Iterator[None]:
    """Lets modules see stand-ins; `parameters` is filled with what these stand for, by `id`."""
    owners = [(owner, *item) for owner in module.modules() for item in owner._parameters.items() if item[1] is not None]
    try:
        for owner, name, value in owners:
            plain = torch.nn.Parameter(stand_in(value).detach())
            vars(plain).update(vars(value))
            parameters[id(plain)], owner._parameters[name] = value, plain
        yield
    finally:
        for owner, name, value in owners:
            owner._parameters[name] = value
