"""Megatron-FSDP around a chunk of the model, tensor parallelism inside it.

It cuts a group of parameters into equal parts wherever the cut falls, so a rank may hold some rows of one and none of
another. Checkpoints hold parameters whole, as the distributed optimizer's do: they are gathered to be saved, and every
rank takes its rows of what it loads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor

from megaspeech.parallel.stand_ins import sharded_state_dict


class MegatronShardedChunk(mcore_fsdp_adapter.FullyShardedDataParallel):
    """A model chunk whose parameters, gradients and optimizer state are sharded over the data parallel ranks."""

    def __init__(self, model: MegatronModule) -> None:
        alone = {type(module) for module in model.modules() if getattr(module, "is_sharded_alone", False)}
        partial = [name for name, one in model.named_parameters() if getattr(one, "tensor_parallel_partial", False)]
        super().__init__(
            config=model.config,
            ddp_config=DistributedDataParallelConfig(
                use_megatron_fsdp=True,
                use_distributed_optimizer=True,
                data_parallel_sharding_strategy="optim_grads_params",
                grad_reduce_in_fp32=True,
            ),
            module=Float16Module(model.config, model) if model.config.bf16 else model,
            fsdp_unit_modules=[TransformerLayer, *alone],
            device=torch.device(torch.cuda.current_device()),
        )
        self.model = [model]  # in a list, or it would be a child a second time
        for name in partial:  # it makes new parameters, and hands on none but its own marks
            model.get_parameter(name).tensor_parallel_partial = True

    def _fix_tensor_parallel_attributes(self, module: torch.nn.Module) -> None:
        """Marks TransformerEngine's layers, and cannot ask for them where it is not installed (line 184)."""
        if isinstance(mcore_fsdp_adapter.TELinear, type):
            super()._fix_tensor_parallel_attributes(module)

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[int, ShardedBase]]:
        """(the module's sharded state dict, whose data are whole parameters; each parameter's place in it, by the
        parameter's `id`). All ranks call this."""
        self.module._replace_param_with_distributed_if_needed()  # after a forward pass its own are there
        return sharded_state_dict(self.model[0], metadata=metadata, stand_in=whole)

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Put what `sharded_state_dict` described, loaded, into the parameters."""
        self.module._replace_param_with_distributed_if_needed()
        for name, parameter in self.model[0].named_parameters():
            take_rows(parameter, state[name])

    def install(self) -> None:
        """Compute with the optimizer's parameters from now on; after a load they are other than the gathered ones."""
        self.param_and_grad_buffer.copy_main_weights_to_model_weights()


def whole(shard: DTensor) -> Tensor:
    """All rows of a tensor of which this rank holds some, perhaps none. All data parallel ranks call this."""
    rows, group = _rows(shard), _group()
    local = shard.to_local().detach()
    parts = [local.new_empty((count, *local.shape[1:])) for count in rows]
    for source, part in enumerate(parts):
        if part.numel():
            part = part.copy_(local) if source == group.rank() else part
            dist.broadcast(part, group=group, group_src=source)
    return torch.cat(parts)


def take_rows(shard: DTensor, values: Tensor) -> None:
    """Copy this rank's rows of `values` into its shard. All data parallel ranks call this."""
    first = sum(_rows(shard)[: _group().rank()])
    local = shard.to_local()
    local.copy_(values[first : first + len(local)])


def _rows(shard: DTensor) -> list[int]:
    rows = [0] * _group().size()
    dist.all_gather_object(rows, len(shard.to_local()), group=_group())
    return rows


def _group() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
