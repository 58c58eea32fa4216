"""Model chunks -> data parallel wrapper -> optimizer and learning rate schedule, megatron-core's but for FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module, MegatronModule

from megaspeech.config import Config
from megaspeech.parallel.fsdp2 import FullyShardedChunk
from megaspeech.parallel.graphs import install_graphs
from megaspeech.parallel.megatron_fsdp import MegatronShardedChunk
from megaspeech.parallel.optimizer import gathers_mxfp8, make_optimizer, make_scheduler
from megaspeech.parallel.reductions import finalise_gradients
from megaspeech.parallel.user_buffers import destroy_user_buffers, initialise_user_buffers


@dataclass
class Wrapped:
    """What a trainer steps: the stage's chunks bare and wrapped, the optimizer and its schedule."""

    config: Config
    models: list[MegatronModule]
    chunks: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.chunks[0].parameters()).device

    def gather_parameters(self) -> None:
        """Before weights are read by other than the next step: `parallel.overlap_param_gather` leaves it to that
        step's forward pass to gather them. All ranks call this."""
        for chunk in self.chunks:
            if getattr(chunk.ddp_config, "overlap_param_gather", False):
                chunk.start_param_sync(force_sync=True)
                # Which that leaves to a gathering that goes on beside the forward pass (param_and_grad_buffer.py:325);
                # without it the next backward pass would multiply by the weights of the step before.
                post_all_gather_processing([one for one in chunk.parameters() if is_float8tensor(one)])

    def release(self) -> None:
        """Let go of what python's garbage collector cannot see: gradient hooks that hold their own model in a ring."""
        for chunk in self.chunks:
            getattr(chunk, "grad_accs", []).clear()
        destroy_user_buffers(self.config)


def wrap(
    config: Config,
    *,
    num_chunks: int,
    build: Callable[[int | None], MegatronModule],
    initialise: Callable[[MegatronModule], None],
) -> Wrapped:
    """Build, initialise and wrap this rank's stage.

    Args:
        config: the run.
        num_chunks: chunks of the model that the stage holds.
        build: makes the chunk of a number, or with None the whole stage.
        initialise: last touch to the weights before the optimizer takes its copies of them.
    """
    initialise_user_buffers(config)
    models = [build(index if num_chunks > 1 else None) for index in range(num_chunks)]
    for model in models:
        initialise(model)
    chunks = [_DATA_PARALLEL[config.parallel.data_parallel](model, config, index) for index, model in enumerate(models)]
    optimizer = make_optimizer(config, chunks)
    for model in models:
        if config.model.depth_graph_multiple:
            install_graphs(model, multiple=config.model.depth_graph_multiple)
        model.config.finalize_model_grads_func = finalise_gradients
        model.config.grad_scale_func = optimizer.scale_loss
        if config.parallel.overlap_grad_reduce:  # only the last microbatch's gradients are to be reduced
            each = [chunk.no_sync for chunk in chunks]
            model.config.no_sync_func = each if len(chunks) > 1 else each[0]
    return Wrapped(config, models, chunks, optimizer, make_scheduler(config, optimizer))


def _ddp(model: MegatronModule, config: Config, index: int) -> torch.nn.Module:
    inner = Float16Module(model.config, model) if model.config.bf16 else model
    if torch.cuda.is_available():
        inner.cuda(torch.cuda.current_device())
    same = ("grad_reduce_in_fp32", "use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    options = DistributedDataParallelConfig(
        **{name: getattr(config.parallel, name) for name in same},
        fp8_param_gather=config.precision.fp8_param_gather,
        reuse_grad_buf_for_mxfp8_param_ag=gathers_mxfp8(config),
    )
    # Gradients of a chunk that is not the last one of the backward pass are reduced in one piece, as megatron does.
    return DistributedDataParallel(model.config, options, inner, disable_bucketing=index > 0)


def _fsdp2(model: MegatronModule, config: Config, index: int) -> torch.nn.Module:
    return FullyShardedChunk(model)


def _megatron_fsdp(model: MegatronModule, config: Config, index: int) -> torch.nn.Module:
    return MegatronShardedChunk(model)


_DATA_PARALLEL = {"ddp": _ddp, "fsdp2": _fsdp2, "megatron_fsdp": _megatron_fsdp}
