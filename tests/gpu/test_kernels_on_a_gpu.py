"""The Triton kernels on a real GPU, at production widths, against FP64. Skipped where there is none; `make gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exactness import assert_as_exact_as_torch
from torch import Tensor

from megaspeech.kernels import load_kernels
from megaspeech.kernels.benchmarks.checks import exact_results, results
from megaspeech.kernels.benchmarks.operations import OPERATIONS, Inputs
from megaspeech.kernels.benchmarks.providers import PROVIDERS
from megaspeech.kernels.benchmarks.shapes import MODELS, ModelShape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

each_operation = pytest.mark.parametrize("operation", OPERATIONS)
each_model = pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LARGEST_OFFSET = 2**31


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    """Kernels are compiled here, not interpreted as in tests/kernels; and no test finds the GPU full."""
    from megaspeech.kernels.launching import triton

    if triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process; run tests/gpu alone, as `make gpu` does")
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def draw(operation: str, shape: ModelShape, frames: int, *, dtype: torch.dtype, masked: float = 0.1) -> Inputs:
    return OPERATIONS[operation].draw(shape, frames, dtype=dtype, device="cuda", masked=masked)


def results_of(provider: str, operation: str, inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients by name."""
    (found,) = (each for each in PROVIDERS[operation] if each.name == provider)
    return results(found.prepare(inputs))


def assert_exact(provider: str, operation: str, inputs: Inputs) -> None:
    ours, torchs = (results_of(name, operation, inputs) for name in (provider, "reference"))
    exact = exact_results(OPERATIONS[operation], inputs)
    for name in exact:
        assert_as_exact_as_torch(ours[name], torchs[name], exact[name])


@each_operation
@each_model
@each_dtype
@pytest.mark.parametrize("frames", [512, 777, 1024])
def test_forward_and_gradients_are_exact(operation: str, shape: ModelShape, dtype: torch.dtype, frames: int) -> None:
    assert_exact("triton", operation, draw(operation, shape, frames, dtype=dtype))


@each_dtype
def test_gradient_summed_by_atomics_is_exact(dtype: torch.dtype) -> None:
    assert_exact("triton-atomic", "stream_embedding", draw("stream_embedding", MODELS[0], 1024, dtype=dtype))


@each_operation
@each_model
def test_twice_the_same_bits(operation: str, shape: ModelShape) -> None:
    inputs = draw(operation, shape, 1024, dtype=torch.bfloat16)
    first, second = (results_of("triton", operation, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_dtype
def test_right_answers_are_counted_right(dtype: torch.dtype) -> None:
    """`correct` where the two largest logits differ by more than rounding."""
    inputs = draw("codebook_cross_entropy", MODELS[0], 1024, dtype=dtype)
    hidden_QND, heads_QDV = inputs.in_fp64().leaves.values()
    logits_QNV = torch.bmm(hidden_QND, heads_QDV)
    (first_QN, second_QN), winner_QN = logits_QNV.topk(2).values.unbind(-1), logits_QNV.argmax(-1)
    targets_QN = winner_QN.where(torch.rand_like(first_QN) < 0.5, inputs.constants["targets_QN"])
    function = load_kernels("triton").codebook_cross_entropy.codebook_cross_entropy
    _, correct_QN = function(*inputs.leaves.values(), targets_QN)
    is_clear_QN = first_QN - second_QN > 1e-2
    assert is_clear_QN.float().mean() > 0.5
    assert torch.equal(correct_QN[is_clear_QN], (winner_QN == targets_QN)[is_clear_QN])


@each_dtype
def test_grouped_queries(dtype: torch.dtype) -> None:
    """Production has a key and value head for each query; a group of four shares one here."""
    inputs = draw("depth_attention", MODELS[1], 777, dtype=dtype)
    packed_QNCE = inputs.leaves["qkv_QNCE"][:, :, : 16 + 2 * 4].contiguous()
    assert_exact(
        "triton", "depth_attention", Inputs({"qkv_QNCE": packed_QNCE}, {"num_query_groups": 4}, inputs.grad_output)
    )


def needs_gigabytes(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free / 1e9:.0f} are free")


def test_table_rows_past_two_to_the_31_elements() -> None:
    """One stream over a table of 4.4 GB, its last rows asked for."""
    needs_gigabytes(16)
    hidden, last = 8192, 4096
    num_rows = LARGEST_OFFSET // hidden + last
    table_RH = torch.zeros(num_rows, hidden, dtype=torch.bfloat16, device="cuda")
    table_RH[-last:].normal_()
    table_RH.requires_grad_()
    tokens_1T = num_rows - 1 - torch.randperm(last - 1, device="cuda")[None, :512]
    constants = {"delays": [0], "initial": [num_rows - 1], "offsets": [0]}
    constants = {name: torch.tensor(value, device="cuda") for name, value in constants.items()}
    function = load_kernels("triton").stream_embedding.stream_embedding
    out_TBH = function(tokens_1T[:, None], table_RH, **constants)
    rows_T = torch.cat([constants["initial"], tokens_1T[0, :-1]])
    assert torch.equal(out_TBH[:, 0], table_RH[rows_T])
    grad_TBH = torch.randn_like(out_TBH)
    (gradient,) = torch.autograd.grad(out_TBH, table_RH, grad_TBH)
    expected = torch.zeros(last, hidden, device="cuda").index_add_(
        0, rows_T - (num_rows - last), grad_TBH[:, 0].float()
    )
    assert torch.equal(gradient[-last:], expected.bfloat16())
    assert not gradient[:-last].any()


def last_frames(values: dict[str, Any], frames: int) -> dict[str, Any]:
    """What has frames, which are the second axis, cut to the last ones."""
    has_frames = {"output", "qkv_QNCE", "hidden_QND", "targets_QN"} & values.keys()
    return {name: values[name][:, -frames:].clone() if name in has_frames else values[name] for name in values}


@pytest.mark.parametrize("operation", ["depth_attention", "codebook_cross_entropy"])
def test_frames_past_two_to_the_31_elements(operation: str) -> None:
    """Frames know nothing of each other: the last of many are as exact as if they had come alone."""
    shape, frames, few = MODELS[-1], 65_536, 64
    size = OPERATIONS[operation].draw(shape, frames, dtype=torch.bfloat16, device="meta")
    assert max(leaf.numel() for leaf in size.leaves.values()) >= LARGEST_OFFSET
    needs_gigabytes(1.2 * size.num_bytes / 1e9)
    inputs = draw(operation, shape, frames, dtype=torch.bfloat16)
    ours = last_frames(results_of("triton", operation, inputs), few)
    grad_output = inputs.grad_output[:, -few:].clone()
    inputs = Inputs(last_frames(inputs.leaves, few), last_frames(inputs.constants, few), grad_output)
    torchs, exact = results_of("reference", operation, inputs), exact_results(OPERATIONS[operation], inputs)
    for name in exact.keys() - {"heads_QDV"}:  # whose gradient is a sum over all frames
        assert_as_exact_as_torch(ours[name], torchs[name], exact[name])
