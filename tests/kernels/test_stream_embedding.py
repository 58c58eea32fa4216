"""`stream_embedding` by Triton against the reference in FP64: values, gradients, and where they go."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from exactness import assert_as_exact_as_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaspeech.kernels.launching import triton
from megaspeech.kernels.stream_embedding import function, reference

DTYPES = [torch.float32, torch.bfloat16]
DRAWN = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Case(NamedTuple):
    """Arguments of one lookup; `streams` are the keyword arguments."""

    codes_BST: Tensor
    table_RH: Tensor
    streams: dict[str, Tensor]


def make_case(
    *,
    batch: int = 2,
    num_streams: int = 5,
    num_frames: int = 7,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    codes_dtype: torch.dtype = torch.int64,
    zeros: float = 0.1,
    seed: int = 0,
) -> Case:
    """Few tokens a stream, so that rows recur; delays of 0 to 3 frames."""
    draw = torch.Generator().manual_seed(seed)
    cardinalities = torch.randint(1, 9, (num_streams,), generator=draw)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (cardinalities + 1).cumsum(0)])
    tokens = torch.randint(0, 1 << 30, (batch, num_streams, num_frames), generator=draw) % cardinalities[:, None]
    tokens[torch.rand(tokens.shape, generator=draw) < zeros] = -1
    streams = {
        "delays": torch.randint(0, 4, (num_streams,), generator=draw),
        "initial": cardinalities,
        "offsets": offsets[:-1],
    }
    table = torch.randn(int(offsets[-1]) + 3, width, generator=draw).to(dtype)
    return Case(tokens.to(codes_dtype), table, streams)


def both(case: Case, **options) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(output, gradient of the table) of ours, of torch in the same precision, and exact."""
    results = []
    for module, dtype in ((function, None), (reference, None), (reference, torch.float64)):
        table = case.table_RH.detach().to(dtype or case.table_RH.dtype).requires_grad_()
        out = module.stream_embedding(
            case.codes_BST.long() if module is reference else case.codes_BST, table, **case.streams, **options
        )
        draw = torch.Generator().manual_seed(1)
        weight = torch.randn(out.shape, generator=draw).to(case.table_RH.dtype).to(out.dtype)
        out.backward(weight)
        results.append([out.detach(), table.grad])
    return tuple(results)


def assert_exact(case: Case, **options) -> None:
    for ours, torchs, exact in zip(*both(case, **options), strict=True):
        assert_as_exact_as_torch(ours, torchs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "num_streams": 1, "num_frames": 1, "width": 1},
        {"batch": 1, "num_streams": 17, "num_frames": 9, "width": 64},
        {"batch": 3, "num_streams": 33, "num_frames": 2, "width": 40},
        {"batch": 2, "num_streams": 8, "num_frames": 5, "width": 520},
        {"batch": 1, "num_streams": 3, "num_frames": 4, "width": 1025},
        {"batch": 1, "num_streams": 2, "num_frames": 2, "width": 8192},
    ],
)
def test_values_and_gradients(sizes: dict[str, int], atomic: bool, dtype: torch.dtype) -> None:
    assert_exact(make_case(**sizes, dtype=dtype), atomic=atomic)


@DRAWN
@given(
    batch=st.integers(1, 3),
    num_streams=st.integers(1, 12),
    num_frames=st.integers(1, 9),
    width=st.integers(1, 70),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    first_row=st.integers(-4, 40),
    seed=st.integers(0, 1000),
)
def test_drawn_values_and_gradients(first_row: int, **drawn) -> None:
    assert_exact(make_case(**drawn), first_row=first_row)


@pytest.mark.parametrize("codes_dtype", [torch.int16, torch.int32, torch.int64])
def test_codes_of_any_integer_type_and_stride(codes_dtype: torch.dtype) -> None:
    case = make_case(codes_dtype=codes_dtype)
    strided = case.codes_BST.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert_exact(case._replace(codes_BST=strided))


