"""`depth_attention` in Triton against the reference, run in FP64; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_as_exact_as_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaspeech.kernels.depth_attention import function, reference
from megaspeech.kernels.launching import launch, triton

BF16, FP32 = torch.bfloat16, torch.float32


def packed(codebooks: int, frames: int, heads: int, groups: int, width: int, *, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(codebooks * frames + width)
    return torch.randn(codebooks, frames, heads + 2 * groups, width, generator=generator).to(dtype)


def with_gradient(module: object, qkv: Tensor, *, groups: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output, and the gradient of its product with fixed random numbers."""
    leaf = qkv.detach().to(dtype or qkv.dtype).requires_grad_()
    out = module.depth_attention(leaf, num_query_groups=groups)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(qkv.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaf, weight.to(out.dtype))]


def assert_exact(qkv: Tensor, *, groups: int) -> None:
    ours, torchs = (with_gradient(module, qkv, groups=groups) for module in (function, reference))
    for results in zip(ours, torchs, with_gradient(reference, qkv, groups=groups, dtype=torch.float64), strict=True):
        assert_as_exact_as_torch(*results)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    "codebooks, frames, heads, groups, width",
    [(8, 5, 2, 2, 64), (16, 9, 4, 2, 64), (16, 3, 2, 1, 128), (8, 6, 2, 2, 8), (5, 7, 6, 3, 24), (32, 2, 2, 1, 256)]
    + [(1, 1, 1, 1, 1), (17, 4, 3, 1, 33), (4, 0, 2, 1, 8)],
)
def test_as_exact_as_torch(
    codebooks: int, frames: int, heads: int, groups: int, width: int, dtype: torch.dtype
) -> None:
    assert_exact(packed(codebooks, frames, heads, groups, width, dtype=dtype), groups=groups)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    codebooks=st.integers(1, 32),
    frames=st.integers(1, 6),
    groups=st.integers(1, 2),
    heads_of_group=st.integers(1, 3),
    width=st.integers(1, 40),
    dtype=st.sampled_from([BF16, FP32]),
)
def test_any_shape_is_as_exact_as_torch(
    codebooks: int, frames: int, groups: int, heads_of_group: int, width: int, dtype: torch.dtype
) -> None:
    assert_exact(packed(codebooks, frames, groups * heads_of_group, groups, width, dtype=dtype), groups=groups)


@pytest.mark.parametrize("cut", [(slice(1, None),), (slice(None), slice(2, 7)), (slice(None, None, 2), slice(1, 8, 3))])
def test_codebooks_and_frames_may_be_apart(cut: tuple[slice, ...]) -> None:
    apart = packed(6, 8, 2, 2, 8, dtype=FP32)[cut]
    ours, wanted = (with_gradient(function, qkv, groups=2) for qkv in (apart, apart.contiguous()))
    assert all(map(torch.equal, ours, wanted))
    permuted = apart.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(torch.equal, with_gradient(function, permuted, groups=2), wanted))


def test_gradient_of_the_output_may_be_strided() -> None:
    qkv = packed(4, 5, 2, 1, 8, dtype=FP32).requires_grad_()
    gradients = []
    for module in (function, reference):
        out = module.depth_attention(qkv, num_query_groups=1)
        gradients += torch.autograd.grad(out, qkv, torch.ones(()).expand(out.shape))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_without_a_gradient() -> None:
    qkv = packed(4, 5, 2, 1, 8, dtype=FP32)
    out = function.depth_attention(qkv, num_query_groups=1)
    assert not out.requires_grad and out.is_contiguous()
    with torch.no_grad():
        assert torch.equal(out, function.depth_attention(qkv.requires_grad_(), num_query_groups=1))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_large_logits(dtype: torch.dtype) -> None:
    qkv = packed(8, 5, 2, 1, 16, dtype=dtype)
    qkv[:, :, :3] *= 100  # logits of some 40,000, so that exp(x) without the maximum is infinite
    assert_exact(qkv, groups=1)


