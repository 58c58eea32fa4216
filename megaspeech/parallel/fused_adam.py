"""TransformerEngine's Adam, such that every checkpoint holds whole FP32 main weights.

Told to, it keeps of each main weight only the 16 bits that the BF16 weight lacks. megatron-core 0.16.1 would write
those to a checkpoint as if they were weights, and TransformerEngine refuses to read them back; it also calls
`initialize_state` without an argument that TransformerEngine 2.20 wants.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAIN = "master_param"


def split_fp32(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP32 numbers as (BF16 rounded to nearest, int16 of what that lacks); `join_fp32` gives them back, bit for bit.

    The low 16 bits are taken as a signed number; where it is negative the upper ones are one more, and so rounded
    (TransformerEngine, `multi_tensor_adam`). NaN and infinity stay what they are.
    """
    bits = x.contiguous().view(torch.int32)
    low = ((bits & 0xFFFF) ^ 0x8000) - 0x8000
    high = (bits - low) >> 16
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_fp32(high: Tensor, low: Tensor) -> Tensor:
    """The FP32 numbers that `split_fp32` took apart."""
    return ((high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def make_reshardable(optimizer: torch.optim.Optimizer) -> None:
    """Give a FusedAdam of TransformerEngine the methods below, in place: megatron-core makes it itself."""
    optimizer.__class__ = type("ReshardableAdam", (WholeMainWeights, type(optimizer)), {})


class WholeMainWeights:
    """What goes before FusedAdam's own methods, where a checkpoint reads and writes its state."""

    def initialize_state(self, param: Tensor, store_param_remainders: bool | None = None) -> None:
        """As FusedAdam's; what is left open is what its first step would choose."""
        if store_param_remainders is None:
            store_param_remainders = self._stores_remainders(param)
        super().initialize_state(param, store_param_remainders)

    def get_unscaled_state(self, param: Tensor, state_name: str, skip_unscale: bool = False) -> Tensor:
        """As FusedAdam's; main weights are FP32."""
        state = super().get_unscaled_state(param, state_name, skip_unscale)
        return join_fp32(param.detach(), state) if self._is_remainder(param, state_name) else state

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """As FusedAdam's; main weights are FP32, and where remainders are kept the parameter takes the rest."""
        if self._is_remainder(param, state_name):
            high, unscaled_state = split_fp32(unscaled_state.to(param.device))
            param.data.copy_(high)
        super().set_scaled_state(param, state_name, unscaled_state)

    def _stores_remainders(self, param: Tensor) -> bool:
        return self.store_param_remainders and param.dtype == torch.bfloat16

    def _is_remainder(self, param: Tensor, state_name: str) -> bool:
        return state_name == MAIN and self._stores_remainders(param)
