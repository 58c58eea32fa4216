"""Sums over ranks that megatron-core does not do by itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor
from torch.distributed.tensor import DTensor


def finalise_gradients(chunks: list[torch.nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """megatron-core's gradient reductions, and the sum over the tensor parallel group of the parameters marked
    `tensor_parallel_partial`: replicated weights through which every rank put its own share of the frames."""
    finalize_model_grads(chunks, num_tokens, **options)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    for chunk, parameter in ((owner, parameter) for owner in chunks for parameter in owner.parameters()):
        if getattr(parameter, "tensor_parallel_partial", False):
            gradient = _local_gradient(parameter, chunk)
            # Each by itself: in one piece they would take a copy of all.
            if gradient is not None and gradient.numel():
                dist.all_reduce(gradient, group=group)


def _local_gradient(parameter: Tensor, chunk: torch.nn.Module) -> Tensor | None:
    """This rank's part of a parameter's gradient, if any: of megatron-core's buffer the range whose optimizer's state
    it holds, the rest of which nobody reads (of the 40B's depth transformer they are 22 GB); a fully sharded one's
    shard; else all of it."""
    if chunk.ddp_config.use_distributed_optimizer and hasattr(chunk, "param_to_bucket_group"):
        group = chunk.param_to_bucket_group[parameter]
        bucket = group.param_to_bucket[parameter]
        first, end = bucket.param_to_index[parameter]
        size = bucket.grad_data.numel() // group.intra_distributed_optimizer_instance_size
        start = size * group.intra_distributed_optimizer_instance_rank
        return bucket.grad_data[max(first, start) : max(first, min(end, start + size))]
    gradient = parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def sum_over_data_parallel(values: Tensor) -> Tensor:
    """`values` summed over the data parallel group, in place; context parallel ranks hold the same samples."""
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    return values


def max_over_tensor_parallel(value: Tensor) -> Tensor:
    """The largest `value` of the tensor parallel group, in place."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return value


def over_all_ranks(*, largest: Tensor, sums: Tensor) -> None:
    """The largest and the sums over all ranks of the run, in place; all ranks call this."""
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(sums)


def sum_over_stage(values: Tensor) -> Tensor:
    """`values` summed over the tensor, context and data parallel ranks of a pipeline stage, in place."""
    dist.all_reduce(values, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    return values
