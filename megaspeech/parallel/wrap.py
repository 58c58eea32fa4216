"""Model chunks -> data parallel wrapper -> optimizer and learning rate schedule, megatron-core's but for FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module, MegatronModule

from megaspeech.config import Config
from megaspeech.parallel.fsdp2 import FullyShardedChunk
from megaspeech.parallel.megatron_fsdp import MegatronShardedChunk
from megaspeech.parallel.reductions import finalise_gradients


@dataclass
class Wrapped:
    """What a trainer steps: the stage's chunks bare and wrapped, the optimizer and its schedule."""

    models: list[MegatronModule]
    chunks: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.chunks[0].parameters()).device

    def release(self) -> None:
        """Let go of what python's garbage collector cannot see: gradient hooks that hold their own model in a ring."""
        for chunk in self.chunks:
            getattr(chunk, "grad_accs", []).clear()


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
    models = [build(index if num_chunks > 1 else None) for index in range(num_chunks)]
    for model in models:
        initialise(model)
    chunks = [_DATA_PARALLEL[config.parallel.data_parallel](model, config, index) for index, model in enumerate(models)]
    optimizer = get_megatron_optimizer(_optimizer_config(config), chunks)
    _fuse(optimizer)
    for model in models:
        model.config.finalize_model_grads_func = finalise_gradients
        model.config.grad_scale_func = optimizer.scale_loss
        if config.parallel.overlap_grad_reduce:  # only the last microbatch's gradients are to be reduced
            each = [chunk.no_sync for chunk in chunks]
            model.config.no_sync_func = each if len(chunks) > 1 else each[0]
    return Wrapped(models, chunks, optimizer, _scheduler(config, optimizer))


def _ddp(model: MegatronModule, config: Config, index: int) -> torch.nn.Module:
    inner = Float16Module(model.config, model) if model.config.bf16 else model
    if torch.cuda.is_available():
        inner.cuda(torch.cuda.current_device())
    distributed = config.parallel.use_distributed_optimizer
    overlap = config.parallel.overlap_grad_reduce
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_grad_reduce=overlap
    )
    # Gradients of a chunk that is not the last one of the backward pass are reduced in one piece, as megatron does.
    return DistributedDataParallel(model.config, options, inner, disable_bucketing=index > 0)


def _fsdp2(model: MegatronModule, config: Config, index: int) -> torch.nn.Module:
    return FullyShardedChunk(model)


def _megatron_fsdp(model: MegatronModule, config: Config, index: int) -> torch.nn.Module:
    if not torch.cuda.is_available():
        raise ValueError(
            'parallel.data_parallel: "megatron_fsdp" needs GPUs: it frees buffers in the order of their streams, and '
            'CPU ranks would free what the network still writes; use "fsdp2"'
        )
    return MegatronShardedChunk(model)


_DATA_PARALLEL = {"ddp": _ddp, "fsdp2": _fsdp2, "megatron_fsdp": _megatron_fsdp}


def _fuse(optimizer: MegatronOptimizer) -> None:
    """Without TransformerEngine or Apex megatron-core takes torch's AdamW as it comes, a dozen passes over the weights;
    fused it is one."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True


def _optimizer_config(config: Config) -> OptimizerConfig:
    section, parallel = config.optimizer, config.parallel
    # torch's FSDP keeps FP32 shards and computes in what is gathered from them: it has no other main parameters.
    bf16 = config.precision.params_dtype == "bf16" and parallel.data_parallel != "fsdp2"
    distributed = {"ddp": parallel.use_distributed_optimizer, "fsdp2": False, "megatron_fsdp": True}
    return OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        use_distributed_optimizer=distributed[parallel.data_parallel],
    )


def _scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    section, steps = config.optimizer, config.training.train_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.lr_warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
