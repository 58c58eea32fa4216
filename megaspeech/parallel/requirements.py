"""Whether this rank's machine has what a config asks for, found out before anything is allocated."""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.transformer_config import TransformerConfig

from megaspeech.config import Config
from megaspeech.model.temporal import transformer_config


def require_machine(config: Config) -> None:
    """Raise ValueError, naming the key, what is missing and the remedy, where this machine cannot run the config."""
    require_recipe(config.precision.recipe, megatron=transformer_config(config))
    model, parallel, optimizer = config.model, config.parallel, config.optimizer
    for key, is_wanted, needs_transformer_engine, remedy in (
        ("optimizer.use_precision_aware_optimizer", optimizer.use_precision_aware_optimizer, True, "set it false"),
        ("parallel.tp_comm_overlap", parallel.tp_comm_overlap, True, "set it false"),
        ("model.depth_graph_multiple", model.depth_graph_multiple, False, "set it to 0"),
        # It frees buffers in the order of their streams, and CPU ranks would free what the network still writes.
        ('parallel.data_parallel: "megatron_fsdp"', parallel.data_parallel == "megatron_fsdp", False, 'use "fsdp2"'),
    ):
        if is_wanted and not torch.cuda.is_available():
            raise ValueError(f"{key} needs a GPU, and here is none; {remedy}")
        if is_wanted and needs_transformer_engine and not HAVE_TE:
            raise ValueError(f"{key} needs TransformerEngine; install megaspeech[gpu], or {remedy}")


def require_recipe(name: str, *, megatron: TransformerConfig) -> None:
    """Raise ValueError, naming what is missing, where the recipe cannot run.

    Args:
        name: `precision.recipe`.
        megatron: megatron-core's view of it.
    """
    if not megatron.fp8:
        return
    wanted, remedy = f'precision.recipe: "{name}"', 'use "bf16"'
    if not torch.cuda.is_available():
        raise ValueError(f'{wanted} needs a GPU, and here is none; {remedy}, or "fp32" on CPU ranks')
    try:
        from megatron.core.fp8_utils import get_fp8_recipe
        from transformer_engine.pytorch.quantization import check_recipe_support
    except ImportError as error:
        raise ValueError(
            f"{wanted} needs TransformerEngine, which is not installed; install megaspeech[gpu], or {remedy}"
        ) from error
    try:
        check_recipe_support(get_fp8_recipe(megatron))
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability()
        raise ValueError(
            f"{wanted}: {error} This is {torch.cuda.get_device_name()}, compute capability {major}.{minor}, with CUDA "
            f"{torch.version.cuda}; {remedy}"
        ) from error
