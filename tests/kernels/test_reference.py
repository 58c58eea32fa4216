"""The reference kernels against the formulas they are defined by, written out as loops and in FP64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaspeech.kernels import load_kernels
from megaspeech.kernels.stream_embedding.reference import delayed_codes, packed_embedding

REFERENCE = load_kernels("reference")
stream_embedding = REFERENCE.stream_embedding.stream_embedding
depth_attention = REFERENCE.depth_attention.depth_attention
codebook_cross_entropy = REFERENCE.codebook_cross_entropy.codebook_cross_entropy

CARDINALITIES, DELAYS, WIDTH = (11, 5, 5, 7), (0, 2, 1, 4), 6
OFFSETS = (0, 12, 18, 24)  # cardinality + 1 rows a stream
ROWS = 32


def codes_and_table(*, num_frames: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(-1, size, (3, num_frames), generator=generator) for size in CARDINALITIES]
    return torch.stack(rows, dim=1), torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def embed(codes_BST: Tensor, table_RH: Tensor, *, first_row: int = 0) -> Tensor:
    return stream_embedding(
        codes_BST,
        table_RH,
        delays=torch.tensor(DELAYS),
        initial=torch.tensor(CARDINALITIES),
        offsets=torch.tensor(OFFSETS),
        first_row=first_row,
    )


def embed_by_loop(codes_BST: Tensor, table_RH: Tensor) -> Tensor:
    """moshi: position t reads the token of frame t - 1 - delay, before the first the initial token; -1 is nothing."""
    batch, streams, frames = codes_BST.shape
    out = []
    for t in range(frames):
        for b in range(batch):
            total = torch.zeros(WIDTH, dtype=table_RH.dtype)
            for s in range(streams):
                source = t - 1 - DELAYS[s]
                token = int(codes_BST[b, s, source]) if source >= 0 else CARDINALITIES[s]
                if token >= 0:
                    total = total + table_RH[OFFSETS[s] + token]
            out.append(total)
    return torch.stack(out).view(frames, batch, WIDTH)


@pytest.mark.parametrize("num_frames", [1, 2, 9])
def test_stream_embedding_equals_the_loop(num_frames: int) -> None:
    codes_BST, table_RH = codes_and_table(num_frames=num_frames)
    out = embed(codes_BST, table_RH)
    assert out.is_contiguous()
    torch.testing.assert_close(out, embed_by_loop(codes_BST, table_RH), rtol=1e-12, atol=1e-12)


def test_stream_embedding_gradient_equals_the_loops() -> None:
    codes_BST, table_RH = codes_and_table()
    weight = torch.randn(9, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for function in (embed, embed_by_loop):
        table = table_RH.clone().requires_grad_()
        (function(codes_BST, table) * weight).sum().backward()
        gradients.append(table.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert gradients[0].abs().sum(1).count_nonzero() > ROWS // 2


@pytest.mark.parametrize("cuts", [(0, 16, 32), (0, 5, 13, 32), (0, 12, 18, 24, 32), tuple(range(33))])
def test_row_ranges_sum_to_the_whole(cuts: tuple[int, ...]) -> None:
    codes_BST, table_RH = codes_and_table()
    parts = [embed(codes_BST, table_RH[low:high], first_row=low) for low, high in zip(cuts[:-1], cuts[1:], strict=True)]
    torch.testing.assert_close(sum(parts), embed(codes_BST, table_RH), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first_row", [32, 400, -64])
def test_rows_that_nobody_asks_for_add_nothing(first_row: int) -> None:
    codes_BST, table_RH = codes_and_table()
    table_RH.requires_grad_()
    out = embed(codes_BST, table_RH, first_row=first_row)
    assert torch.equal(out, torch.zeros(9, 3, WIDTH, dtype=torch.float64))
    out.sum().backward()
    assert torch.equal(table_RH.grad, torch.zeros_like(table_RH))


def test_zero_tokens_add_nothing_and_learn_nothing() -> None:
    _, table_RH = codes_and_table()
    table_RH.requires_grad_()
    tokens_BST = torch.full((2, 4, 5), -1)
    out = packed_embedding(tokens_BST, table_RH, offsets=torch.tensor(OFFSETS))
    assert torch.equal(out, torch.zeros(2, 5, WIDTH, dtype=torch.float64))
    out.sum().backward()
    assert torch.equal(table_RH.grad, torch.zeros_like(table_RH))


def test_stream_embedding_in_bf16_is_as_good_as_bf16() -> None:
    codes_BST, table_RH = codes_and_table(dtype=torch.bfloat16)
    out = embed(codes_BST, table_RH)
    assert out.dtype is torch.bfloat16
    exact = embed_by_loop(codes_BST, table_RH.double())
    # A sum of four terms: at most three roundings of half a unit in the last of 8 bits, of partial sums.
    bound = 3 * 2.0**-8 * embed_by_loop(codes_BST, table_RH.double().abs())
    assert ((out.double() - exact).abs() <= bound).all()


def test_delayed_codes_move_right_and_fall_off() -> None:
    codes_BST = torch.arange(1, 9).view(1, 2, 4)
    moved = delayed_codes(codes_BST, shifts=torch.tensor([0, 2]), fill=torch.tensor([90, 91]))
    assert moved.tolist() == [[[1, 2, 3, 4], [91, 91, 5, 6]]]
    all_gone = delayed_codes(codes_BST, shifts=torch.tensor([4, 9]), fill=torch.tensor([90, 91]))
    assert all_gone.tolist() == [[[90] * 4, [91] * 4]]
    weights = delayed_codes(codes_BST.float() / 2, shifts=torch.tensor([1, 3]), fill=torch.zeros(2, dtype=torch.int64))
    assert weights.tolist() == [[[0, 0.5, 1, 1.5], [0, 0, 0, 2.5]]]


def attend_by_softmax(qkv_QNCE: Tensor, groups: int) -> Tensor:
    """FP64 softmax(q k^T / sqrt(E)) v; query head a reads group a // (A / G)."""
    codebooks, frames, _, width = qkv_QNCE.shape
    heads = qkv_QNCE.shape[2] - 2 * groups
    query, key, value = qkv_QNCE.double().split([heads, groups, groups], dim=2)
    out = torch.zeros(codebooks, frames, heads, width, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // groups)
        for q in range(codebooks):
            scores = torch.einsum("ne,kne->nk", query[q, :, head], key[: q + 1, :, group]) / math.sqrt(width)
            out[q, :, head] = torch.einsum("nk,kne->ne", scores.softmax(-1), value[: q + 1, :, group])
    return out.flatten(2)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("codebooks, frames", [(1, 3), (8, 5)])
def test_depth_attention_equals_the_softmax(codebooks: int, frames: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    qkv = torch.randn(codebooks, frames, 6 + 2 * groups, 4, generator=generator)
    qkv[:, :, :6] *= 3
    out = depth_attention(qkv, num_query_groups=groups)
    assert out.shape == (codebooks, frames, 24)
    torch.testing.assert_close(out.double(), attend_by_softmax(qkv, groups), rtol=1e-5, atol=1e-5)


def test_depth_attention_neither_looks_ahead_nor_across_frames() -> None:
    qkv = torch.randn(4, 5, 6, 4, generator=torch.Generator().manual_seed(0))
    before = depth_attention(qkv, num_query_groups=2)
    qkv[2, 3, 2:] = torch.tensor([9.0, -9.0]).repeat_interleave(2)[:, None]  # keys, values
    changed = (depth_attention(qkv, num_query_groups=2) != before).any(-1)
    assert changed.nonzero().tolist() == [[2, 3], [3, 3]]


def heads_and_targets() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_QND = torch.randn(3, 10, 4, generator=generator)
    heads_QDV = torch.randn(3, 4, 7, generator=generator)
    return hidden_QND, heads_QDV, torch.randint(-1, 7, (3, 10), generator=generator)


def test_codebook_cross_entropy_equals_torchs() -> None:
    hidden_QND, heads_QDV, targets_QN = heads_and_targets()
    losses, correct = codebook_cross_entropy(hidden_QND, heads_QDV, targets_QN)
    assert losses.dtype is torch.float32 and correct.dtype is torch.bool
    assert (targets_QN == -1).any() and correct.any()
    for q in range(3):
        logits = hidden_QND[q].double() @ heads_QDV[q].double()
        kept = targets_QN[q] >= 0
        wanted = torch.nn.functional.cross_entropy(logits[kept], targets_QN[q][kept], reduction="none")
        torch.testing.assert_close(losses[q][kept].double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(correct[q], kept & (logits.argmax(-1) == targets_QN[q]))
        assert torch.equal(losses[q][~kept], torch.zeros_like(losses[q][~kept]))


def test_masked_targets_have_no_gradient() -> None:
    hidden_QND, heads_QDV, targets_QN = heads_and_targets()
    hidden_QND.requires_grad_()
    codebook_cross_entropy(hidden_QND, heads_QDV, targets_QN)[0].sum().backward()
    touched = hidden_QND.grad.abs().sum(-1) > 0
    assert torch.equal(touched, targets_QN >= 0)


def test_cross_entropy_is_fp32_whatever_the_weights_are() -> None:
    hidden_QND, heads_QDV, targets_QN = heads_and_targets()
    losses, _ = codebook_cross_entropy(hidden_QND.bfloat16(), heads_QDV.bfloat16(), targets_QN)
    assert losses.dtype is torch.float32
    exact, _ = codebook_cross_entropy(hidden_QND.bfloat16().float(), heads_QDV.bfloat16().float(), targets_QN)
    torch.testing.assert_close(losses, exact, rtol=0, atol=0.1)  # logits rounded to BF16, up to 8, are off by 1 / 64
    assert not torch.equal(losses, losses.bfloat16().float())
