"""Bytes of state from the config alone, and the GPUs that hold them."""

from __future__ import annotations

from pathlib import Path

import pytest
from one_rank import make_config, one_rank  # noqa: F401

from megaspeech.model.counting import count_parameters
from megaspeech.planning.gpus import GPUS, find_gpu
from megaspeech.planning.memory import state_bytes

LEAN = (
    *("parallel.grad_reduce_in_fp32=false", "optimizer.use_precision_aware_optimizer=true"),
    *("optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16"),
)


@pytest.mark.parametrize(
    "recipe, overrides, bytes_a_parameter, more_in_temporal",
    [
        ("fp32", (), 4 + 4 + 8, 0),
        ("bf16", (), 2 + 4 + 4 + 8, 0),
        ("bf16", LEAN, 2 + 2 + 2 + 4, 0),
        ("bf16", (*LEAN, "optimizer.store_param_remainders=false"), 2 + 2 + 4 + 4, 0),
        ("fp8-delayed", LEAN, 2 + 2 + 2 + 4, 2),
        ("fp8-tensorwise", LEAN, 2 + 2 + 4 + 4, 2),
        ("fp8-tensorwise", (*LEAN, "precision.fp8_param_gather=true"), 2 + 2 + 4 + 4, 0),
    ],
)
def test_bytes_of_state(
    recipe: str, overrides: tuple[str, ...], bytes_a_parameter: int, more_in_temporal: int, tmp_path: Path
) -> None:
    config = make_config(tmp_path, f"precision.recipe={recipe}", *overrides, preset="8b")
    parts = count_parameters(config)
    expected = bytes_a_parameter * sum(parts.values()) + more_in_temporal * parts["temporal"]
    assert sum(state_bytes(config).values()) == expected


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_bytes_are_those_of_a_real_optimizer(recipe: str, tmp_path: Path) -> None:
    """After one update of a wrapped model; the tables' padding, which is not counted, is."""
    from megaspeech.model.speech_text_model import SpeechTextModel
    from megaspeech.parallel.optimizer import optimizer_parts
    from megaspeech.parallel.update import gradient_norm, update_weights
    from megaspeech.parallel.wrap import wrap

    config = make_config(tmp_path, f"precision.recipe={recipe}")

    def build(vp_stage: int | None) -> SpeechTextModel:
        return SpeechTextModel(config, pre_process=True, post_process=True)

    wrapped = wrap(config, num_chunks=1, build=build, initialise=lambda model: None)
    update_weights(wrapped.optimizer, grad_norm=gradient_norm(wrapped.optimizer))
    parameters = [parameter for model in wrapped.models for parameter in model.parameters()]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in parameters}
    held |= {parameter.main_grad.data_ptr(): parameter.main_grad.nbytes for parameter in parameters}
    for part in optimizer_parts(wrapped.optimizer):
        state = part.optimizer.state
        tensors = [*state, *(value for values in state.values() for value in values.values() if torch_size(value) > 4)]
        held |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    padding = sum(parameter.numel() for parameter in parameters) / sum(count_parameters(config).values())
    assert sum(held.values()) == pytest.approx(padding * sum(state_bytes(config).values()), rel=1e-3)
    wrapped.release()


def torch_size(value: object) -> int:
    return getattr(value, "nbytes", 0)


def test_gpus_are_found_by_the_name_that_torch_gives() -> None:
    assert find_gpu("NVIDIA H200").memory_gb == 141 and find_gpu("NVIDIA H100 80GB HBM3").bandwidth == 3350
    assert find_gpu("NVIDIA H100 PCIe") is None and find_gpu("cpu") is None
    assert len({gpu.device_name for gpu in GPUS}) == len(GPUS)


def test_only_dense_rates_are_named() -> None:
    """FP8 is twice as fast as BF16, not four times, as data sheets print it."""
    assert all(gpu.fp8_tflops / gpu.bf16_tflops == pytest.approx(2, rel=1e-3) for gpu in GPUS if gpu.fp8_tflops)
