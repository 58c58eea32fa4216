"""An FP8 recipe: whether this rank's GPU can compute it, found out before anything is allocated; its pause; its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.transformer.module import MegatronModule
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


@contextmanager
def without_fp8(models: Sequence[MegatronModule]) -> Iterator[None]:
    """The models, whose parameters stay as they are, multiply in BF16.

    megatron-core asks its config at every forward pass whether to enter TransformerEngine's FP8 context
    (transformer_block.py:717). A module that runs outside of it keeps the scales and amax history of delayed scaling
    (`init_fp8_metadata` in TransformerEngine's module/base.py takes them up again), and writes nothing to them.
    """
    configs = [model.config for model in models]
    modes = [config.fp8 for config in configs]
    for config in configs:
        config.fp8 = None
    try:
        yield
    finally:
        for config, mode in zip(configs, modes, strict=True):
            config.fp8 = mode


def forget_recipes() -> None:
    """Let TransformerEngine, where it is loaded, forget the models that were.

    For "fp8-delayed" it keeps every module's largest values, with the group they are reduced over, and reduces all of
    them after every step (quantization.py, `FP8GlobalStateManager`): the next model's steps would ask for a group that
    is gone.
    """
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is not None:
        quantization.FP8GlobalStateManager.reset()
