"""A pause for an FP8 recipe, and its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron.core.transformer.module import MegatronModule


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
