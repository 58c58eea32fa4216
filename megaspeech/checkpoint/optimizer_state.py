"""The optimizer's state by parameter, in one form for all layouts: replicated, distributed, fully sharded.

Each tensor of a parameter is saved under `optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.` and the parameter's own
name, with its own place in the whole tensor; beside them stands the number of updates. Everything else that optimizers
keep (learning rate, decay, betas) is the config's and the schedule's. megatron-core's classes each save a form of their
own, which the others cannot load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor

from megaspeech.checkpoint.flat_ranges import empty_states, joined_states, take_states
from megaspeech.parallel.megatron_fsdp import take_rows, whole
from megaspeech.parallel.optimizer import optimizer_parts

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"
RANGE_NAMES = {MAIN: "param", **{name: name for name in MOMENTS}}
"""What `flat_ranges` calls them."""


def optimizer_state(
    optimizer: MegatronOptimizer, *, places: Mapping[int, ShardedBase], is_loading: bool = False
) -> dict[str, Any]:
    """The sharded state to save, or to be filled by a load.

    Args:
        optimizer: megatron-core's, of any kind.
        places: where each of this rank's parameters lies in the whole tensor, by the parameter's `id`.
        is_loading: whether the values are about to be overwritten.
    """
    tensors = {}
    for place, part in enumerate(optimizer_parts(optimizer)):
        _make_state(part)
        if _is_by_range(part):
            tensors[f"part{place}"] = dict(enumerate(_sharded_by_owner(part, places, is_loading=is_loading)))
        else:
            tensors[f"part{place}"] = dict(enumerate(_sharded_like_parameters(part, places)))
    return {"tensors": tensors, "num_updates": _num_updates(optimizer)}


@torch.no_grad()
def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put loaded values into place, main parameters included; the model's own parameters are the caller's."""
    for place, part in enumerate(optimizer_parts(optimizer)):
        loaded = state["tensors"].get(f"part{place}", {})
        _make_state(part)
        if _is_by_range(part):
            _without_steps(part)  # distrib_optimizer.py:939 looks for every entry of the state among the loaded ones
            take_states(part, ({RANGE_NAMES[name]: x for name, x in loaded[index].items()} for index in sorted(loaded)))
        else:
            for index, (_, main) in enumerate(_model_and_main(part)):
                own = {MAIN: main, **{name: part.optimizer.state[main][name] for name in MOMENTS}}
                for name, tensor in own.items():
                    _fill(part, tensor, loaded[index][name])
        _set_num_updates(part, state["num_updates"])


def _is_by_range(part: MegatronOptimizer) -> bool:
    """Whether a rank holds ranges of a flat buffer, as the distributed optimizer does; Megatron-FSDP's holds rows."""
    return isinstance(part, DistributedOptimizer) and not part.ddp_config.use_megatron_fsdp


def _saved(part: MegatronOptimizer, tensor: Tensor) -> Tensor:
    """What a checkpoint holds of a tensor of this rank's."""
    if isinstance(part, DistributedOptimizer):
        return whole(tensor)
    return _local(tensor)


def _fill(part: MegatronOptimizer, tensor: Tensor, values: Tensor) -> None:
    if isinstance(part, DistributedOptimizer):
        take_rows(tensor, values)
    else:
        _local(tensor).copy_(values)


def _make_state(part: MegatronOptimizer) -> None:
    """The moments that the first update would make, so that they can be saved and loaded before it."""
    part.init_state_fn(part.optimizer, part.config)
    _set_num_updates(part, _num_updates(part))


def _num_updates(optimizer: MegatronOptimizer) -> int:
    for part in optimizer_parts(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:  # the fused Adams count by group
                return int(group["step"])
            for parameter in group["params"]:
                return int(part.optimizer.state[parameter].get("step", 0))
    return 0


def _set_num_updates(part: MegatronOptimizer, count: int) -> None:
    for group in part.optimizer.param_groups:
        if not isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            group["step"] = count
            continue
        for parameter in group["params"]:  # a tensor of its own each: torch's Adam counts them up in place
            part.optimizer.state[parameter]["step"] = torch.tensor(float(count), device=_local(parameter).device)


def _without_steps(part: MegatronOptimizer) -> None:
    for values in part.optimizer.state.values():
        values.pop("step", None)


def _sharded_by_owner(
    part: DistributedOptimizer, places: Mapping[int, ShardedBase], *, is_loading: bool
) -> Iterator[dict[str, ShardedBase]]:
    for model_parameter, tensors in (empty_states if is_loading else joined_states)(part):
        place = places[id(model_parameter)]
        place = replace(place, replica_id=(*place.replica_id[:-1], 0))  # no other data parallel rank has it
        yield {name: _of_state(place, name, tensors[own]) for name, own in RANGE_NAMES.items()}


def _sharded_like_parameters(
    part: MegatronOptimizer, places: Mapping[int, ShardedBase]
) -> Iterator[dict[str, ShardedBase]]:
    for model_parameter, main in _model_and_main(part):
        place = places[id(model_parameter)]
        own = {MAIN: main.detach(), **{name: part.optimizer.state[main][name] for name in MOMENTS}}
        yield {name: _of_state(place, name, _saved(part, tensor)) for name, tensor in own.items()}


def _of_state(place: ShardedBase, name: str, data: Tensor) -> ShardedBase:
    return with_data(place, key=f"optimizer.state.{name}.{place.key}", data=data)


def with_data(place: ShardedBase, *, key: str, data: Tensor) -> ShardedBase:
    """Other values at the same place of another tensor."""
    dtype = {"dtype": data.dtype} if isinstance(place, ShardedTensor) else {}
    return replace(place, key=key, data=data, **dtype)


def _model_and_main(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """(the model's parameter, the one that is updated) of an optimizer that is not distributed."""
    if hasattr(part, "float16_groups"):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(models, mains, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from zip(group, group, strict=True)
    else:
        for group in part.optimizer.param_groups:
            yield from zip(group["params"], group["params"], strict=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