@pytest.mark.parametrize("num_frames", [1, 40])
def test_a_row_that_every_frame_uses_is_summed_in_pieces(num_frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 entries: rows within one, across two, and across more than the merging kernel takes at once."""
    monkeypatch.setattr(function, "CHUNK", 16)
    case = make_case(batch=3, num_streams=4, num_frames=num_frames, width=8)
    case.codes_BST[:, 1] = 0
    assert_exact(case)
    everything_is_one_row = make_case(batch=8, num_streams=1, num_frames=num_frames, width=8)
    everything_is_one_row.codes_BST.zero_()
    everything_is_one_row.streams["delays"].zero_()
    assert_exact(everything_is_one_row)


def test_all_zero_tokens_and_rows_of_others_give_zeros() -> None:
    case = make_case(zeros=1.0)
    case.streams["initial"] = torch.full((5,), -1)
    for options in ({}, {"first_row": 1000}, {"first_row": -1000}):
        for result in both(case, **options)[0]:
            assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("cuts", [(0, 1, 2), (0, 3, 17, 1000)])
def test_row_ranges_sum_to_the_whole(cuts: tuple[int, ...]) -> None:
    """What tensor parallel ranks add up; each keeps the gradient of its own rows."""
    case = make_case(dtype=torch.float32, num_frames=12)
    cuts = (*(min(cut, len(case.table_RH)) for cut in cuts), len(case.table_RH))
    whole, gradient = both(case)[0]
    parts = [
        both(case._replace(table_RH=case.table_RH[low:high]), first_row=low)[0]
        for low, high in zip(cuts[:-1], cuts[1:], strict=True)
        if low < high
    ]
    torch.testing.assert_close(sum(out for out, _ in parts), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.cat([grad for _, grad in parts]), gradient)


def test_some_frames_are_those_frames_of_all() -> None:
    case, frames = make_case(num_frames=9), torch.tensor([7, 0, 1, 8])
    assert_exact(case, frames=frames)
    everything = function.stream_embedding(*case[:2], **case.streams)
    assert torch.equal(function.stream_embedding(*case[:2], **case.streams, frames=frames), everything[frames])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_embedding_keeps_samples_first(dtype: torch.dtype) -> None:
    """As the depth transformer reads: every codebook a sample of one stream, its gradient transposed memory."""
    draw = torch.Generator().manual_seed(0)
    tokens, table = torch.randint(-1, 11, (4, 1, 6), generator=draw), torch.randn(12, 16, generator=draw).to(dtype)
    weight, results = torch.randn(6, 4, 16, generator=draw).to(dtype).transpose(0, 1), []
    for module, kind in ((function, dtype), (reference, dtype), (reference, torch.float64)):
        leaf = table.to(kind, copy=True).requires_grad_()
        out = module.packed_embedding(tokens, leaf, offsets=torch.zeros(1, dtype=torch.int64))
        out.backward(weight.to(kind))
        results.append((out.detach(), leaf.grad))
    assert results[0][0].shape == (4, 6, 16)
    for triple in zip(*results, strict=True):
        assert_as_exact_as_torch(*triple)


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_add_up_in_the_main_gradient(dtype: torch.dtype, atomic: bool) -> None:
    """megatron-core's protocol, over two microbatches: added in FP32 where DDP gathers it, the parameter marked."""
    case = make_case(dtype=dtype)
    table = torch.nn.Parameter(case.table_RH)
    before = torch.randn(table.shape, generator=torch.Generator().manual_seed(2))
    table.main_grad, table.grad_added_to_main_grad = before.clone(), False
    for _ in range(2):
        out = function.stream_embedding(case.codes_BST, table, **case.streams, atomic=atomic)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        out.backward(weight)
        assert table.grad_added_to_main_grad and table.grad is not None
        table.grad = None
    exact = both(case._replace(table_RH=table.detach()))[2][1]
    torch.testing.assert_close(table.main_grad.double(), before.double() + 2 * exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attribute", ["half", "on demand"])
def test_other_buffers_are_left_to_their_owner(attribute: str) -> None:
    case = make_case(dtype=torch.bfloat16)
    table = torch.nn.Parameter(case.table_RH)
    table.main_grad = torch.zeros(table.shape, dtype=torch.bfloat16 if attribute == "half" else torch.float32)
    if attribute == "on demand":
        table.get_main_grad = lambda: table.main_grad
    function.stream_embedding(case.codes_BST, table, **case.streams).sum().backward()
    assert table.main_grad.count_nonzero() == 0
    assert table.grad.isfinite().all() and table.grad.count_nonzero()


def test_the_default_gradient_has_the_same_bits_in_any_grouping_of_work() -> None:
    case = make_case(num_frames=30, dtype=torch.float32)
    first, again = both(case)[0][1], both(case)[0][1]
    assert torch.equal(first, again)


def test_nan_stays_in_its_frame() -> None:
    case = make_case(zeros=0.0)
    case.streams["delays"].zero_()
    case.codes_BST[0, 2, 3] = 0
    row = int(case.streams["offsets"][2])
    case.table_RH[row] = torch.nan
    users = (case.codes_BST[:, 2, :-1] == 0).T
    out = function.stream_embedding(*case[:2], **case.streams)
    assert torch.equal(out[1:].isnan().any(-1), users) and not out[0].isnan().any()


def test_frozen_table_needs_no_gradient() -> None:
    case = make_case()
    assert not function.stream_embedding(*case[:2], **case.streams).requires_grad


def test_operators_are_what_they_say() -> None:
    case = make_case(num_frames=3)
    lookup = (case.codes_BST, *case.streams.values(), None, None, 0)
    table = case.table_RH.requires_grad_()
    torch.library.opcheck(torch.ops.megaspeech.stream_embedding.default, (*lookup, table, False, False))
    grad = torch.ones(3, 2, 24)
    sizes = (len(case.table_RH), False, False)
    torch.library.opcheck(torch.ops.megaspeech.stream_embedding_gradient.default, (*lookup, grad, *sizes))
    main = torch.zeros(case.table_RH.shape)
    torch.library.opcheck(
        torch.ops.megaspeech.stream_embedding_add_gradient.default, (*lookup, grad, main, False, False)
    )


def test_rows_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is asked for, but only the rows that are used are ever touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    # The interpreter copies all memory back to where it came from: on the CPU, onto itself.
    monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    width, rows = 4096, (1 << 19) + 3
    assert (rows - 1) * width > 1 << 31
    table = torch.nn.Parameter(torch.empty(rows, width, dtype=torch.bfloat16))
    used = torch.tensor([rows - 1, 5, rows - 2])
    table.data[used] = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    table.main_grad = torch.from_numpy(np.zeros((rows, width), dtype=np.float32))  # torch.zeros would write them
    out = function.packed_embedding(used.view(1, 1, 3), table, offsets=torch.zeros(1, dtype=torch.int64))
    assert torch.equal(out[0], table[used])
    out.backward(out.detach())
    assert torch.equal(table.main_grad[used], table[used].float())


@pytest.mark.parametrize("atomic", [False, True])
def test_packed_rows_are_their_samples_side_by_side(atomic: bool) -> None:
    """Nothing moves into a sample from the one before it, however long the delay."""
    case = make_case(batch=1, num_frames=11)
    bounds = [0, 4, 5, 11]
    starts = torch.tensor([bounds[place] for place in range(3) for _ in range(bounds[place + 1] - bounds[place])])
    assert_exact(case, starts=starts, atomic=atomic)
    whole = function.stream_embedding(case.codes_BST, case.table_RH, **case.streams, starts=starts)
    for first, end in zip(bounds, bounds[1:], strict=False):
        alone = function.stream_embedding(case.codes_BST[..., first:end].contiguous(), case.table_RH, **case.streams)
        assert torch.equal(whole[first:end], alone)
    assert not torch.equal(whole, function.stream_embedding(case.codes_BST, case.table_RH, **case.streams))
