"""An optimizer step in two halves, so that the gradient can be looked at before the weights change.

megatron-core's `ChainedOptimizer.step` (optimizer/optimizer.py:1308) does both in one call.
"""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megaspeech.parallel.optimizer import optimizer_parts


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The norm of the gradients of the whole model; not finite where any of them is not. All ranks call this."""
    assert not optimizer.prepare_grads()  # true only with a loss scale, which FP32 and BF16 do without
    return float(optimizer.get_grad_norm())


def update_weights(optimizer: MegatronOptimizer, *, grad_norm: float) -> None:
    """Clip the gradients, whose norm is `grad_norm`, and step."""
    for part in optimizer_parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
