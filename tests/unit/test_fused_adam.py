"""Main weights that are kept as remainders, whole in checkpoints. TransformerEngine's own Adam needs a GPU to be made;
`tests/gpu` saves and loads with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspeech.parallel.fused_adam import MAIN, join_fp32, make_reshardable, split_fp32

EDGES = [0.0, -0.0, 1.0, -1.0, 1 + 2**-8, 1 + 2**-8 + 2**-23, 1 - 2**-9, -(1 + 2**-8), 3.4e38, 1e-45, 2**-126]


def bits(x: torch.Tensor) -> list[int]:
    return x.view(torch.int32).tolist()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_splitting_loses_nothing(numbers: list[float]) -> None:
    x = torch.tensor([*numbers, *EDGES])
    assert bits(join_fp32(*split_fp32(x))) == bits(x)


def test_the_upper_half_is_the_number_rounded_to_bf16() -> None:
    x = torch.randn(10_000)
    high, low = split_fp32(x)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    ties = (x.view(torch.int32) & 0xFFFF) == 0x8000  # away from zero, torch to even
    assert torch.equal(high[~ties], x.bfloat16()[~ties])
    assert ((high.float() - x).abs() <= x.abs() * 2**-8).all()


def test_what_is_not_finite_stays_so() -> None:
    high, low = split_fp32(torch.tensor([torch.inf, -torch.inf, torch.nan]))
    back = join_fp32(high, low)
    assert back[:2].tolist() == [torch.inf, -torch.inf] and back[2].isnan()


def test_a_bf16_weight_alone_lacks_nothing() -> None:
    x = torch.randn(100).bfloat16()
    high, low = split_fp32(x.float())
    assert torch.equal(high, x) and not low.any()


class Adam(torch.optim.SGD):
    """What TransformerEngine 2.20's FusedAdam does with main weights, by its rules for their types."""

    store_param_remainders = True

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        kept = torch.zeros_like(param, dtype=torch.int16) if store_param_remainders else param.detach().float()
        self.state[param] = {MAIN: kept, "exp_avg": torch.zeros_like(param, dtype=torch.bfloat16)}

    def get_unscaled_state(self, param: torch.Tensor, state_name: str, skip_unscale: bool = False) -> torch.Tensor:
        state = self.state[param][state_name]
        return state if state_name == MAIN else state.float()

    def set_scaled_state(self, param: torch.Tensor, state_name: str, unscaled_state: torch.Tensor) -> None:
        remainder = self.store_param_remainders and state_name == MAIN and param.dtype == torch.bfloat16
        assert unscaled_state.dtype == (torch.int16 if remainder else torch.float32)
        self.state[param][state_name].copy_(unscaled_state)


@pytest.mark.parametrize("remainders", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checkpoints_see_whole_main_weights(remainders: bool, dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.randn(64).to(dtype))
    adam = Adam([param], lr=1.0)
    adam.store_param_remainders = remainders
    make_reshardable(adam)
    adam.initialize_state(param)
    assert torch.equal(adam.get_unscaled_state(param, MAIN), param.detach().float())

    loaded = torch.randn(64)
    adam.set_scaled_state(param, MAIN, loaded)
    adam.set_scaled_state(param, "exp_avg", loaded)
    assert torch.equal(adam.get_unscaled_state(param, MAIN), loaded)
    if remainders and dtype == torch.bfloat16:  # else megatron-core copies it to the model
        assert torch.equal(param.detach(), split_fp32(loaded)[0])
