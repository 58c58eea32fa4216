"""Model chunk -> data parallel wrapper -> optimizer and learning rate schedule, all megatron-core's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module, MegatronModule

from megaspeech.config import Config
from megaspeech.parallel.reductions import finalise_gradients


@dataclass
class Wrapped:
    """What a trainer steps: the bare stage, its wrapper, the optimizer and its schedule."""

    model: MegatronModule
    chunk: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def wrap(
    config: Config, *, build: Callable[[], MegatronModule], initialise: Callable[[MegatronModule], None]
) -> Wrapped:
    """Build, initialise and wrap this rank's stage.

    Args:
        config: the run.
        build: makes the stage.
        initialise: last touch to the weights before the optimizer takes its copies of them.
    """
    model = build()
    initialise(model)
    megatron = model.config
    inner = Float16Module(megatron, model) if megatron.bf16 else model
    if torch.cuda.is_available():
        inner.cuda(torch.cuda.current_device())
    distributed = config.parallel.use_distributed_optimizer
    chunk = DistributedDataParallel(
        megatron,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed),
        inner,
    )
    optimizer = get_megatron_optimizer(_optimizer_config(config, dtype=megatron.params_dtype), [chunk])
    _fuse(optimizer)
    megatron.finalize_model_grads_func = finalise_gradients
    megatron.grad_scale_func = optimizer.scale_loss
    return Wrapped(model, chunk, optimizer, _scheduler(config, optimizer))


def _fuse(optimizer: MegatronOptimizer) -> None:
    """Without TransformerEngine or Apex megatron-core takes torch's AdamW as it comes, a dozen passes over the weights;
    fused it is one."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True


def _optimizer_config(config: Config, *, dtype: torch.dtype) -> OptimizerConfig:
    section = config.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
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
