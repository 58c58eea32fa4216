"""A pause for an FP8 recipe, its scales from a checkpoint, and its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


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


def without_scales(tensor: Tensor) -> Tensor:
    """The numbers that a weight kept in FP8 stands for, whose scales TransformerEngine keeps; others as they are."""
    return dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor


@contextmanager
def unpickling_scales() -> Iterator[None]:
    """Let TransformerEngine take up the scales and amax history of "fp8-delayed" from a checkpoint of the run's own.

    It keeps them pickled, which may run code, and refuses them (`_extra_state.py`) unless told to trust the file.
    """
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def forget_recipes() -> None:
    """Let TransformerEngine, where it is loaded, forget the models that were.

    For "fp8-delayed" it keeps every module's largest values, with the group they are reduced over, and reduces all of
    them after every step (quantization.py, `FP8GlobalStateManager`): the next model's steps would ask for a group that
    is gone.
    """
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is not None:
        quantization.FP8GlobalStateManager.reset()
