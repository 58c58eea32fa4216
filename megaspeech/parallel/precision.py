"""Whether this rank's GPU can compute what a recipe asks for, found out before anything is allocated; and its end."""

from __future__ import annotations

import sys

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


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


def forget_recipes() -> None:
    """Let TransformerEngine, where it is loaded, forget the models that were.

    For "fp8-delayed" it keeps every module's largest values, with the group they are reduced over, and reduces all of
    them after every step (quantization.py, `FP8GlobalStateManager`): the next model's steps would ask for a group that
    is gone.
    """
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is not None:
        quantization.FP8GlobalStateManager.reset()
