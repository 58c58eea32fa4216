"""torch's fully sharded data parallelism (FSDP2) around a chunk of the model, tensor parallelism inside it.

megatron-core's own wrapper of it makes a device mesh that torch 2.13 refuses; calling `fully_shard` ourselves is less
code. Every parameter is an FP32 shard on its rank, at once the optimizer's; it is gathered in the run's precision for
the forward and the backward pass of its layer, and gradients are reduced in FP32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megaspeech.parallel.stand_ins import sharded_state_dict


class FullyShardedChunk(_BaseDataParallel):
    """A model chunk whose parameters are sharded over the data (and context) parallel ranks.

    Each transformer layer, and each module that says `is_sharded_alone`, is gathered by itself, the rest together.
    """

    def __init__(self, model: MegatronModule) -> None:
        super().__init__(config=model.config, module=model)
        self.ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        model.float().to(device)
        options = {
            "mesh": DeviceMesh.from_group(group, device, mesh_dim_names=("dp",)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=model.config.params_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "shard_placement_fn": lambda parameter: Shard(shard_axis(parameter, group.size())),
        }
        # torch makes new parameters of them and forgets what megatron-core wrote on the old ones.
        marks = {name: vars(parameter).copy() for name, parameter in model.named_parameters()}
        for module in reversed(list(model.modules())):  # the inner ones first
            if isinstance(module, TransformerLayer) or getattr(module, "is_sharded_alone", False):
                fully_shard(module, **options)
        fully_shard(model, **options)
        for name, parameter in model.named_parameters():
            vars(parameter).update(marks[name])

    def zero_grad_buffer(self) -> None:
        """The gradients are the parameters' own, which the optimizer sets to None."""

    def finish_grad_sync(self, force_all_reduce: bool = False) -> None:
        """Gradients were reduced in the backward pass; a parameter that had no part in it still has one, of 0."""
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[int, ShardedBase]]:
        """(the module's sharded state dict, whose data are this rank's FP32 shards; each parameter's place in it, by
        the parameter's `id`).

        megatron-core describes how a parameter is cut by tensor parallelism; the cut along the data parallel ranks,
        mostly along another axis, is added to that.
        """
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass alone, what was gathered is still there
        return sharded_state_dict(self.module, metadata=metadata, stand_in=DTensor.to_local, place=_cut)

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Put what `sharded_state_dict` described, loaded, into the parameters."""
        for name, parameter in self.module.named_parameters():
            parameter.to_local().copy_(state[name])


def _cut(place: ShardedBase, parameter: DTensor) -> ShardedBase:
    """`place` of a shard, as one of its equals along the sharded axis."""
    mesh, (placement,) = parameter.device_mesh, parameter.placements
    if isinstance(place, ShardedTensorFactory):  # two halves of one tensor (SwiGLU): each half is cut alike

        def build(*arguments: Any) -> Any:
            return dict_list_map_outplace(lambda part: _cut(part, parameter), place.build_fn(*arguments))

        return replace(place, build_fn=build, replica_id=(*place.replica_id[:-1], 0))
    axis, ranks = place.prepend_axis_num + placement.dim, mesh.size()
    start = place.global_offset[axis] * ranks + place.local_shape[placement.dim] * mesh.get_local_rank()

    def along(values: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*values[:axis], value, *values[axis + 1 :])

    return replace(
        place,
        global_shape=along(place.global_shape, place.global_shape[axis] * ranks),
        global_offset=along(place.global_offset, start),
        axis_fragmentations=along(place.axis_fragmentations, place.axis_fragmentations[axis] * ranks),
        replica_id=(*place.replica_id[:-1], 0),  # no two data parallel ranks hold the same
    )


def shard_axis(parameter: torch.Tensor, num_ranks: int) -> int:
    """The axis along which a parameter is cut into `num_ranks` equal parts: the last that is not cut by tensor
    parallelism, so that a shard is a rectangle of the whole tensor and checkpoints can say where it lies. A bias
    has one axis alone: what tensor parallelism leaves of it is cut once more.

    Raises:
        ValueError: none can be cut so.
    """
    cut = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
    for axis in reversed(range(parameter.ndim)):
        if (axis != cut or parameter.ndim == 1) and parameter.shape[axis] % num_ranks == 0:
            return axis
    raise ValueError(
        f'parallel.data_parallel = "fsdp2": a parameter of shape {tuple(parameter.shape)} cannot be shared out evenly '
        f'over {num_ranks} data and context parallel ranks; take a number that divides the widths, or "ddp"'
    )
