"""Bytes of the state that one rank keeps from step to step; activations, which come and go, are not in it."""

from __future__ import annotations

from megaspeech.config import Config
from megaspeech.model.counting import count_parameters

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def state_bytes(config: Config) -> dict[str, int]:
    """Bytes by kind on a single rank, padding of the tables not counted.

    In BF16 megatron-core keeps FP32 gradients, FP32 main weights and two FP32 moments, 18 bytes a parameter in all
    (ZeRO, arXiv 1910.02054, section 3.1, has 16 with BF16 gradients), less where the config says so; in FP32 the main
    weights are the weights themselves. With FP8, TransformerEngine keeps the temporal matrices in FP8 by rows and by
    columns, as Hopper's products want them, beside the BF16 ones or (`precision.fp8_param_gather`) instead of them.
    """
    parts, precision, optimizer = count_parameters(config), config.precision, config.optimizer
    parameters = sum(parts.values())
    multiplied = parts["temporal"] if precision.fp8_recipe else 0
    in_bf16 = parameters - (multiplied if precision.fp8_param_gather else 0)
    sizes = {
        "weights": BYTES[precision.params_dtype] * in_bf16,
        "FP8 weights": 2 * multiplied,
        "gradients": (4 if config.parallel.grad_reduce_in_fp32 else 2) * parameters,
        "main weights": _main_bytes(config) * parameters,
        "moments": (BYTES[optimizer.exp_avg_dtype] + BYTES[optimizer.exp_avg_sq_dtype]) * parameters,
    }
    return {kind: size for kind, size in sizes.items() if size}


def _main_bytes(config: Config) -> int:
    """Of a main weight: the 16 bits that a BF16 weight lacks, where remainders are kept (`optimizer`'s docstrings)."""
    if config.precision.params_dtype == "fp32":
        return 0
    optimizer = config.optimizer
    keeps = optimizer.use_precision_aware_optimizer and optimizer.store_param_remainders
    return 2 if keeps and config.precision.fp8_recipe in (None, "delayed") else 4
