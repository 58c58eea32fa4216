"""megatron-core's optimizer and its schedule, from the config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megaspeech.config import Config
from megaspeech.parallel.fused_adam import make_reshardable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
"""As TransformerEngine's Adam takes them; its FP8 are bytes."""


def make_optimizer(config: Config, chunks: Sequence[torch.nn.Module]) -> MegatronOptimizer:
    """The optimizer of a stage's wrapped chunks: TransformerEngine's Adam or Apex's where they are, torch's else."""
    optimizer = get_megatron_optimizer(optimizer_config(config), list(chunks), use_gloo_process_groups=False)
    for part in optimizer_parts(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True  # torch's takes a dozen passes over the weights as it comes; fused it is one
        elif config.optimizer.use_precision_aware_optimizer:
            make_reshardable(part.optimizer)
    return optimizer


def optimizer_parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """Those that hold parameters: experts have an optimizer of their own, a stage without layers has an empty one."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(part, "is_stub_optimizer", False):
            yield part


def optimizer_config(config: Config) -> OptimizerConfig:
    """megatron-core's view of the optimizer."""
    section, parallel, precision = config.optimizer, config.parallel, config.precision
    # torch's FSDP keeps FP32 shards and computes in what is gathered from them: it has no other main parameters.
    bf16 = precision.params_dtype == "bf16" and parallel.data_parallel != "fsdp2"
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
        fp8_recipe=precision.fp8_recipe,
        reuse_grad_buf_for_mxfp8_param_ag=gathers_mxfp8(config),
        use_distributed_optimizer=distributed[parallel.data_parallel],
        overlap_param_gather=parallel.overlap_param_gather,
        use_precision_aware_optimizer=section.use_precision_aware_optimizer,
        main_grads_dtype=torch.float32 if parallel.grad_reduce_in_fp32 else torch.bfloat16,
        exp_avg_dtype=DTYPES[section.exp_avg_dtype],
        exp_avg_sq_dtype=DTYPES[section.exp_avg_sq_dtype],
        store_param_remainders=section.store_param_remainders,
    )


def gathers_mxfp8(config: Config) -> bool:
    """MXFP8 weights are gathered in BF16, through the memory of the gradients: their two forms, by row and by column,
    are rounded each from the BF16 numbers."""
    return config.precision.fp8_param_gather and config.precision.fp8_recipe == "mxfp8"


def make_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up and decay of the learning rate."""
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
