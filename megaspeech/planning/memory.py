"""Bytes of the state that one rank keeps from step to step; activations, which come and go, are not in it."""

from __future__ import annotations

from megaspeech.config import Config
from megaspeech.model.counting import count_parameters


def state_bytes(config: Config) -> dict[str, int]:
    """Bytes by kind on a single rank, padding of the tables not counted.

    In BF16 megatron-core keeps FP32 gradients, FP32 copies of the weights and two FP32 moments (18 bytes a parameter
    in all; ZeRO, arXiv 1910.02054, section 3.1, with FP32 gradients); in FP32 the copies are the weights themselves.
    With FP8, TransformerEngine also keeps the temporal matrices in FP8, once by rows and once by columns: Hopper's
    products want both.
    """
    counts = count_parameters(config)
    parameters, is_fp32 = sum(counts.values()), config.precision.params_dtype == "fp32"
    sizes = {
        "weights": (4 if is_fp32 else 2) * parameters,
        "gradients": 4 * parameters,
        "main weights": 0 if is_fp32 else 4 * parameters,
        "moments": 8 * parameters,
        "FP8 weights": 2 * counts["temporal"] if config.precision.fp8_recipe else 0,
    }
    return {kind: size for kind, size in sizes.items() if size}