@pytest.mark.parametrize("head", [1, 2, 3], ids=["query", "key", "value"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_stays_in_its_frame_and_is_seen(poison: float, head: int) -> None:
    """A program takes frames 0 to 3. Where the query is NaN, torch's CPU kernel would give an output of 0."""
    qkv = packed(3, 5, 2, 1, 8, dtype=BF16)
    poisoned = qkv.clone()
    poisoned[1, 2, head, 5] = poison
    others = [0, 1, 3, 4]
    clean, ours = (with_gradient(function, x, groups=1) for x in (qkv, poisoned))
    assert all(torch.equal(a[:, others], b[:, others]) for a, b in zip(clean, ours, strict=True))
    assert all(x[:, 2].isnan().any() for x in ours)
    torchs = with_gradient(reference, poisoned, groups=1)
    assert not any((a.isnan() & ~b.isnan()).any() for a, b in zip(torchs, ours, strict=True))


def test_looks_neither_ahead_nor_across_frames_nor_groups() -> None:
    qkv = packed(4, 6, 4, 2, 8, dtype=FP32)
    before = function.depth_attention(qkv, num_query_groups=2).unflatten(2, (4, 8))
    qkv[2, 3, [5, 7]] += 9  # key and value of the second group
    changed = (function.depth_attention(qkv, num_query_groups=2).unflatten(2, (4, 8)) != before).any(-1)
    assert changed.nonzero().tolist() == [[2, 3, 2], [2, 3, 3], [3, 3, 2], [3, 3, 3]]


@pytest.fixture
def untouched_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is asked for but not touched costs nothing: neither poison nor the interpreter's copies touch it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


@pytest.mark.usefixtures("untouched_memory")
@pytest.mark.parametrize("strides", [(1 << 30, 24), (24, 1 << 30)])
def test_input_beyond_two_to_the_31_elements(strides: tuple[int, int]) -> None:
    small = packed(3, 3, 1, 1, 8, dtype=BF16)
    large = torch.empty((1 << 31) + 72, dtype=BF16).as_strided(small.shape, (*strides, 8, 1)).copy_(small)
    out = function.launch_forward(small, 1)
    assert torch.equal(function.launch_forward(large, 1), out)
    assert torch.equal(function.launch_backward(out, large, 1), function.launch_backward(out, small, 1))


@pytest.mark.usefixtures("untouched_memory")
def test_output_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many frames, all the same, only the first program's are worked on."""
    monkeypatch.setattr(
        function, "launch", lambda kernel, grid, *args, **options: launch(kernel, (1,), *args, **options)
    )
    one = packed(2, 1, 1, 1, 16, dtype=BF16)
    few, first = one.expand(-1, 4, -1, -1), slice(4)
    out = function.launch_forward(few, 1)
    assert torch.equal(function.launch_forward(one.expand(-1, (1 << 27) + 1, -1, -1), 1)[:, first], out)
    grad = torch.empty(2, (1 << 31) // 48 + 1, 16, dtype=BF16)
    grad[:, first] = out
    large = function.launch_backward(grad, one.expand(-1, grad.shape[1], -1, -1), 1)
    assert torch.equal(large[:, first], function.launch_backward(out, few, 1))


def test_operators_are_well_formed() -> None:
    qkv = packed(4, 5, 2, 1, 8, dtype=FP32).requires_grad_()
    torch.library.opcheck(torch.ops.megaspeech.depth_attention.default, (qkv, 1))
    grad = torch.randn(4, 5, 16)
    torch.library.opcheck(torch.ops.megaspeech.depth_attention_backward.default, (grad, qkv.detach(), 1))


@pytest.mark.parametrize(
    "shape, groups, said",
    [
        ((33, 1, 3, 8), 1, "33 codebooks, of at most 32"),
        ((4, 1, 3, 257), 1, "heads 257 wide, of at most 256"),
        ((4, 1, 7, 8), 2, "num_query_groups = 2 does not divide the 3 query heads"),
        ((4, 1, 4, 8), 2, "num_query_groups = 2 does not divide the 0 query heads"),
        ((4, 1, 3, 8), 0, "num_query_groups = 0 does not divide"),
    ],
)
def test_refused_shapes(shape: tuple[int, ...], groups: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        function.depth_attention(torch.zeros(shape), num_query_groups=groups)


def test_refused_tensors() -> None:
    qkv = packed(4, 5, 2, 1, 8, dtype=FP32)
    with pytest.raises(ValueError, match="float64, neither BF16 nor FP32"):
        function.depth_attention(qkv.double(), num_query_groups=1)
    with pytest.raises(ValueError, match=r"strides \(1, 4\), not \(8, 1\)"):
        function.depth_attention(qkv.transpose(2, 3).contiguous().transpose(2, 3), num_query_groups=1)
    with pytest.raises(ValueError, match=r"strides \(16, 1\), not \(8, 1\)"):
        function.depth_attention(packed(4, 5, 6, 1, 8, dtype=FP32)[:, :, ::2], num_query_groups=1)
